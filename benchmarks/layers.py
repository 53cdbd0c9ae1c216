"""The layers that are measured, by name: those of flexnorm, rules as a user writes them, torch's, and others in use.

`PLAIN` has the plain composition of each, which is timed beside it and has to give the same values and gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import compositions as plain
from benchmarks.compositions import EPS, Place
from flexnorm import FlexNorm, Moments
from flexnorm import nn as fx

Maker = Callable[[Place], nn.Module]


def ours(kind: str, **options: Any) -> Maker:
    """A layer of flexnorm for the place's number of axes, channel axis given only where it is not the first."""

    def make(place: Place) -> nn.Module:
        layer = getattr(fx, f"{kind}{max(1, place.ndims - 2) if place.axis == 1 else 1}d")
        axis = {} if place.axis == 1 else {"channel_axis": place.axis}
        return layer(place.channels, **axis, **options)

    return make


def unitized(place: Place) -> nn.Module:
    """Halfway between batch normalization and unit norm."""
    layer = ours("UnitizedBatchNorm")(place)
    nn.init.constant_(layer.alpha, 0.5)  # type: ignore[arg-type]
    return layer


def torchs(kind: str) -> Maker:
    """Torch's layer, over all tokens as rows where the channels are last."""

    def make(place: Place) -> nn.Module:
        if kind == "BatchNorm" and place.axis == -1 and place.ndims > 2:
            return plain.OverTokens(place)
        return getattr(nn, f"{kind}{max(1, place.ndims - 2)}d")(place.channels)

    return make


def over_last(kind: type[nn.Module], images: Maker | None = None) -> Maker:
    """A layer in the form of nn.LayerNorm: over the channels of features and tokens; of images as said."""
    return lambda place: images(place) if images and place.ndims == 4 else kind(place.channels, eps=EPS)


class UsersBatch(FlexNorm):
    """Batch normalization as docs/rules.md writes it, in a layer of a user's own."""

    ndims = (2, 3, 4)

    def rule(self, moments: Moments) -> tuple[Tensor, Tensor]:
        mean, var = self.batch_or_running(moments)
        scale = self.weight * (var + self.eps).rsqrt()
        return scale, self.bias - mean * scale


class UsersUnitized(FlexNorm):
    """Unitized batch normalization as docs/rules.md writes it."""

    ndims = (2, 3, 4)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.alpha = nn.Parameter(torch.full((self.num_features,), 0.5))

    def rule(self, moments: Moments) -> tuple[Tensor, Tensor]:
        mean, var = self.batch_or_running(moments)
        square = ((moments.var + (moments.mean - mean) ** 2) / (var + self.eps)).sum(1, keepdim=True) / moments.count
        gain = self.alpha * (square + self.eps).rsqrt() + 1 - self.alpha
        scale = gain * self.weight * (var + self.eps).rsqrt()
        return scale, self.bias - mean * scale


class UsersLayer(FlexNorm):
    """Layer normalization as docs/rules.md writes it."""

    ndims = (2, 3, 4)

    def rule(self, moments: Moments) -> tuple[Tensor, Tensor]:
        pooled = moments.pool("channels")
        scale = self.weight * (pooled.var + self.eps).rsqrt()
        return scale, self.bias - pooled.mean * scale


class UsersRMS(FlexNorm):
    """Root mean square normalization as docs/rules.md writes it."""

    ndims = (2, 3, 4)

    def rule(self, moments: Moments) -> tuple[Tensor, Tensor]:
        scale = self.weight * (moments.pool("channels").mean_square + self.eps).rsqrt()
        return scale, torch.zeros(1, device=scale.device)


class UsersMixed(FlexNorm):
    """A rule that the package does not have: half statistics of the batch, half of each sample."""

    ndims = (2, 3, 4)

    def rule(self, moments: Moments) -> tuple[Tensor, Tensor]:
        batch, sample = moments.pool("batch"), moments.pool("channels")
        scale = self.weight * (0.5 * batch.var + 0.5 * sample.var + self.eps).rsqrt()
        return scale, self.bias - (0.5 * batch.mean + 0.5 * sample.mean) * scale


