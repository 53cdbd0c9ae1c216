"""ShiftMonitor: internal covariate shift of any model, layer by layer, while it trains, and without a trace in it.

Measure: Huang & Yu (CVPR 2020, arXiv 2001.02814), the Wasserstein-1 distance between the distributions of a layer's
output before and after an update. Deviations: both distributions are those of the same probe inputs with the same noise
(otherwise the bias of empirical transport in high dimension hides the shift), and the distance is also given relative
to the spread of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

from flexnorm._messages import unknown_name
from flexnorm.probe import (
    Mask,
    Masks,
    Mode,
    Samples,
    Selection,
    call,
    channel_axes,
    channel_axis,
    check_watchable,
    detached,
    first_tensor,
    select,
    select_layers,
    side_forward,
    take_points,
    unread_norm,
)
from flexnorm.shift.base import Anchor, Every, Monitor, Snapshot, check_count
from flexnorm.shift.records import ShiftRecord, measure_shift

_NAN = float("nan")


@dataclass(frozen=True)
class Seen:
    """One call of a layer, as a metric sees it. Do not keep the tensors: the next layer may overwrite them.

    Attributes:
        layer: Name of the layer.
        module: The layer.
        input: Its first floating-point tensor argument, or ``None``.
        output: Its first floating-point tensor result.
        axis: Axis of the channels in both.
        buffers: The layer's own buffers as they were before the call (in training mode the call changes copies of
            them).
        mask: What counts, of the shape of ``output`` without the channels; ``None`` for everything.
    """

    layer: str
    module: nn.Module
    input: Tensor | None
    output: Tensor
    axis: int
    buffers: Mapping[str, Tensor]
    mask: Tensor | None = None


Metric = Callable[[Seen], Mapping[str, float | Tensor]]
"""A function from what is seen to numbers by name; the names must be the same for every layer."""


def moments(seen: Seen) -> dict[str, float | Tensor]:
    """Mean, variance and kurtosis of the output, over all positions of the probe.

    Returns:
        ``mean``: root mean square over the channels of their means. ``variance``: mean over the channels of their
        biased variances. ``kurtosis``: mean of E(x - m)^4 / v^2 over the channels that vary (3 for a Gaussian).
        ``dead``: share of the channels that do not vary.
    """
    rows = _channels(seen.output, seen)
    mean = rows.mean(1, keepdim=True)
    square = (rows - mean).square()
    variance = square.mean(1)
    # Rounding of a constant channel leaves a variance of about (eps * mean)^2.
    alive = variance > (4 * torch.finfo(rows.dtype).eps * mean.squeeze(1)).square()
    kurtosis = (square / torch.where(alive, variance, 1).unsqueeze(1)).square().mean(1)
    return {
        "mean": mean.square().mean().sqrt(),
        "variance": variance.mean(),
        "kurtosis": kurtosis[alive].mean() if bool(alive.any()) else _NAN,
        "dead": 1 - alive.to(rows.dtype).mean(),
    }


def noise(seen: Seen) -> dict[str, float | Tensor]:
    """How far the statistics of the probe batch are from the layer's running statistics.

    It shrinks like 1 / sqrt(number of values per channel), and not below the lag of the moving average. Layers without
    running statistics give NaN.

    Returns:
        ``noise_mean``: root mean square over the channels of (m - mu) / sigma. ``noise_variance``: root mean square of
        v / sigma^2 - 1. ``noise``: mean over the channels of E xhat^2 - 1 if the batch were standardized by the running
        statistics, see :func:`flexnorm.shift.second_moment_excess`.
    """
    mean, var = seen.buffers.get("running_mean"), seen.buffers.get("running_var")
    if seen.input is None or mean is None or var is None:
        return {"noise_mean": _NAN, "noise_variance": _NAN, "noise": _NAN}
    rows = _channels(seen.input, seen)
    scale = var.float() + float(getattr(seen.module, "eps", 0.0))
    off = (rows.mean(1) - mean).square() / scale
    ratio = rows.var(1, correction=0) / scale
    return {
        "noise_mean": off.mean().sqrt(),
        "noise_variance": (ratio - 1).square().mean().sqrt(),
        "noise": (off + ratio - 1).mean(),
    }


METRICS: dict[str, Metric] = {"moments": moments, "noise": noise}


def as_metrics(metrics: Iterable[str | Metric]) -> list[Metric]:
    """Metrics from names and functions; ValueError for an unknown name."""
    wanted = [metrics] if isinstance(metrics, str) else list(metrics)
    for metric in wanted:
        if isinstance(metric, str) and metric not in METRICS:
            raise ValueError(unknown_name("metric", metric, METRICS))
    return [METRICS[metric] if isinstance(metric, str) else metric for metric in wanted]


def _channels(values: Tensor, seen: Seen) -> Tensor:
    rows = values.detach().movedim(seen.axis, 0).flatten(1)
    if seen.mask is not None and seen.mask.numel() == rows.shape[1]:
        rows = rows[:, seen.mask.flatten() > 0]
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


class ShiftMonitor(Monitor[ShiftRecord]):
    """Measures how far the output distribution of each layer moves as a model trains.

    Args:
        model: Any module, also compiled or wrapped for distributed training; the module inside is what is called.
        probe: The inputs on which the layers are compared, kept as a copy: a tensor (the only argument of the model), a
            tuple (positional) or a dictionary (keyword arguments), on the device of the model. A training batch held
            out for the purpose does well.
        layers: Which layers, in the language of :func:`flexnorm.probe.select`: ``"norm"`` for all normalization layers,
            a name, a glob pattern, ``"re:..."``, a class, a module, a function of (name, module), or a list of these.
        every: When to measure: a number of steps, a list of steps, or a schedule as :class:`EverySteps` is.
        lag: Optimizer steps between the two distributions that are compared.
        anchor: Compare with ``"previous"`` (``lag`` steps earlier), with ``"initial"`` (the start), or ``"both"``.
        metrics: Further numbers to record of each layer: ``"moments"``, ``"noise"``, see :mod:`flexnorm.shift.monitor`,
            or functions of :class:`flexnorm.shift.monitor.Seen`.
        samples: What a point is: ``"position"``, every position of every input a point in R^C; or ``"image"``, every
            input one point in R^(C H W).
        max_samples: At most so many points of each layer, drawn once and for all by a private generator. The exact
            distance costs about n^3: 128 points take about a millisecond, 512 about thirty.
        mode: ``"train"``: layers work as in training (batch statistics, dropout); ``"eval"``: as in evaluation.
        forward: How to call the model on the probe, ``forward(model, probe)``, where the default does not do.
        autocast: Type to run the side forward in under autocast; ``None`` for the state at the call of :meth:`step`.
        channel_dim: Axis of the channels, of all layers, or as a mapping from layers (names, patterns, classes: what
            ``layers`` takes) to axes. By default it is found, layer by layer: see :func:`flexnorm.probe.channel_axes`.
        mask: What counts, where the probe holds padding: the name of an entry of the probe (``"attention_mask"``), a
            function of the probe, a tensor, or a mapping from layers to these, as of :class:`flexnorm.probe.Masks`.
            Only positions where the mask is not 0 are points; of an ``"image"`` they alone are not set to 0.
        sinks: Where else to put each record as soon as it is made: paths ending in ``.csv`` or ``.jsonl``, sinks such
            as :class:`flexnorm.shift.TensorBoardSink`, or functions of a record.
        seed: Seed of the choice of points and of the noise in the side forward.

    Attributes:
        records: All measurements so far, a list of :class:`ShiftRecord`; readable at any time.
        steps: Optimizer steps seen so far.
        layers: Names of the layers that are watched.
        unread: Of those, the norms of which is not known what they compute, with the reason.

    Raises:
        ValueError: No layer matches, or an argument is out of range.
        TypeError: An argument is of the wrong kind.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x = torch.randn(16, 4)
        >>> with ShiftMonitor(model, x, every=1) as monitor:
        ...     for _ in range(3):
        ...         model(x).square().mean().backward()
        ...         optimizer.step()
        ...         new = monitor.step()
        >>> [(record.step, record.layer) for record in monitor.records]
        [(1, '1'), (2, '1'), (3, '1')]
        >>> all(record.lower <= record.w1 <= record.upper for record in monitor.records)
        True
    """

    _kind = ShiftRecord

    def __init__(
        self,
        model: nn.Module,
        probe: Any,
        layers: Selection = "norm",
        *,
        every: Every = 100,
        lag: int = 1,
        anchor: Anchor = "previous",
        metrics: Iterable[str | Metric] = (),
        samples: Samples = "position",
        max_samples: int = 128,
        mode: Mode = "train",
        forward: Callable[[nn.Module, Any], Any] = call,
        autocast: torch.dtype | None = None,
        channel_dim: int | Mapping[Any, int] | None = None,
        mask: Mask = None,
        sinks: Iterable[Any] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(model, every=every, lag=lag, anchor=anchor, sinks=sinks)
        check_count("max_samples", max_samples)
        for name, value, valid in (("samples", samples, get_args(Samples)), ("mode", mode, get_args(Mode))):
            if value not in valid:
                raise ValueError(unknown_name(name, value, valid))
        check_watchable(self._model)
        self._layers = select_layers(self._model, layers)
        self.layers = tuple(self._layers)
        self.unread = {name: why for name, module in self._layers.items() if (why := unread_norm(module))}
        self._probe = detached(probe)
        self._metrics = as_metrics(metrics)
        self._options = {"samples": samples, "max_samples": max_samples, "mode": mode, "seed": seed}
        self._side: dict[str, Any] = {"forward": forward, "mode": mode, "seed": seed, "autocast": autocast}
        self._points = partial(take_points, samples=samples, limit=max_samples, seed=seed)
        self._axes = self._given_axes(channel_dim)
        self._masks = Masks(self._layers, mask)
        self._found: dict[str, int | None] | None = None
        self._numbers: dict[str, dict[str, float]] = {}

    def look(self) -> Snapshot:
        """The points of each layer's output for the probe, (n, d) on the CPU. Changes nothing in the model."""
        points: Snapshot = {}
        numbers: dict[str, dict[str, float | Tensor]] = {}
        refused: list[str] = []
        buffers = {module: dict(module.named_buffers(recurse=False)) for module in self._layers.values()}

        def keep(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is None or tensor.ndim == 0:
                raise ValueError(
                    f"layer {name} ({type(module).__name__}) returns no floating-point tensor with axes to measure"
                )
            tensor = tensor.unsqueeze(-1) if tensor.ndim == 1 else tensor
            axis = self._axis(name, module, tensor)
            if axis is None:
                refused.append(f"{name} ({type(module).__name__}, {tuple(tensor.shape)})")
                return
            mask = self._masks.of(name, self._probe, tensor.movedim(axis, -1).shape[:-1])
            points[name] = self._points(tensor, axis, layer=name, mask=mask)
            if not len(points[name]):
                raise ValueError(f"the mask leaves no point of layer {name}: it is 0 everywhere")
            seen = Seen(name, module, first_tensor(inputs), tensor, axis, buffers[module], mask)
            numbers[name] = {key: value for metric in self._metrics for key, value in metric(seen).items()}

        if self._found is None:
            untold = {n: m for n, m in self._layers.items() if n not in self._axes and channel_axis(m) is None}
            self._found = channel_axes(self._model, self._probe, untold, **self._side) if untold else {}
        side_forward(self._model, self._probe, self._layers, keep, **self._side)
        if refused:
            base = refused[0].split()[0].split("#")[0]
            raise ValueError(
                f"nothing tells which axis of the output of {len(refused)} layers holds the channels: "
                f"{', '.join(refused[:5])}{', ...' if len(refused) > 5 else ''}. Say so, for example by "
                f"channel_dim={{{base!r}: -1}}, or choose other layers"
            )
        if not points:
            raise RuntimeError(f"the forward on the probe called none of the layers {', '.join(self._layers)}")
        self._numbers = {name: {key: float(value) for key, value in row.items()} for name, row in numbers.items()}
        return {name: value.cpu() for name, value in points.items()}

    def _given_axes(self, channel_dim: int | Mapping[Any, int] | None) -> dict[str, int]:
        if not isinstance(channel_dim, Mapping):
            return {} if channel_dim is None else dict.fromkeys(self._layers, channel_dim)
        return {name: axis for key, axis in channel_dim.items() for name in select(self._layers, key, "channel_dim")}

    def _axis(self, name: str, module: nn.Module, output: Tensor) -> int | None:
        """The axis of the channels of a call: as given, as the layer tells, or as it was found at the first look."""
        if (given := self._axes.get(name.split("#")[0])) is not None:
            return given
        told = channel_axis(module, output.ndim)
        return told if told is not None else 1 if output.ndim == 2 else (self._found or {}).get(name)

    def _compare(self, before: Snapshot, now: Snapshot) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for layer, points in now.items():
            if layer in before:
                yield layer, {**vars(measure_shift(before[layer], points)), "metrics": self._numbers[layer]}

    def _config(self) -> dict[str, Any]:
        return {"layers": list(self._layers), **self._options}
