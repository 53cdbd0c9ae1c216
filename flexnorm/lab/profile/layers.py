"""The layers of a model on some images: where they lie, their batch statistics and dead channels, their bounds."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flexnorm.nn import needs_batch
from flexnorm.probe import (
    Selection,
    channel_axes,
    channel_axis,
    channels_first,
    first_tensor,
    normalizes,
    select_layers,
    side_forward,
)
from flexnorm.shift import layer_bound, second_moment_excess
from flexnorm.statistics import Pool

RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Threshold)
"""Activations that are 0 for every argument that is not positive (Threshold: as far as its threshold is 0)."""

FLAT: dict[type[nn.Module], tuple[float, float]] = {
    nn.Sigmoid: (-4.6, 4.6),
    nn.Tanh: (-2.65, 2.65),
    nn.Softsign: (-99.0, 99.0),
    nn.Hardtanh: (-1.0, 1.0),
    nn.Hardsigmoid: (-3.0, 3.0),
}
"""Below the first and above the second value an activation is within 1 % of its limits, or does not move at all."""

_ACTIVATIONS = (*RECTIFIERS, *FLAT)


@dataclass
class Site:
    """One call of one layer.

    Attributes:
        name: Name of the layer; ``#2`` and so on is appended for further calls.
        module: The layer.
        axis: Axis of the channels of its output.
        channels: Number of channels of its output.
        positions: Spatial positions of its output.
        weight: Name of the weight used last before the layer, or of its own.
        mixes_batch: Whether it normalizes with the statistics of the training batch.
        activation: The activation that takes its output as it is, if it is one of those known here.
    """

    name: str
    module: nn.Module
    axis: int
    channels: int
    positions: int
    weight: str | None
    mixes_batch: bool
    activation: nn.Module | None = None


def watched(model: nn.Module, layers: Selection | None) -> Selection:
    """Return what to watch: as asked for, else the normalization layers, else all layers with a weight."""
    if layers is not None:
        return layers
    if any(normalizes(module) for module in model.modules()):
        return "norm"
    return lambda _, module: own_weight(module) is not None


def own_weight(module: nn.Module) -> str | None:
    """Return the name of the first own parameter with two or more axes, or ``None``."""
    return next((name for name, p in module.named_parameters(recurse=False) if p.ndim >= 2), None)


def find_sites(model: nn.Module, batch: Tensor, layers: Selection) -> list[Site]:
    """Return the calls of the chosen layers in one forward of a batch (N, C, H, W). Leaves no trace in the model."""
    chosen = select_layers(model, layers)
    taps = {
        name: module
        for name, module in model.named_modules()
        if name in chosen or own_weight(module) is not None or isinstance(module, _ACTIVATIONS)
    }
    untold = {name: module for name, module in chosen.items() if channel_axis(module) is None}
    axes = channel_axes(model, batch, untold) if untold else {}
    found: list[tuple[Site, Tensor, int]] = []
    last: str | None = None

    def look(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal last
        own, base = own_weight(module), name.split("#")[0]
        if own is not None:
            last = f"{base}.{own}".lstrip(".")
        taken = first_tensor(inputs)
        if isinstance(module, _ACTIVATIONS) and taken is not None:
            # A residual sum may be written into the output of a layer: then it is not the output that the activation
            # takes, though it is the same tensor. The activation itself may have written into it once.
            now = taken._version - bool(getattr(module, "inplace", False))
            for site, kept, version in found:
                if kept is taken and version == now and site.activation is None:
                    site.activation = module
        tensor = first_tensor(output)
        if base in chosen and tensor is not None:
            axis = channel_axis(module, tensor.ndim) or axes.get(name) or 1
            channels = tensor.shape[axis] if tensor.ndim > 1 else 1
            positions = max(1, tensor[0].numel() // max(channels, 1))
            mixes = needs_batch(module) and (module.training or getattr(module, "running_mean", None) is None)
            found.append((Site(name, module, axis, channels, positions, last, mixes), tensor, tensor._version))

    side_forward(model, batch, taps, look)
    return [site for site, _, _ in found]


_TINY = 1e-12
_FLAT_SHARE = 0.95


def channel_numbers(
    model: nn.Module, batches: Sequence[Tensor], sites: Sequence[Site]
) -> dict[str, dict[str, float | int | None]]:
    """Look at every layer in one side forward per batch, as in training. Leaves no trace in the model.

    The ``batches`` (M, *) are disjoint and as large as those of the training; noise needs at least two. Returns by name
    of the site ``noise``, ``staleness``, ``dead`` and ``saturated`` of :class:`LayerProfile`, as far as measurable.
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


class BoundWatch:
    """Keeps the layers as they were before an update and bounds how far the update can have moved their outputs.

    Layers in training normalize by the moments of the probe itself, so the noise is 0; layers with population
    statistics, and frozen ones, are bounded with the noise that the statistics they use have on the probe. Where the
    guard of a population layer acted, they are others, and this update is passed over; so are layers of a kind for
    which no bound is known. ``found`` has the bounds so far by name of the site.
    """

    def __init__(self, model: nn.Module, probe: Tensor, sites: Sequence[Site]) -> None:
        self._model, self._probe = model, probe
        self._sites = [site for site in sites if bounded(site.module)]
        self._fixed = {site.name: site.module for site in self._sites if not site.mixes_batch}
        self._kept: dict[str, nn.Module] = {}
        self._noise: dict[str, Tensor] = {}
        self.found: dict[str, list[float]] = defaultdict(list)

    def before(self) -> None:
        """Keep the layers as they are before an update."""
        self._kept = {site.name: copy.deepcopy(site.module) for site in self._sites}
        self._noise = self._noises()

    def after(self) -> None:
        """Add the bounds of the update since :meth:`before`."""
        now = self._noises()
        for site in self._sites:
            name = site.name
            if name in self._fixed and not (name in now and name in self._noise):
                continue
            noise: dict[str, Any] = {"noise": self._noise.get(name, 0.0), "noise_after": now.get(name, 0.0)}
            self.found[name].append(layer_bound(self._kept[name], site.module, positions=site.positions, **noise))

    def _noises(self) -> dict[str, Tensor]:
        """Noise, on the probe, of the statistics of the layers that do not use the probe's own."""
        found: dict[str, Tensor] = {}

        def look(name: str, module: nn.Module, inputs: tuple[Any, ...], _: Any) -> None:
            x = first_tensor(inputs)
            if name in self._fixed and x is not None and float(getattr(module, "clipped", 0.0)) == 0:
                var, mean = torch.var_mean(
                    channels_first(module, x.detach()).movedim(1, 0).flatten(1).double(), dim=1, correction=0
                )
                # A population layer lets the batch into its statistics first; what it used is in it afterwards.
                used_mean, used_var = (getattr(module, key).to(mean) for key in ("running_mean", "running_var"))
                eps = float(getattr(module, "eps", 0.0))
                found[name] = second_moment_excess(mean, var, used_mean, used_var, eps)

        if self._fixed:
            layers = {name.split("#")[0]: module for name, module in self._fixed.items()}
            side_forward(self._model, self._probe, layers, look)
        return found


def bounded(module: nn.Module) -> bool:
    """Return whether a layer standardizes, or unitizes, so that its parameters bound its outputs."""
    try:
        layer_bound(module)
    except TypeError:
        return False
    return True
