"""How an activation lies in memory, and which backend serves it: decided here and nowhere else."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flexnorm.kernels import gpu, normalization

# Below this many values the compiled kernels are not worth loading (a first load may compile for a second or two).
_SMALL = 1 << 14
# Below this many values a call costs more than its passes: torch's own function of the same norm serves where there is
# one (64 x 1024 features, 8 x 32 x 384 tokens).
_FEW = 1 << 17
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Layout(NamedTuple):
    """An activation as the passes see it."""

    backend: str  # "c", "triton", "torch" or "composed": which implementation of the passes runs
    order: str  # "rows", "cols" or "none", as :func:`memory_order` tells
    size: tuple[int, int, int]  # samples N, channels C, positions P


def memory_order(x: Tensor) -> str:
    """Return "rows" if (N, C, P) is contiguous, "cols" if (N, P, C) is (channels last), "none" for other strides."""
    if x.is_contiguous():
        return "rows"
    last = _CHANNELS_LAST.get(x.dim())
    dense = x.movedim(1, -1).is_contiguous() if last is None else x.is_contiguous(memory_format=last)
    return "cols" if dense else "none"


def layout_of(x: Tensor) -> Layout:
    """Choose the backend for ``x`` (N, C, *spatial) by device, size, type and strides."""
    size = (x.shape[0], x.shape[1], positions_of(x))
    order = memory_order(x)
    if order == "none" or size[2] < 2 or x.numel() == 0:
        return Layout("composed", order, size)
    if gpu.available(x):
        return Layout("triton", order, size)
    if x.device.type != "cpu":
        return Layout("composed", order, size)
    if x.numel() >= _SMALL and normalization.serves(x.dtype):
        return Layout("c", order, size)
    if order == "rows" and x.dtype in (torch.float32, torch.float64):
        return Layout("torch", order, size)
    return Layout("composed", order, size)


def best_by_torch(x: Tensor, most: int = _FEW) -> bool:
    """Whether torch's own function of a norm, if it has one, serves ``x`` on the CPU better than passes and a rule.

    ``most`` is up to how many values it does.
    """
    if x.dtype not in (torch.float32, torch.float64) or x.device.type != "cpu" or x.numel() == 0:
        return False
    return x.numel() < most or normalization.load() is None


def token_layout_of(x: Tensor, channel_axis: int) -> Layout | None:
    """Choose the backend for ``x`` seen as tokens: (N, C, *spatial) if ``channel_axis`` is 1, (..., C) if it is -1.

    ``None`` where the composition of torch's operations serves best. An order of "none" asks for a contiguous copy.
    """
    backend = "triton" if x.numel() > 0 and gpu.available(x) else "c"
    if backend == "c" and (x.device.type != "cpu" or x.numel() < _SMALL or not normalization.serves(x.dtype)):
        return None
    if channel_axis == -1 or x.dim() == 2:
        samples, channels = x.shape[0], x.shape[-1]
        order = "cols" if x.is_contiguous() else "rows" if x.movedim(-1, 1).is_contiguous() else "none"
    else:
        samples, channels, order = x.shape[0], x.shape[1], memory_order(x)
    positions = x.numel() // (samples * channels)
    return Layout(backend, "cols" if order == "rows" and positions == 1 else order, (samples, channels, positions))


def positions_of(x: Tensor) -> int:
    """Number of positions per channel: the product of the spatial axes (1 for (N, C))."""
    count = 1
    for length in x.shape[2:]:
        count *= length
    return count


def table_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of the tables and of all sums: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def over_positions(table: Tensor, x: Tensor) -> Tensor:
    """View a table (N, C) so that it broadcasts against ``x`` (N, C, *spatial)."""
    return table.reshape(table.shape + (1,) * (x.dim() - 2))
