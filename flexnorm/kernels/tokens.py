"""The passes over tokens: an activation seen as R rows of C channels, whose tables are sums of outer products.

A normalization of tokens has one mean and one variance per token, per channel, or per group of channels of a token. Its
scale and shift would be as large as the activation if they were written down; they stay a few *factors*: a column of R
numbers (or R x G, one for each of G groups of neighbouring channels) times a row of C numbers.

Two memory orders (:class:`~flexnorm.kernels.layout.Layout`, whose size is N, C, P, with R = N * P): "cols", (R, C)
contiguous; and "rows", (N, C, P) contiguous: one token at each position of an image.

The functions below run on the backend of the layout, "c" or "triton". They are not differentiable: the engine knows
their derivatives. Whatever has to be traced, transformed or differentiated twice is composed on the view (R, C).
"""

from __future__ import annotations

import functools
import struct
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from flexnorm.kernels import ragged, triton_passes
from flexnorm.kernels.build import declare, library, threads
from flexnorm.kernels.layout import Layout, table_dtype
from flexnorm.kernels.normalization import SUFFIXES, call
from flexnorm.kernels.passes import moments
from flexnorm.kernels.tables import Pair, pool, pool_unequal

_SOURCE = Path(__file__).with_name("tokens.c")
_NOTHING = [0] * 6

Factor: TypeAlias = tuple[Tensor | None, Tensor | None]
"""An outer product: (R, G) or (R, 1) per token (and group), times (C,) per channel; ``None`` stands for ones."""

Terms: TypeAlias = tuple[Factor, ...]
"""The sum of at most two outer products; none stands for zero."""


class Source(NamedTuple):
    """Moments that a rule has read, and the gradients that have come back for them."""

    mean: Tensor
    dmean: Tensor | None
    dvar: Tensor | None
    size: float | Tensor  # how many values stand behind each: what the gradients are divided by
    weights: Tensor | None = None  # (R,) of the tokens, for moments over the batch


