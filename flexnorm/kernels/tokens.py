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

from flexnorm.kernels import triton_passes
from flexnorm.kernels.build import declare, library
from flexnorm.kernels.layout import Layout, table_dtype
from flexnorm.kernels.normalization import SUFFIXES, call
from flexnorm.kernels.tables import Pair

_SOURCE = Path(__file__).with_name("tokens.c")
_ALONE = 1 << 15  # values that one thread handles faster than it wakes another

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
        return x.reshape(samples * positions, channels)
    return x.reshape(samples, channels, positions).movedim(1, 2).reshape(samples * positions, channels)


def like(tokens: Tensor, x: Tensor, layout: Layout) -> Tensor:
    """A matrix (R, C) in the shape and type of ``x``."""
    samples, channels, positions = layout.size
    if layout.order == "cols":
        return tokens.reshape(x.shape).to(x.dtype)
    return tokens.reshape(samples, positions, channels).movedim(1, 2).reshape(x.shape).to(x.dtype)


@functools.cache
def load() -> dict[tuple[str, torch.dtype], Any] | None:
    """Return the kernels by name and type of the values, building them if this machine has not yet; ``None`` if not."""
    found = library(_SOURCE, "token")
    if found is None:
        return None
    names = ("column_moments", "affine", "sums", "combine")
    return {
        (f"{name}_{order}", dtype): declare(kernel, "p")
        for name in names
        for order in ("cols", "rows")
        for dtype, suffix in SUFFIXES.items()
        if (kernel := getattr(found[0], f"{name}_{order}_{suffix}", None)) is not None
    }


def _run(name: str, x: Tensor, *words: Any, form: str) -> None:
    """Run a kernel on one block of memory that holds all arguments: that costs less than handing over each of them."""
    kernels = load()
    assert kernels is not None
    kernels[name, x.dtype](struct.pack(form, *words))


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() > _ALONE else 1


def _address(table: Tensor | None) -> int:
    return 0 if table is None else table.data_ptr()


def _dense(terms: Terms) -> Terms:
    return tuple((None if r is None else r.contiguous(), None if c is None else c.contiguous()) for r, c in terms)


def _words(terms: Terms) -> list[int]:
    """Two terms as C takes them: addresses and number of groups."""
    words = [0] * 6
    for at, (row, column) in zip((0, 3), terms, strict=False):
        if row is not None:
            words[at : at + 2] = row.data_ptr(), row.shape[1]
        if column is not None:
            words[at + 2] = column.data_ptr()
    return words


