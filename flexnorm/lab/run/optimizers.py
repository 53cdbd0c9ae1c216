"""Optimizers by name, with the weights that belong on the sphere on the sphere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flexnorm.nn import undecayed
from flexnorm.nn.normprop import normalize_weights_, register_unit_norm
from flexnorm.optim import SGDG, SGDP, AdamG, AdamP, param_groups

_FLAT = ("sgd", "adamw", "sgdp", "adamp")  # those that leave the length of weights free


def _decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """All parameters, those without weight decay (alpha of unitization) in a group of their own."""
    free = {id(p) for p in undecayed(model)}
    groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if id(p) not in free]}]
    if free:
        groups.append({"params": [p for p in model.parameters() if id(p) in free], "weight_decay": 0.0})
    return groups


def _flat(groups: list[dict[str, Any]], optim: str, s: Mapping[str, Any], nesterov: bool) -> torch.optim.Optimizer:
    if optim == "sgd":
        return torch.optim.SGD(groups, s["lr"], s["momentum"], weight_decay=s["weight_decay"], nesterov=nesterov)
    if optim == "adamw":
        return torch.optim.AdamW(groups, s["lr"], (s["beta1"], s["beta2"]), weight_decay=s["weight_decay"])
    projection = {"delta": s["delta"], "wd_ratio": s["wd_ratio"]}
    if optim == "sgdp":
        return SGDP(groups, s["lr"], s["momentum"], s["weight_decay"], nesterov=nesterov, **projection)
    return AdamP(groups, s["lr"], (s["beta1"], s["beta2"]), weight_decay=s["weight_decay"], **projection)


def make_optimizer(
    model: nn.Module, optim: str, settings: Mapping[str, Any], example_input: Tensor
) -> tuple[torch.optim.Optimizer, list[str]]:
    """Build an optimizer for a model.

    Layers of Normalization Propagation get unit weights now and after every step (Arpit et al., 2016, section 3.3),
    unless the optimizer itself keeps weights on the sphere.

    Args:
        model: The network, not yet moved or wrapped.
        optim: One of :data:`flexnorm.lab.run.OPTIMS`.
        settings: Complete settings, as :meth:`flexnorm.lab.run.Config.optim_settings` returns them.
        example_input: (N, C, H, W) a few images, to find out which weights are scale-invariant.

    Returns:
        The optimizer, and remarks for the summary of the run (empty as a rule).
    """
    s = dict(settings)
    nesterov = s.get("nesterov", False) and s["momentum"] > 0
    if optim in _FLAT:
        optimizer = _flat(_decay_groups(model), optim, s, nesterov)
        normalize_weights_(model)
        register_unit_norm(optimizer, model)
        return optimizer, []
    groups = param_groups(
        model,
        lr=s["lr"],
        lr_manifold=s["lr_manifold"],
        weight_decay=s["weight_decay"],
        example_input=example_input,
        grad_clip=s["grad_clip"],
        ortho=s["ortho"],
    )
    notes = list(groups.notes)
    if not any(group["manifold"] for group in groups):
        notes.append("no weight of this network is scale-invariant: all are updated by SGD with momentum")
    if optim == "sgdg":
        return SGDG(groups, momentum=s["momentum"], nesterov=nesterov), notes
    return AdamG(groups, betas=(s["momentum"], s["beta2"]), nesterov=nesterov), notes
