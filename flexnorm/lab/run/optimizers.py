"""Optimizers by name, with the weights that belong on the sphere on the sphere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flexnorm.nn import undecayed
from flexnorm.nn.normprop import normalize_weights_, register_unit_norm
from flexnorm.optim import SGDG, SGDP, AdamG, AdamP, param_groups

_FLAT = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "sgdp": SGDP, "adamp": AdamP}
"""Optimizers that leave the length of weights free."""


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
    if "beta1" in s:
        s["betas"] = (s.pop("beta1"), s.pop("beta2"))
    if "nesterov" in s:
        s["nesterov"] &= s["momentum"] > 0
    if optim in _FLAT:
        # Parameters without weight decay (alpha of unitization) are in a group of their own.
        free = {id(p) for p in undecayed(model)}
        parts = [[p for p in model.parameters() if (id(p) in free) == apart] for apart in (False, True)]
        groups = [{"params": parts[0]}, *([{"params": parts[1], "weight_decay": 0.0}] if free else [])]
        optimizer = _FLAT[optim](groups, **s)
        normalize_weights_(model)
        register_unit_norm(optimizer, model)
        return optimizer, []
    own = {key: s[key] for key in ("lr", "lr_manifold", "weight_decay", "grad_clip", "ortho")}
    on_sphere = param_groups(model, example_input=example_input, **own)
    notes = list(on_sphere.notes)
    if not any(group["manifold"] for group in on_sphere):
        notes.append("no weight of this network is scale-invariant: all are updated by SGD with momentum")
    if optim == "sgdg":
        return SGDG(on_sphere, momentum=s["momentum"], nesterov=s["nesterov"]), notes
    return AdamG(on_sphere, betas=(s["momentum"], s["beta2"]), nesterov=s["nesterov"]), notes
