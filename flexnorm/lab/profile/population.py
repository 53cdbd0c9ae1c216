"""Batch statistics against those of the population, and channels that carry nothing, from many batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flexnorm.lab.profile.sites import FLAT, FLAT_BEYOND, RECTIFIERS, Site
from flexnorm.probe import first_tensor, side_forward

_TINY = 1e-12
_FLAT_SHARE = 0.95


@dataclass(frozen=True)
class Census:
    """What many batches say about one layer; ``None`` where it could not be measured.

    Attributes:
        noise: See :class:`flexnorm.lab.profile.LayerProfile`.
        staleness: See there.
        dead: See there.
        saturated: See there.
    """

    noise: float | None
    staleness: float | None
    dead: int | None
    saturated: int | None


@dataclass
class _Tally:
    mean: list[Tensor] = field(default_factory=list)
    var: list[Tensor] = field(default_factory=list)
    low: list[Tensor] = field(default_factory=list)
    high: list[Tensor] = field(default_factory=list)
    flat: list[Tensor] = field(default_factory=list)


def census(model: nn.Module, batches: Sequence[Tensor], sites: Sequence[Site]) -> dict[str, Census]:
    """Look at every layer in one side forward per batch, as in training. Leaves no trace in the model.

    Args:
        model: The model.
        batches: Disjoint batches of the size that the training has, (M, *) each; noise needs at least two.
        sites: The layers.

    Returns:
        By name of the site.
    """
    tallies = {site.name: _Tally() for site in sites}
    places = {site.name: site for site in sites}
    layers = {site.name.split("#")[0]: site.module for site in sites}

    def look(name: str, _: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        taken, given, tally = first_tensor(inputs), first_tensor(output), tallies.get(name)
        if tally is None or given is None:
            return
        if taken is not None and taken.ndim > 1 and taken.shape[places[name].axis] == places[name].channels:
            var, mean = torch.var_mean(_channels(taken, places[name].axis), dim=1, correction=0)
            tally.mean.append(mean)
            tally.var.append(var)
        rows = _channels(given, places[name].axis)
        tally.low.append(rows.amin(1))
        tally.high.append(rows.amax(1))
        flat = _flat(rows, places[name].activation)
        if flat is not None:
            tally.flat.append(flat)

    for batch in batches:
        side_forward(model, batch, layers, look)
    return {name: _judge(tally, places[name]) for name, tally in tallies.items()}


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
    mean, var = mean.double(), var.double()
    between = mean.var(0, correction=1)
    population = var.mean(0) + mean.var(0, correction=0)
    alive = population > _TINY
    if not bool(alive.any()):
        return None
    ratio = (var / population.clamp_min(_TINY)).sqrt() - 1
    error = between / population.clamp_min(_TINY) + ratio.square().mean(0)
    return float(error[alive].mean().sqrt())


def _judge(tally: _Tally, site: Site) -> Census:
    noise = staleness = None
    if tally.mean and bool(torch.isfinite(torch.stack(tally.mean)).all()):
        mean, var = torch.stack(tally.mean), torch.stack(tally.var)
        noise, staleness = statistics_error(mean, var), _staleness(mean.double(), var.double(), site.module)
    if not tally.low:
        return Census(noise, staleness, None, None)
    low, high = torch.stack(tally.low).amin(0), torch.stack(tally.high).amax(0)
    # Rounding of a constant channel leaves a range of a few eps.
    silent = high - low <= 8 * torch.finfo(low.dtype).eps * torch.maximum(low.abs(), high.abs())
    if isinstance(site.activation, RECTIFIERS):
        silent |= high <= getattr(site.activation, "threshold", 0.0)
    saturated = int((torch.stack(tally.flat).mean(0) >= _FLAT_SHARE).sum()) if tally.flat else None
    return Census(noise, staleness, int(silent.sum()), saturated)


def _staleness(mean: Tensor, var: Tensor, module: nn.Module) -> float | None:
    kept = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if kept[0] is None or kept[1] is None:
        return None
    population = (var.mean(0) + mean.var(0, correction=0)).clamp_min(_TINY)
    off = (kept[0].to(mean) - mean.mean(0)).square() / population
    ratio = (kept[1].to(mean) / population).sqrt() - 1
    return float((off + ratio.square())[population > _TINY].mean().sqrt())


def _flat(rows: Tensor, activation: nn.Module | None) -> Tensor | None:
    """Share of the values of each channel where the activation does not move; ``None`` for one that always does."""
    kind = type(activation)
    if kind in FLAT:
        return (rows.abs() > FLAT[kind]).float().mean(1)
    if kind in FLAT_BEYOND:
        low, high = FLAT_BEYOND[kind]
        low, high = getattr(activation, "min_val", low), getattr(activation, "max_val", high)
        return ((rows <= low) | (rows >= high)).float().mean(1)
    return None


def _channels(values: Tensor, axis: int) -> Tensor:
    values = values.unsqueeze(-1) if values.ndim == 1 else values
    rows = values.detach().movedim(axis, 0).flatten(1)
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