def users(layer: type[FlexNorm], **options: Any) -> Maker:
    def make(place: Place) -> nn.Module:
        axis = {} if place.axis == 1 else {"channel_axis": place.axis}
        return layer(place.channels, **axis, **options)

    return make


class Given(nn.Module):
    """A layer of flexnorm that is called with the mask or the segments of its place."""

    def __init__(self, norm: nn.Module, **given: Tensor) -> None:
        super().__init__()
        self.norm = norm
        for name, value in given.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, **dict(self.named_buffers(recurse=False)))


def of_graphs(kind: str) -> Maker:
    return lambda place: Given(ours(kind)(place), segments=plain.segments_of(place))


def liger(place: Place) -> nn.Module:
    from liger_kernel.transformers import LigerRMSNorm

    return LigerRMSNorm(place.channels, eps=EPS)


LAYERS: dict[str, Maker] = {
    "batch": ours("BatchNorm"),
    "unitized": unitized,
    "population": ours("PopulationNorm"),
    "population (estimated)": ours("PopulationNorm", statistics="estimated"),
    "layer": over_last(fx.LayerNorm, ours("LayerNorm")),
    "layer at each position": ours("LayerNorm", per_position=True),
    "rms": over_last(fx.RMSNorm, ours("RMSNorm")),
    "group(32)": lambda place: fx.GroupNorm(32, place.channels),
    "instance": ours("InstanceNorm", affine=True),
    "batch, masked": lambda place: Given(ours("BatchNorm")(place), mask=plain.mask_of(place)),
    "layer of each graph": of_graphs("LayerNorm"),
    "instance of each graph": of_graphs("InstanceNorm"),
    "user's batch": users(UsersBatch),
    "user's unitized": users(UsersUnitized),
    "user's layer": users(UsersLayer),
    "user's rms": users(UsersRMS, bias=False),
    "user's mixed": users(UsersMixed),
    "nn.BatchNorm": torchs("BatchNorm"),
    "nn.LayerNorm": over_last(nn.LayerNorm),
    "nn.RMSNorm": over_last(nn.RMSNorm),
    "nn.RMSNorm over C, H, W": lambda place: nn.RMSNorm(place.shape[1:], eps=EPS),
    "nn.GroupNorm(1)": lambda place: nn.GroupNorm(1, place.channels),
    "nn.GroupNorm(32)": lambda place: nn.GroupNorm(32, place.channels),
    "nn.InstanceNorm": lambda place: nn.InstanceNorm2d(place.channels, affine=True),
    "language models' RMSNorm": plain.RMS,
    "timm's LayerNorm2d": plain.Permuted,
    "Liger's RMSNorm": liger,
}

PLAIN: dict[str, Maker] = {
    "batch": plain.Standardize,
    "unitized": plain.Unitized,
    "population": plain.Population,
    "layer": lambda place: plain.Standardize(place, "sample"),
    "layer at each position": lambda place: plain.Standardize(place, "channels"),
    "rms": plain.RMS,
    "group(32)": lambda place: plain.Grouped(place, 32),
    "instance": lambda place: plain.Standardize(place, "positions"),
    "batch, masked": plain.Masked,
    "layer of each graph": lambda place: plain.EachGraph(place, over_channels=True),
    "instance of each graph": lambda place: plain.EachGraph(place, over_channels=False),
    "user's batch": plain.Standardize,
    "user's unitized": plain.Unitized,
    "user's layer": lambda place: plain.Standardize(place, "sample"),
    "user's rms": plain.RMS,
    "user's mixed": plain.Mixed,
}

# Statistics over the batch keep float32 parameters in mixed precision; the others take the type of their input.
FLOAT32 = ("batch", "unitized", "population", "nn.BatchNorm")
