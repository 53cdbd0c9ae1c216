"""What the layers are measured beside, written out in plain operations of torch: each normalization as its definition
reads, and the ways in which language models, ConvNeXt and graph libraries compute theirs today.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

EPS = 1e-5


class Place(NamedTuple):
    """Where a normalization stands: the shape of its input and the axis of the channels, 1 or -1."""

    shape: tuple[int, ...]
    axis: int = 1

    @property
    def channels(self) -> int:
        return self.shape[self.axis]

    @property
    def ndims(self) -> int:
        return len(self.shape)

    def axes(self, over: str) -> tuple[int, ...]:
        """The axes that statistics are taken over: of the "batch", of each "sample", its "positions", its "channels".

        Channels last, each position is a sample of its own.
        """
        every, channel = range(self.ndims), self.axis % self.ndims
        if over == "channels" or (over == "sample" and self.axis == -1):
            return (channel,)
        return tuple(a for a in every if (a or over == "batch") and (a != channel or over == "sample"))

    def spread(self, table: Tensor) -> Tensor:
        """A table (C,) as it broadcasts over the input."""
        return table if self.axis == -1 else table.view(-1, *[1] * (self.ndims - 2))


class Standardize(nn.Module):
    """Subtract the mean, divide by the standard deviation, weight and bias per channel."""

    def __init__(self, place: Place, over: str = "batch") -> None:
        super().__init__()
        self.place, self.over = place, place.axes(over)
        self.weight, self.bias = nn.Parameter(torch.ones(place.channels)), nn.Parameter(torch.zeros(place.channels))

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean(self.over, keepdim=True), x.var(self.over, correction=0, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.statistics(x)
        xhat = (x - mean) / (var + EPS).sqrt()
        return self.place.spread(self.weight) * xhat + self.place.spread(self.bias)


class Grouped(Standardize):
    """Group normalization of images."""

    def __init__(self, place: Place, groups: int) -> None:
        super().__init__(place, "sample")
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.unflatten(1, (self.groups, -1))
        over = tuple(range(2, grouped.dim()))
        mean, var = grouped.mean(over, keepdim=True), grouped.var(over, correction=0, keepdim=True)
        xhat = ((grouped - mean) / (var + EPS).sqrt()).flatten(1, 2)
        return self.place.spread(self.weight) * xhat + self.place.spread(self.bias)


class Mixed(Standardize):
    """Half statistics of the batch, half of each sample."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.sample = place.axes("sample")

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = super().statistics(x)
        return (mean + x.mean(self.sample, keepdim=True)) / 2, (
            var + x.var(self.sample, correction=0, keepdim=True)
        ) / 2


class Population(Standardize):
    """Population normalization: a bias-corrected moving average of the statistics, differentiated as the batch's.

    Batch renormalization without limits: the value of the population, the derivative of the batch.
    """

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.register_buffer("sums", torch.zeros(2, place.channels))
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.statistics(x)
        with torch.no_grad():
            self.steps += 1
            self.sums.mul_(0.9).add_(torch.stack([mean.flatten(), var.flatten()]), alpha=0.1)
            kept = self.sums / (1 - 0.9**self.steps)
            kept_mean, kept_std = self.place.spread(kept[0]), (self.place.spread(kept[1]) + EPS).sqrt()
            std = (var + EPS).sqrt()
            r, d = std / kept_std, (mean - kept_mean) / kept_std
        xhat = (x - mean) / (var + EPS).sqrt() * r + d
        return self.place.spread(self.weight) * xhat + self.place.spread(self.bias)


class Unitized(Standardize):
    """Unitized batch normalization, halfway."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.sample = place.axes("sample")
        self.positions = 1 if place.axis == -1 else torch.Size(place.shape[2:]).numel()
        self.alpha = nn.Parameter(torch.full((place.channels,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.statistics(x)
        xhat = (x - mean) / (var + EPS).sqrt()
        norm = (xhat.square().sum(self.sample, keepdim=True) / self.positions**2 + EPS).rsqrt()
        weight, bias, alpha = (self.place.spread(p) for p in (self.weight, self.bias, self.alpha))
        return weight * xhat * (alpha * norm + 1 - alpha) + bias


class RMS(nn.Module):
    """Root mean square normalization as language models compute it in eager mode: in float32, then the weight."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place, self.over = place, place.axes("sample")
        self.weight = nn.Parameter(torch.ones(place.channels))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(self.over, keepdim=True) + EPS)
        return self.place.spread(self.weight) * wide.to(x.dtype)


class Permuted(nn.Module):
    """Layer normalization over the channels at each position of images, as ConvNeXt in timm: there and back."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(place.channels)), nn.Parameter(torch.zeros(place.channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = nn.functional.layer_norm(x, (x.shape[-1],), self.weight, self.bias, EPS)
        return x.permute(0, 3, 1, 2)


class OverTokens(nn.Module):
    """Torch's BatchNorm1d for channels last of any number of axes: over all tokens as rows."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(place.channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.view(-1, x.shape[-1])).view_as(x)


class Masked(Standardize):
    """Batch normalization of tokens by the statistics of those that count."""

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        counted = x[mask_of(self.place, x.device)]
        return counted.mean(0), counted.var(0, correction=0)


class EachGraph(Standardize):
    """Normalization of each graph by its own statistics, of each channel or over all, as graph libraries scatter them.

    Rows of one graph have one index.
    """

    def __init__(self, place: Place, over_channels: bool) -> None:
        super().__init__(place)
        self.over_channels = over_channels

    def forward(self, x: Tensor) -> Tensor:
        index = segments_of(self.place, x.device)
        graphs = self.place.shape[0] // NODES
        count = x.new_zeros(graphs).index_add_(0, index, x.new_ones(len(x))).unsqueeze(1)
        mean = self._mean(x, index, count)
        centered = x - mean[index]
        var = self._mean(centered.square(), index, count)
        return centered / (var + EPS).sqrt()[index] * self.weight + self.bias

    def _mean(self, x: Tensor, index: Tensor, count: Tensor) -> Tensor:
        mean = x.new_zeros(len(count), x.shape[1]).index_add(0, index, x) / count
        return mean.mean(1, keepdim=True) if self.over_channels else mean


NODES = 32


def segments_of(place: Place, device: torch.device | str = "cpu") -> Tensor:
    """The graph of each row: about 32 rows each, not all alike, in order."""
    rows = place.shape[0]
    generator = torch.Generator().manual_seed(0)
    every = torch.arange(rows // NODES)
    more = torch.randint(rows // NODES, (rows - len(every),), generator=generator)
    return torch.cat([every, more]).sort().values.to(device)


def mask_of(place: Place, device: torch.device | str = "cpu") -> Tensor:
    """Which tokens of a batch of sequences (B, T) count: the first ones of each, half to all of them."""
    batch, length = place.shape[:2]
    lengths = torch.linspace(length / 2, length, batch).round()
    return (torch.arange(length) < lengths.unsqueeze(1)).to(device)