def row_moments(x: Tensor, layout: Layout, groups: int = 1) -> Pair:
    """Mean and biased variance of each token over the channels of each of ``groups`` equal groups: (R, groups) each."""
    if layout.backend == "triton":
        return triton_passes.row_moments(x, layout, groups)
    samples, channels, positions = layout.size
    if layout.order == "cols":
        tokens = samples * positions
        mean, var = torch.empty((2, tokens, groups), dtype=table_dtype(x.dtype)).unbind()
        call("moments_rows", x.dtype, x, mean, var, tokens, groups, channels // groups, _threads(x))
        return mean, var
    values = matrix(x, layout).to(table_dtype(x.dtype))
    var, mean = torch.var_mean(values.view(len(values), groups, -1), 2, correction=0)
    return mean, var


def column_moments(x: Tensor, layout: Layout, weights: Tensor | None = None) -> Pair:
    """Mean and biased variance of each channel over the tokens, (1, C) each.

    ``weights`` (R,), in the type of the tables, tell how much each token counts; a token of weight 0 is not read.
    """
    if layout.backend == "triton":
        return triton_passes.column_moments(x, layout, weights)
    samples, channels, positions = layout.size
    if layout.order == "cols":
        mean, var = torch.empty((2, 1, channels), dtype=table_dtype(x.dtype)).unbind()
        weights = None if weights is None else weights.contiguous()
        words = (x.data_ptr(), mean.data_ptr(), var.data_ptr(), samples * positions, channels, _threads(x))
        _run("column_moments_cols", x, *words, _address(weights), form="7q")
        return mean, var
    values = matrix(x, layout).to(table_dtype(x.dtype))
    if weights is None:
        var, mean = torch.var_mean(values, 0, correction=0, keepdim=True)
        return mean, var
    share = (weights / weights.sum()).unsqueeze(1)
    values = values.where(share > 0, 0)
    mean = (share * values).sum(0, keepdim=True)
    return mean, (share * (values - mean).square()).sum(0, keepdim=True)


def affine(x: Tensor, scale: Terms, shift: Terms, layout: Layout) -> Tensor:
    """``scale * x + shift`` in the type and memory order of ``x``."""
    if layout.backend == "triton":
        return triton_passes.token_affine(x, scale, shift, layout)
    samples, channels, positions = layout.size
    if layout.order == "cols":
        y, scale, shift = torch.empty_like(x), _dense(scale), _dense(shift)
        words = (x.data_ptr(), y.data_ptr(), samples * positions, channels, _threads(x))
        _run("affine_cols", x, *words, *_words(scale), *_words(shift), form="17q")
        return y
    values = matrix(x, layout).to(table_dtype(x.dtype))
    y = values * sum(expanded(term, layout.size[1]) for term in scale)
    return like(y + sum(expanded(term, layout.size[1]) for term in shift), x, layout)


def sums(
    g: Tensor, x: Tensor, center: Tensor | None, scale: Terms, shift: Terms, layout: Layout
) -> tuple[list[Factor], list[Factor]]:
    """Gradients of the factors of ``scale`` and ``shift`` for that of :func:`affine`, each of its factor's shape.

    ``sum g * x`` is taken about ``center``, (R, G) or (1, C), where it is given: ``sum g * (x - center) + center * sum
    g``: summed directly, that of an activation with a large mean would lose its digits.
    """
    if layout.backend == "triton":
        return triton_passes.token_sums(g, x, center, scale, shift, layout)
    samples, channels, positions = layout.size
    if layout.order == "cols":
        scale, shift = _dense(scale), _dense(shift)
        center = None if center is None else center.contiguous()
        of_scale, of_shift = _like_terms(scale), _like_terms(shift)
        words = [g.data_ptr(), x.data_ptr(), samples * positions, channels, _threads(x), _address(center)]
        groups = 0 if center is None or center.shape == (1, channels) else center.shape[1]
        words += [groups, *_words(scale), *_words(shift)]
        for side in (0, 1):
            for terms in (of_scale, of_shift):
                words += [_address(terms[t][side]) if t < len(terms) else 0 for t in (0, 1)]
        _run("sums_cols", x, *words, form="27q")
        return of_scale, of_shift
    incoming, values = (matrix(t, layout).to(table_dtype(x.dtype)) for t in (g, x))
    if center is not None:
        about = _wide(center, center.shape[0] > 1, values)
        return _contract(incoming * (values - about) + incoming * about, scale), _contract(incoming, shift)
    return _contract(incoming * values, scale), _contract(incoming, shift)


def _like_terms(terms: Terms) -> list[Factor]:
    return [(None if r is None else torch.empty_like(r), None if c is None else torch.empty_like(c)) for r, c in terms]


def _contract(g: Tensor, terms: Terms) -> list[Factor]:
    found: list[Factor] = []
    for row, column in terms:
        of_column = None
        if column is not None:
            of_column = (g if row is None else g * expanded((row, None), g.shape[1])).sum(0).view(column.shape)
        of_row = None
        if row is not None:
            weighted = g if column is None else g * column.reshape(1, -1)
            of_row = weighted.view(len(g), row.shape[1], -1).sum(2)
        found.append((of_row, of_column))
    return found


def _wide(table: Tensor, of_rows: bool, values: Tensor) -> Tensor:
    return expanded((table, None), values.shape[1]) if of_rows else table


def _tables(source: Source | None) -> list[Tensor | None]:
    """Mean, its gradient, that of the variance, and weights."""
    tables = (None,) * 4 if source is None else (source.mean, source.dmean, source.dvar, source.weights)
    return [None if t is None else t.contiguous() for t in tables]


def combine(
    g: Tensor, x: Tensor, scale: Terms | None, rows: Source | None, columns: Source | None, layout: Layout
) -> Tensor:
    """The gradient of ``x``: ``scale * g``, plus what goes through the moments that the rule has read.

    For moments of each token, tables (R, G), ``(dmean + 2 * dvar * (x - mean)) / count``; the same for moments of the
    batch, tables (1, C), times the weight of the token. ``scale=None`` stands for one.
    """
    if layout.backend == "triton":
        return triton_passes.token_combine(g, x, scale, rows, columns, layout)
    samples, channels, positions = layout.size
    if layout.order == "cols":
        dx, scale_terms = torch.empty_like(x), _dense(scale or ())
        words = [g.data_ptr(), x.data_ptr(), dx.data_ptr(), samples * positions, channels, _threads(x), scale is None]
        of_rows, of_columns = _tables(rows), _tables(columns)
        words += [*_words(scale_terms), *map(_address, of_rows[:3]), 1 if rows is None else rows.mean.shape[1]]
        sizes = (1.0 if source is None else float(source.size) for source in (rows, columns))
        _run("combine_cols", x, *words, next(sizes), *map(_address, of_columns), next(sizes), form="17qd4qd")
        return dx
    incoming, values = (matrix(t, layout).to(table_dtype(x.dtype)) for t in (g, x))
    dx = incoming if scale is None else incoming * sum(expanded(term, layout.size[1]) for term in scale)
    for source in (rows, columns):
        if source is None:
            continue
        part = torch.zeros_like(values)
        if source.dvar is not None:
            mean, dvar = (_wide(t, source is rows, values) for t in (source.mean, source.dvar))
            part = 2 * dvar * (values - mean)
        if source.dmean is not None:
            part = part + _wide(source.dmean, source is rows, values)
        part = part / source.size
        if source.weights is not None:
            weights = source.weights.unsqueeze(1)
            part = (weights * part).where(weights > 0, 0)
        dx = dx + part
    return like(dx, x, layout)