def expanded(factor: Factor, channels: int) -> Tensor:
    """The outer product as a table that broadcasts to (R, C)."""
    row, column = factor
    if row is not None and row.shape[1] not in (1, channels):
        row = row.repeat_interleave(channels // row.shape[1], 1)
    if row is None or column is None:
        found = row if column is None else column.reshape(1, -1)
        assert found is not None, "an outer product has at least one factor"
        return found
    return row * column.reshape(1, -1)


def matrix(x: Tensor, layout: Layout) -> Tensor:
    """An activation as (R, C): a view in "cols" order, else a copy."""
    samples, channels, positions = layout.size
    if layout.order == "cols":
        return (x if x.is_contiguous() else x.movedim(1, -1)).reshape(samples * positions, channels)
    return x.reshape(samples, channels, positions).movedim(1, 2).reshape(samples * positions, channels)


def like(tokens: Tensor, x: Tensor, layout: Layout) -> Tensor:
    """A matrix (R, C) in the shape and type of ``x``."""
    samples, channels, positions = layout.size
    if layout.order == "cols":
        last = x.is_contiguous()
        shaped = tokens.reshape(x.shape if last else x.movedim(1, -1).shape)
        return (shaped if last else shaped.movedim(-1, 1)).to(x.dtype)
    return tokens.reshape(samples, positions, channels).movedim(1, 2).reshape(x.shape).to(x.dtype)


@functools.cache
def load() -> dict[tuple[str, torch.dtype], Any] | None:
    """Return the kernels by name and type of the values, building them if this machine has not yet; ``None`` if not."""
    found = library(_SOURCE, "token")
    if found is None:
        return None
    names = [
        f"{name}_{order}" for name in ("column_moments", "affine", "sums", "combine") for order in ("cols", "rows")
    ]
    return {
        (name, dtype): declare(kernel, "p")
        for name in (*names, "row_moments_rows", "column_moments_cols")
        for dtype, suffix in SUFFIXES.items()
        if (kernel := getattr(found[0], f"{name}_{suffix}", None)) is not None
    }


def _run(name: str, x: Tensor, form: str, *words: Any) -> None:
    """Run a kernel on one block of memory that holds all arguments: that costs less than handing over each of them."""
    kernels = load()
    assert kernels is not None
    kernels[name, x.dtype](struct.pack(form, x.data_ptr(), *words))


def _address(table: Tensor | None, kept: list[Tensor]) -> int:
    """Where a table lies; ``kept`` holds what had to be copied until the kernel has run."""
    if table is None:
        return 0
    if not table.is_contiguous():
        kept.append(table := table.contiguous())
    return table.data_ptr()


def _words(terms: Terms, kept: list[Tensor]) -> list[int]:
    """Two terms as C takes them: address and number of groups of the row factor, address of the column."""
    words: list[int] = []
    for row, column in terms:
        words += (_address(row, kept), 0 if row is None else row.size(1), _address(column, kept))
    return words + _NOTHING[len(words) :]


def _gradients(terms: Terms) -> tuple[list[Factor], list[int]]:
    """Memory for the gradients of the factors, and its addresses for C."""
    found: list[Factor] = []
    words: list[int] = []
    for row, column in terms:
        of_row = None if row is None else torch.empty_like(row, memory_format=torch.contiguous_format)
        of_column = None if column is None else torch.empty_like(column, memory_format=torch.contiguous_format)
        found.append((of_row, of_column))
        words += (0 if of_row is None else of_row.data_ptr(), 0 if of_column is None else of_column.data_ptr())
    return found, words + _NOTHING[len(words) + 2 :]


def _through(source: Source | None, kept: list[Tensor]) -> list[Any]:
    """Mean, gradients, weights, groups and size of moments as C takes them."""
    if source is None:
        return [0, 0, 0, 0, 1, 1.0]
    tables = (source.mean, source.dmean, source.dvar, source.weights)
    return [*[_address(t, kept) for t in tables], source.mean.size(1), float(source.size)]


def row_moments(x: Tensor, layout: Layout, groups: int = 1) -> Pair:
    """Mean and biased variance of each token over the channels of each of ``groups`` equal groups: (R, groups) each."""
    if layout.backend == "triton":
        return triton_passes.row_moments(x, layout, groups)
    samples, channels, positions = layout.size
    mean = torch.empty(samples * positions, groups, dtype=table_dtype(x.dtype))
    var = torch.empty_like(mean)
    if layout.order == "cols":
        call("moments_rows", x.dtype, x, mean, var, len(mean), groups, channels // groups, threads(x.numel()))
    else:
        _run("row_moments_rows", x, "8q", mean.data_ptr(), var.data_ptr(), *layout.size, threads(x.numel()), groups)
    return mean, var


def column_moments(x: Tensor, layout: Layout, weights: Tensor | None = None) -> Pair:
    """Mean and biased variance of each channel over the tokens, (1, C) each.

    ``weights`` (R,), in the type of the tables, tell how much each token counts; a token of weight 0 is not read.
    """
    if layout.backend == "triton":
        return triton_passes.column_moments(x, layout, weights)
    if layout.order == "rows":
        if weights is None:
            return pool(*moments(x, layout), 0, "c")
        return pool_unequal(*ragged.moments(x, layout, ragged.Spans(weights.view(layout.size[0], -1))))
    kept: list[Tensor] = []
    mean = torch.empty(1, layout.size[1], dtype=table_dtype(x.dtype))
    var = torch.empty_like(mean)
    words = (mean.data_ptr(), var.data_ptr(), *layout.size, threads(x.numel()), _address(weights, kept))
    _run("column_moments_cols", x, "8q", *words)
    return mean, var


def affine(x: Tensor, scale: Terms, shift: Terms, layout: Layout) -> Tensor:
    """``scale * x + shift`` in the type and memory order of ``x``."""
    if layout.backend == "triton":
        return triton_passes.token_affine(x, scale, shift, layout)
    y = torch.empty_like(x)
    kept: list[Tensor] = []
    words = (y.data_ptr(), *layout.size, threads(x.numel()), *_words(scale, kept), *_words(shift, kept))
    _run(f"affine_{layout.order}", x, "18q", *words)
    return y


def sums(
    g: Tensor, x: Tensor, center: Tensor | None, scale: Terms, shift: Terms, layout: Layout
) -> tuple[list[Factor], list[Factor]]:
    """Gradients of the factors of ``scale`` and ``shift`` for that of :func:`affine`, each of its factor's shape.

    ``sum g * x`` is taken about ``center``, (R, G) or (1, C), where it is given: ``sum g * (x - center) + center * sum
    g``: summed directly, that of an activation with a large mean would lose its digits.
    """
    if layout.backend == "triton":
        return triton_passes.token_sums(g, x, center, scale, shift, layout)
    kept: list[Tensor] = []
    groups = 0 if center is None or center.shape == (1, layout.size[1]) else center.size(1)
    words = [g.data_ptr(), *layout.size, threads(x.numel()), _address(center, kept), groups]
    of_scale, at_scale = _gradients(scale)
    of_shift, at_shift = _gradients(shift)
    words += _words(scale, kept) + _words(shift, kept) + at_scale + at_shift
    _run(f"sums_{layout.order}", x, "28q", *words)
    return of_scale, of_shift


def combine(
    g: Tensor, x: Tensor, scale: Terms | None, rows: Source | None, columns: Source | None, layout: Layout
) -> Tensor:
    """The gradient of ``x``: ``scale * g``, plus what goes through the moments that the rule has read.

    For moments of each token, tables (R, G), ``(dmean + 2 * dvar * (x - mean)) / count``; the same for moments of the
    batch, tables (1, C), times the weight of the token. ``scale=None`` stands for one.
    """
    if layout.backend == "triton":
        return triton_passes.token_combine(g, x, scale, rows, columns, layout)
    dx = torch.empty_like(x)
    kept: list[Tensor] = []
    words = [g.data_ptr(), dx.data_ptr(), *layout.size, threads(x.numel()), scale is None, *_words(scale or (), kept)]
    _run(f"combine_{layout.order}", x, "19qd5qd", *words, *_through(rows, kept), *_through(columns, kept))
    return dx
