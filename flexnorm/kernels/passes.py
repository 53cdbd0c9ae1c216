"""The passes over an activation, on whichever kernels serve its device, type and layout.

Four implementations give the same tables and activations (the tests hold them against each other):

* ``compiled``: the C kernels of ``kernels.c`` (CPU, large activations, both memory formats).
* ``native``: torch's own fused kernels (CPU, contiguous), with no compilation: the statistics pass of BatchNorm on the
  view (1, N*C, P) yields the moments; BatchNorm in evaluation mode with weight = scale and bias = shift is the affine
  pass, and its backward yields ``sum g*x``, ``sum g`` and ``scale*g`` at once.
* ``composed``: plain differentiable torch operations. Everything else: CUDA, tiny or empty tensors, double backward,
  ``torch.func`` transforms, and any code that torch.compile or torch.export traces and fuses with its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flexnorm.kernels import normalization as _native

__all__ = [
    "Layout",
    "affine",
    "combine",
    "composed_affine",
    "composed_moments",
    "layout_of",
    "moments",
    "sums",
    "table_dtype",
]

# Below this many values the compiled kernels are not worth loading (a first load may compile for a second or two).
_SMALL = 1 << 14


class Layout(NamedTuple):
    """How an activation lies in memory, and which kernels run on it."""

    kernels: str
    order: str
    size: tuple[int, int, int]


def table_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of the tables and of all sums: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def transformed(*tensors: Tensor | None) -> bool:
    """Whether a torch.func transform is active or gradients come batched: such tensors have no memory of their own."""
    functorch = torch._C._functorch
    batched = any(t is not None and functorch.is_legacy_batchedtensor(t) for t in tensors)
    return batched or functorch.peek_interpreter_stack() is not None


def positions_of(x: Tensor) -> int:
    """Number of positions per channel: the product of the spatial axes (1 for (N, C))."""
    count = 1
    for length in x.shape[2:]:
        count *= length
    return count


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _order(x: Tensor) -> str:
    """Return "rows" if (N, C, P) is contiguous, "cols" if (N, P, C) is, "none" for any other strides."""
    if x.is_contiguous():
        return "rows"
    last = _CHANNELS_LAST.get(x.dim())
    dense = x.movedim(1, -1).is_contiguous() if last is None else x.is_contiguous(memory_format=last)
    return "cols" if dense else "none"


def layout_of(x: Tensor) -> Layout:
    """Choose the kernels for ``x`` (N, C, *spatial) by device, size, type and strides."""
    size = (x.shape[0], x.shape[1], positions_of(x))
    order = _order(x)
    if x.device.type != "cpu" or order == "none" or size[2] < 2 or x.numel() == 0:
        return Layout("composed", order, size)
    if x.numel() >= _SMALL and (loaded := _native.load()) is not None and x.dtype in loaded.dtypes:
        return Layout("compiled", order, size)
    if order == "rows" and x.dtype in (torch.float32, torch.float64):
        return Layout("native", order, size)
    return Layout("composed", order, size)


def over_positions(table: Tensor, x: Tensor) -> Tensor:
    """View a table (N, C) so that it broadcasts against ``x`` (N, C, *spatial)."""
    return table.reshape(table.shape + (1,) * (x.dim() - 2))


def composed_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (N, C) by plain torch operations."""
    values = x.to(table_dtype(x.dtype))
    if x.dim() == 2:
        return values, torch.zeros_like(values)
    if x.numel() == 0:  # no values, no moments: zeros keep 0/0 out of the graph
        zeros = values.sum(tuple(range(2, x.dim())))
        return zeros, zeros
    var, mean = torch.var_mean(values, tuple(range(2, x.dim())), correction=0)
    return mean, var


def composed_affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``scale * x + shift`` in the type of ``x`` by plain torch operations."""
    values = x.to(scale.dtype)
    return torch.addcmul(over_positions(shift, x), values, over_positions(scale, x)).to(x.dtype)


def _as_rows(x: Tensor, size: tuple[int, int, int]) -> Tensor:
    return x.view(1, size[0] * size[1], size[2])


def _reshaped(fresh: Tensor, shape: Sequence[int]) -> Tensor:
    """A fresh tensor in another shape, not as a view: views that leave an autograd function forbid in-place ReLU."""
    reshaped: Tensor = torch.ops.aten._unsafe_view(fresh, list(shape))
    return reshaped


def kernels() -> _native.CKernels:
    """The compiled kernels, where the layout says that they are in use."""
    loaded = _native.load()
    assert loaded is not None
    return loaded


def moments(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the positions, each (N, C)."""
    if layout.kernels == "compiled":
        return kernels().moments(x, layout.order, layout.size, table_dtype(x.dtype))
    if layout.kernels == "native":
        mean, var = torch.ops.aten.batch_norm_update_stats(_as_rows(x, layout.size), None, None, 0.0)
        return _reshaped(mean, layout.size[:2]), _reshaped(var, layout.size[:2])
    return composed_moments(x)


