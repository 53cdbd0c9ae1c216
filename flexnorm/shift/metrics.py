"""Further numbers of a layer that a monitor can record beside its shift, from the same look at the layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flexnorm._messages import unknown_name

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
    """

    layer: str
    module: nn.Module
    input: Tensor | None
    output: Tensor
    axis: int
    buffers: Mapping[str, Tensor]


Metric = Callable[[Seen], Mapping[str, float | Tensor]]
"""A function from what is seen to numbers by name; the names must be the same for every layer."""


def moments(seen: Seen) -> dict[str, float | Tensor]:
    """Mean, variance and kurtosis of the output, over all positions of the probe.

    Returns:
        ``mean``: root mean square over the channels of their means. ``variance``: mean over the channels of their
        biased variances. ``kurtosis``: mean of E(x - m)^4 / v^2 over the channels that vary (3 for a Gaussian).
        ``dead``: share of the channels that do not vary.
    """
    rows = _channels(seen.output, seen.axis)
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
    rows = _channels(seen.input, seen.axis)
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


def _channels(values: Tensor, axis: int) -> Tensor:
    rows = values.detach().movedim(axis, 0).flatten(1)
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
