"""Batch statistics against those of the population, and channels that carry nothing, from many batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flexnorm.lab.profile.sites import FLAT, RECTIFIERS, Site
from flexnorm.probe import first_tensor, side_forward
from flexnorm.statistics import Pool

_TINY = 1e-12
_FLAT_SHARE = 0.95


def channel_numbers(
    model: nn.Module, batches: Sequence[Tensor], sites: Sequence[Site]
) -> dict[str, dict[str, float | int | None]]:
    """Look at every layer in one side forward per batch, as in training. Leaves no trace in the model.

    Args:
        model: The model.
        batches: Disjoint batches of the size that the training has, (M, *) each; noise needs at least two.
        sites: The layers.

    Returns:
        By name of the site, ``noise``, ``staleness``, ``dead`` and ``saturated`` of
        :class:`flexnorm.lab.profile.LayerProfile`; ``None`` for what could not be measured.
    """
    places = {site.name: site for site in sites}
    seen: dict[str, dict[str, list[Tensor]]] = {name: defaultdict(list) for name in places}

    def look(name: str, _: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        taken, given, site = first_tensor(inputs), first_tensor(output), places.get(name)
        if site is None or given is None:
            return
        numbers: dict[str, Tensor] = {}
        if taken is not None and taken.ndim > 1 and taken.shape[site.axis] == site.channels:
            numbers["var"], numbers["mean"] = torch.var_mean(_channels(taken, site.axis), dim=1, correction=0)
        rows = _channels(given, site.axis)
        numbers["low"], numbers["high"] = rows.aminmax(dim=1)
        if site.activation is not None and type(site.activation) in FLAT:
            low, high = FLAT[type(site.activation)]
            low, high = getattr(site.activation, "min_val", low), getattr(site.activation, "max_val", high)
            numbers["flat"] = ((rows <= low) | (rows >= high)).float().mean(1)
        for key, value in numbers.items():
            seen[name][key].append(value)

    for batch in batches:
        side_forward(model, batch, {site.name.split("#")[0]: site.module for site in sites}, look)
    return {
        name: _judge({key: torch.stack(values) for key, values in found.items()}, places[name])
        for name, found in seen.items()
    }


def statistics_error(mean: Tensor, var: Tensor) -> float | None:
    r"""Error of a standardized activation because each batch has its own statistics.

    $\sqrt{\mathrm{Var}(\mu_B) + \mathrm{Var}(\sigma_B)} / \sigma$, root mean square over channels and batches, with the
    population's moments pooled from the batches. For n independent Gaussian values per channel it is
    $\sqrt{3 / (2 n)}$.

    Args:
        mean: (B, C) means of the batches.
        var: (B, C) biased variances of the batches.

    Returns:
        In standard deviations of the population; ``None`` with less than two batches, or where no channel varies.
    """
    if len(mean) < 2:
        return None
    population = _pooled(mean, var).var
    alive = population > _TINY
    if not bool(alive.any()):
        return None
    ratio = (var.double() / population.clamp_min(_TINY)).sqrt() - 1
    error = mean.double().var(0, correction=1) / population.clamp_min(_TINY) + ratio.square().mean(0)
    return float(error[alive].mean().sqrt())


def _judge(found: dict[str, Tensor], site: Site) -> dict[str, float | int | None]:
    numbers: dict[str, float | int | None] = dict.fromkeys(("noise", "staleness", "dead", "saturated"))
    if "mean" in found and bool(found["mean"].isfinite().all()):
        numbers["noise"] = statistics_error(found["mean"], found["var"])
        numbers["staleness"] = _staleness(_pooled(found["mean"], found["var"]), site.module)
    if "low" in found:
        low, high = found["low"].amin(0), found["high"].amax(0)
        # Rounding of a constant channel leaves a range of a few eps.
        silent = high - low <= 8 * torch.finfo(low.dtype).eps * torch.maximum(low.abs(), high.abs())
        if isinstance(site.activation, RECTIFIERS):
            silent |= high <= getattr(site.activation, "threshold", 0.0)
        numbers["dead"] = int(silent.sum())
    if "flat" in found:
        numbers["saturated"] = int((found["flat"].mean(0) >= _FLAT_SHARE).sum())
    return numbers


def _staleness(pool: Pool, module: nn.Module) -> float | None:
    """How far the running statistics of a layer are off the population's, in its standard deviations."""
    mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if mean is None or var is None:
        return None
    population = pool.var.clamp_min(_TINY)
    off = (mean.to(pool.mean) - pool.mean).square() / population
    ratio = (var.to(pool.mean) / population).sqrt() - 1
    return float((off + ratio.square())[population > _TINY].mean().sqrt())


def _pooled(mean: Tensor, var: Tensor) -> Pool:
    """The moments of the population from those of equally large batches, (B, C) each."""
    pool = Pool(mean.shape[1], mean.device)
    for part in zip(mean, var, strict=True):
        pool.add(1, *part)
    return pool


def _channels(values: Tensor, axis: int) -> Tensor:
    """(N, C, *) as (C, values), in float32 at least."""
    values = values.unsqueeze(-1) if values.ndim == 1 else values
    rows = values.detach().movedim(axis, 0).flatten(1)
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