def affine(x: Tensor, scale: Tensor, shift: Tensor | None, layout: Layout) -> Tensor:
    """``scale * x + shift``; tables (N, C), possibly expanded; no shift means zero."""
    if layout.kernels == "compiled":
        return kernels().affine(x, scale, shift, layout.order, layout.size)
    if layout.kernels == "native":
        return _native_affine(x, scale, shift, layout.size)
    if shift is None:
        return (x.to(scale.dtype) * over_positions(scale, x)).to(x.dtype)
    return composed_affine(x, scale, shift)


def _native_affine(x: Tensor, scale: Tensor, shift: Tensor | None, size: tuple[int, int, int]) -> Tensor:
    rows = size[0] * size[1]
    zero, one = scale.new_zeros(rows), scale.new_ones(rows)
    bias = zero if shift is None else shift.reshape(rows)
    y = torch.native_batch_norm(_as_rows(x, size), scale.reshape(rows), bias, zero, one, False, 0.0, 0.0)[0]
    return _reshaped(y, x.shape)


def sums(g: Tensor, x: Tensor, center: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor]:
    """``sum g * x`` and ``sum g`` over the positions, each (N, C).

    The first is taken about ``center``, ``sum g * (x - center) + center * sum g``: summed directly, that of an
    activation with a large mean would lose its digits.
    """
    if layout.kernels == "compiled":
        return kernels().sums(g, x, center, layout.order, layout.size, table_dtype(x.dtype))
    if layout.kernels == "native":
        rows = layout.size[0] * layout.size[1]
        mean = x.new_zeros(rows) if center is None else center.reshape(rows)
        one = torch.ones_like(mean)
        mask = [False, True, True]
        _, s1, s0 = torch.ops.aten.native_batch_norm_backward(
            _as_rows(g, layout.size), _as_rows(x, layout.size), one, mean, one, None, None, False, 0.0, mask
        )
        s1, s0 = _reshaped(s1, layout.size[:2]), _reshaped(s0, layout.size[:2])
        return (s1 if center is None else torch.addcmul(s1, center, s0)), s0
    values, gradient = x.to(table_dtype(x.dtype)), g.to(table_dtype(x.dtype))
    axes = tuple(range(2, x.dim()))
    if not axes:
        return gradient * values, gradient
    s0 = gradient.sum(axes)
    if center is None:
        return (gradient * values).sum(axes), s0
    s1 = (gradient * (values - over_positions(center, x))).sum(axes)
    return torch.addcmul(s1, center, s0), s0


def combine(
    g: Tensor, x: Tensor, scale: Tensor, dmean: Tensor | None, dvar: Tensor | None, mean: Tensor, layout: Layout
) -> Tensor:
    """The gradient of ``x``: ``scale * g + dmean / P + 2 * dvar * (x - mean) / P``; tables may be expanded."""
    positions = max(layout.size[2], 1)
    if layout.kernels == "compiled":
        factors = 1.0 / positions, 2.0 / positions
        return kernels().combine(g, x, scale, dmean, factors[0], dvar, factors[1], mean, layout.order, layout.size)
    a = torch.zeros_like(mean) if dmean is None else dmean / positions
    b = torch.zeros_like(mean) if dvar is None else dvar * (2.0 / positions)
    if layout.kernels == "native":
        # Two affine passes and one sum: torch has no fused kernel for all three.
        dx = _native_affine(g, scale, a - b * mean, layout.size)
        return dx.add_(_native_affine(x, b, None, layout.size))
    dtype = table_dtype(x.dtype)
    dx = over_positions(b, x) * (x.to(dtype) - over_positions(mean, x))
    dx = torch.addcmul(dx + over_positions(a, x), g.to(dtype), over_positions(scale, x))
    return dx.to(x.dtype)
