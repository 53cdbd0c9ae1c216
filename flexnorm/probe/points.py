"""From a layer's output to points in R^d, a fixed random subset of them."""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn

Samples = Literal["position", "image"]

_CHANNELS_LAST = (nn.Linear, nn.Bilinear, nn.Embedding, nn.MultiheadAttention, nn.RNNBase)


def channel_axis(module: nn.Module) -> int:
    """The axis of the channels of ``module``: the last for layers that work on it (LayerNorm, Linear), else 1."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return -1 if len(module.normalized_shape) == 1 else 1
    return -1 if isinstance(module, _CHANNELS_LAST) else 1


def take_points(
    output: Tensor, axis: int, samples: Samples, *, limit: int | None = None, layer: str = "", seed: int = 0
) -> Tensor:
    """Points of an output, copied: all of them or a fixed random subset.

    Args:
        output: (N, C, *spatial), or with the channels on another axis.
        axis: Axis of the channels.
        samples: ``"position"``: every position of every input is a point in R^C; ``"image"``: every input is one point.
        limit: At most so many points, drawn by a private generator: the same for the same layer, seed and number of
            points, hence before and after a step and in a resumed run. ``None`` for all.
        layer: Name of the layer.
        seed: Seed of the choice.

    Returns:
        (k, d) in float32 or float64, on the device of the output, independent of its memory.
    """
    total = output.shape[0] if samples == "image" else output.numel() // max(output.shape[axis], 1)
    rows = chosen_rows(total, limit or total, layer, seed).to(output.device)
    if samples == "image":
        points = output.reshape(output.shape[0], -1)[rows]
    else:
        moved = output.movedim(axis, -1)
        # Indexing the axes gathers k points; flattening first would copy the whole output.
        points = moved[torch.unravel_index(rows, moved.shape[:-1])]
    return points.detach().to(torch.promote_types(points.dtype, torch.float32))


@lru_cache(maxsize=4096)
def chosen_rows(total: int, limit: int, layer: str, seed: int) -> Tensor:
    """Which of so many points to keep, in ascending order."""
    if total <= limit:
        return torch.arange(total)
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(layer.encode()))
    return torch.randperm(total, generator=generator)[:limit].sort().values
