"""The passes over samples whose positions do not all count, or are not equally many: masks, and graphs of a batch.

As :mod:`~flexnorm.kernels.passes`, with tables (S, C) of S samples, for the backend "c" alone. The samples are told by
:class:`Spans`: those of an activation (N, C, *spatial) with weights of the positions, in either memory order; or runs
of rows of a matrix (R, C). None of these functions is differentiable.
"""

from __future__ import annotations

import functools
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexnorm.kernels import passes
from flexnorm.kernels.build import declare, library, threads
from flexnorm.kernels.layout import Layout, table_dtype
from flexnorm.kernels.normalization import SUFFIXES
from flexnorm.kernels.tables import Pair

_SOURCE = Path(__file__).with_name("ragged.c")
_KERNELS = ("moments_rows", "moments_cols", "affine_cols", "sums_cols", "combine_rows", "combine_cols")


class Spans(NamedTuple):
    """Which positions are those of a sample, and how much each counts."""

    weights: Tensor | None = None  # (N, P) or (R,) in the type of the tables; what weighs 0 is not read
    starts: Tensor | None = None  # (S + 1,) int64: rows of sample s are those from starts[s] to starts[s + 1]
    order: Tensor | None = None  # (R,) int64: of this list of rows; None where they lie as the samples follow

    @classmethod
    def of(cls, index: Tensor, count: int, weights: Tensor | None = None) -> Spans:
        """Samples of rows that are numbered by ``index`` (R,), int64 from 0 to ``count - 1``, sorted or not."""
        starts = index.new_zeros(count + 1)
        torch.cumsum(torch.bincount(index, minlength=count), 0, out=starts[1:])
        follows = bool((index[1:] >= index[:-1]).all())
        return cls(weights, starts, None if follows else torch.argsort(index, stable=True))


@functools.cache
def load() -> dict[tuple[str, torch.dtype], Any] | None:
    """Return the kernels by name and type of the values, building them if this machine has not yet; ``None`` if not."""
    found = library(_SOURCE, "mask")
    if found is None:
        return None
    return {
        (name, dtype): declare(kernel, "p")
        for name in _KERNELS
        for dtype, suffix in SUFFIXES.items()
        if (kernel := getattr(found[0], f"{name}_{suffix}", None)) is not None
    }


class _Call:
    """The arguments of a kernel, in one block of memory; what had to be copied lives until it has run."""

    def __init__(self, x: Tensor, layout: Layout, spans: Spans) -> None:
        samples, channels, positions = layout.size
        self.order = layout.order
        if spans.starts is not None:
            samples, positions = len(spans.starts) - 1, 0
        self.tables = (samples, channels)
        self.x = x
        self._kept: list[Tensor] = []
        self._words: list[int] = []
        self.add(spans.starts, spans.order)
        self._words += [samples, channels, positions, threads(x.numel())]

    def add(self, *tensors: Tensor | None) -> None:
        for t in tensors:
            if t is not None and not t.is_contiguous():
                self._kept.append(t := t.contiguous())
            self._words.append(0 if t is None else t.data_ptr())

    def activations(self, *tensors: Tensor) -> None:
        self._words += [t.data_ptr() for t in tensors]

    def table(self, table: Tensor | None) -> None:
        """A table that broadcasts to (S, C), by its strides."""
        if table is None:
            self._words += [0, 0, 0]
        else:
            wide = table.expand(self.tables)
            self._words += [wide.data_ptr(), wide.stride(0), wide.stride(1)]

    def run(self, name: str) -> None:
        kernels = load()
        assert kernels is not None
        words = struct.pack(f"{len(self._words)}q", *self._words)
        kernels[f"{name}_{self.order}", self.x.dtype](words)


def moments(x: Tensor, layout: Layout, spans: Spans) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance, (S, C), and what their values weigh together, (S, 1); zeros where that is nothing."""
    call = _Call(x, layout, spans)
    mean = torch.empty(call.tables, dtype=table_dtype(x.dtype))
    var, count = torch.empty_like(mean), mean.new_empty((call.tables[0], 1))
    call.add(spans.weights)
    call.activations(x, mean, var, count)
    call.run("moments")
    return mean, var, count


def affine(x: Tensor, scale: Tensor, shift: Tensor | None, layout: Layout, spans: Spans) -> Tensor:
    """``scale * x + shift`` in the type and memory order of ``x``; tables broadcast to (S, C); no shift means zero."""
    if spans.starts is None:
        return passes.affine(x, scale, shift, layout)
    call = _Call(x, layout, spans)
    y = torch.empty_like(x)
    call.activations(x, y)
    call.table(scale)
    call.table(shift)
    call.run("affine")
    return y


def sums(g: Tensor, x: Tensor, center: Tensor | None, layout: Layout, spans: Spans) -> Pair:
    """``sum g * x`` and ``sum g`` over all positions of each sample, (S, C), the first about ``center`` (S, C)."""
    call = _Call(x, layout, spans)
    if spans.starts is None:
        return passes.sums(g, x, center, layout, (call.tables, call.tables))
    s1 = torch.empty(call.tables, dtype=table_dtype(x.dtype))
    s0 = torch.empty_like(s1)
    call.activations(x, g)
    call.add(center)
    call.activations(s1, s0)
    call.run("sums")
    return s1, s0


def combine(
    g: Tensor,
    x: Tensor,
    scale: Tensor | None,
    dmean: Tensor | None,
    dvar: Tensor | None,
    mean: Tensor,
    count: Tensor,
    layout: Layout,
    spans: Spans,
) -> Tensor:
    """The gradient of ``x``: ``scale * g + weight / count * (dmean + 2 * dvar * (x - mean))``.

    Tables broadcast to (S, C); ``mean`` and ``count`` are those of :func:`moments`. No scale means one, no other table
    zero.
    """
    call = _Call(x, layout, spans)
    dx = torch.empty_like(x)
    call.add(spans.weights)
    call.activations(x, g, dx)
    for table in (scale, dmean, dvar):
        call.table(table)
    call.add(mean, count)
    call.run("combine")
    return dx
