"""The passes by Triton kernels: those of :mod:`~flexnorm.kernels.passes` over images, and those over tokens.

Each function has the arguments of its namesake. Sums over many positions or tokens are taken in parts, one a program,
whose results are merged by a second kernel or by torch: the same bits every time, no atomic operations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from flexnorm.kernels.gpu import launch
from flexnorm.kernels.layout import Layout, table_dtype

Pair: TypeAlias = tuple[Tensor, Tensor]
Factor: TypeAlias = tuple[Tensor | None, Tensor | None]
Source: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None, float | Tensor, Tensor | None]
_Term: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None, int, int]

_TILE = 2048  # values in the tile of a program of four warps: 16 in each thread
_PROGRAMS = 1024  # that keep a large GPU busy: a reduction over long axes is cut until there are so many


class _View(NamedTuple):
    """An activation as the kernels see it: samples of (channels, positions) if ``rows``, else (positions, channels)."""

    samples: int
    channels: int
    positions: int
    rows: bool

    @classmethod
    def of(cls, layout: Layout, tokens: bool) -> _View:
        samples, channels, positions = layout.size
        rows = layout.order == "rows"
        if tokens and not rows:
            samples, positions = 1, samples * positions
        return cls(samples, channels, positions, rows)

    def order(self) -> dict[str, int]:
        """ROWS and ALIGN: 16 bytes are loaded at once where as many values, or a part of them, divide the length."""
        return {"ROWS": self.rows, "ALIGN": math.gcd(16, self.positions if self.rows else self.channels)}

    def tile(self) -> dict[str, int]:
        """BC and BP, as long as reasonable where memory is contiguous, the rest of the tile the other way."""
        if self.rows:
            length = min(_power(self.positions), 1024, _TILE)
            return {"BC": min(_power(self.channels), max(_TILE // length, 1)), "BP": length, **self.order()}
        length = min(_power(self.channels), 128)
        return {"BC": length, "BP": min(_power(self.positions), max(_TILE // length, 1)), **self.order()}

    def parts(self, tile: dict[str, int]) -> tuple[int, int]:
        """Into how many parts a sum over the positions is cut, and how many tiles each is long."""
        programs = self.samples * _blocks(self.channels, tile["BC"])
        wanted = min(_blocks(_PROGRAMS, programs), _blocks(self.positions, tile["BP"]))
        steps = _blocks(_blocks(self.positions, wanted), tile["BP"])
        return _blocks(self.positions, steps * tile["BP"]), steps

    def everywhere(self, tile: dict[str, int]) -> tuple[int]:
        """The grid of an elementwise pass."""
        return (self.samples * _blocks(self.channels, tile["BC"]) * _blocks(self.positions, tile["BP"]),)


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _blocks(n: int, block: int) -> int:
    return -(-n // block)


def moments(x: Tensor, layout: Layout) -> Pair:
    """Mean and biased variance over the positions, each (N, C)."""
    return _moments(x, _View.of(layout, tokens=False), None, over_samples=False)


def _moments(x: Tensor, view: _View, weights: Tensor | None, over_samples: bool) -> Pair:
    """Moments (N, C) of each channel of each sample, or (1, C) over the samples too."""
    tile = view.tile()
    parts, steps = view.parts(tile)
    whole = parts == 1 and weights is None and (view.samples == 1 or not over_samples)
    mean = torch.empty((parts, view.samples, view.channels), dtype=table_dtype(x.dtype), device=x.device)
    var, count = torch.empty_like(mean), mean.new_empty((parts, view.samples))
    rest = None if whole else torch.empty_like(mean)
    sizes = (view.samples, view.channels, view.positions, steps)
    grid = (parts * view.samples * _blocks(view.channels, tile["BC"]),)
    launch("moments", grid, x, weights, mean, rest, var, count, *sizes, **tile)
    if whole:
        return mean[0], var[0]
    pieces, shape = (parts * view.samples, (1, view.channels)) if over_samples else (parts, mean.shape[1:])
    merged = mean.new_empty(shape), mean.new_empty(shape)
    columns, block = merged[0].numel(), {"BM": min(_power(pieces), 128), "BK": 16}
    grid = (_blocks(columns, 16),)
    launch("merge", grid, mean, rest, var, count, *merged, pieces, columns, view.channels, **block)
    return merged


def affine(x: Tensor, scale: Tensor, shift: Tensor | None, layout: Layout) -> Tensor:
    """``scale * x + shift`` in the memory format of ``x``; tables broadcast to (N, C); no shift means zero."""
    size = layout.size[:2]
    shifts = None if shift is None else (_table(shift, size),)
    return _affine(x, (_table(scale, size),), shifts, 1, _View.of(layout, tokens=False))


def _affine(x: Tensor, scale: Sequence[_Term], shift: Sequence[_Term] | None, groups: int, view: _View) -> Tensor:
    y, tile = torch.empty_like(x), view.tile()
    sizes = (view.channels, view.positions, groups, view.channels // groups)
    launch("affine", view.everywhere(tile), x, y, scale, shift, *sizes, **tile)
    return y


def _table(table: Tensor, size: tuple[int, int]) -> _Term:
    """A table that broadcasts to (N, C) as a term."""
    whole = table.expand(size)
    return None, None, whole, whole.stride(0), whole.stride(1)


def sums(
    g: Tensor, x: Tensor, center: Tensor | None, layout: Layout, shapes: tuple[Sequence[int], Sequence[int]]
) -> Pair:
    """``sum g * x`` about ``center`` and ``sum g`` over the positions, (N, C), and further down to ``shapes``."""
    s1, s0 = _sums(g, x, center, _View.of(layout, tokens=False))
    return s1.sum_to_size(shapes[0]), s0.sum_to_size(shapes[1])


def _sums(g: Tensor, x: Tensor, center: Tensor | None, view: _View) -> Pair:
    tile = view.tile()
    parts, steps = view.parts(tile)
    shape = (2, parts, view.samples, view.channels)
    both = torch.empty(shape, dtype=table_dtype(x.dtype), device=x.device)
    center = None if center is None else center.expand(view.samples, view.channels)
    if center is not None and center.stride(1) != 1:
        center = center.contiguous()
    middle = (center, 0 if center is None else center.stride(0))
    sizes = (view.samples, view.channels, view.positions, steps)
    grid = (parts * view.samples * _blocks(view.channels, tile["BC"]),)
    launch("sums", grid, g, x, *middle, both[0], both[1], *sizes, WHOLE=parts == 1, **tile)
    if parts == 1:
        return both[0, 0], both[1, 0]
    s1, s0 = both.sum(1)
    return s1 if center is None else torch.addcmul(s1, center, s0), s0


def combine(
    g: Tensor, x: Tensor, scale: Tensor | None, dmean: Tensor | None, dvar: Tensor | None, mean: Tensor, layout: Layout
) -> Tensor:
    """The gradient of ``x``: ``scale * g + dmean / P + 2 * dvar * (x - mean) / P``."""
    size, positions = layout.size[:2], layout.size[2]
    scales = None if scale is None else (_table(scale, size),)
    through = [None if t is None else _table(t, size) for t in (mean, dmean, dvar)]
    return _combine(g, x, scales, None, (*through, positions, None), 1, _View.of(layout, tokens=False))


def _combine(g: Tensor, x: Tensor, scale: Any, rows: Any, columns: Any, groups: int, view: _View) -> Tensor:
    dx, tile = torch.empty_like(x), view.tile()
    sizes = (view.channels, view.positions, groups, view.channels // groups)
    launch("combine", view.everywhere(tile), g, x, dx, scale, rows, columns, *sizes, **tile)
    return dx


def row_moments(x: Tensor, layout: Layout, groups: int = 1) -> Pair:
    """Mean and biased variance of each token over the channels of each of ``groups`` equal groups: (R, groups) each."""
    samples, channels, positions = layout.size
    width = channels // groups
    if layout.order == "cols":
        rows = samples * positions
        mean, var = _moments(x, _View(1, rows * groups, width, True), None, over_samples=False)
        return mean.view(rows, groups), var.view(rows, groups)
    # The channels of a group are what a sum runs over, the positions what it is kept for.
    found = _moments(x, _View(samples * groups, positions, width, False), None, over_samples=False)
    mean, var = (t.view(samples, groups, positions).movedim(1, 2).reshape(-1, groups) for t in found)
    return mean, var


def column_moments(x: Tensor, layout: Layout, weights: Tensor | None = None) -> Pair:
    """Mean and biased variance of each channel over the tokens, (1, C) each; a token of weight 0 is not read."""
    weights = None if weights is None else weights.contiguous()
    return _moments(x, _View.of(layout, tokens=True), weights, over_samples=True)


def _groups(tables: Sequence[Tensor | None]) -> int:
    """How many groups serve all tables (R, G)."""
    return math.lcm(*(t.shape[1] for t in tables if t is not None))


def _term(factor: Factor, groups: int) -> _Term:
    row, column = factor
    if row is not None and row.shape[1] not in (1, groups):
        row = row.repeat_interleave(groups // row.shape[1], 1)
    row = None if row is None else row.contiguous()
    grouped = row is not None and row.shape[1] > 1
    flat = None if column is None else column.reshape(-1)
    return None if grouped else row, row if grouped else None, flat, 0, 0 if flat is None else flat.stride(0)


def _filled(scale: Sequence[Factor], x: Tensor, layout: Layout) -> Sequence[Factor]:
    """No term of a scale stands for zero."""
    return scale or ((None, torch.zeros(layout.size[1], dtype=table_dtype(x.dtype), device=x.device)),)


def token_affine(x: Tensor, scale: Sequence[Factor], shift: Sequence[Factor], layout: Layout) -> Tensor:
    """``scale * x + shift`` in the type and memory order of ``x``; sums of at most two outer products."""
    groups = _groups([row for row, _ in (*scale, *shift)])
    scales = tuple(_term(factor, groups) for factor in _filled(scale, x, layout))
    shifts = tuple(_term(factor, groups) for factor in shift) or None
    return _affine(x, scales, shifts, groups, _View.of(layout, tokens=True))


def token_combine(
    g: Tensor, x: Tensor, scale: Sequence[Factor] | None, rows: Source | None, columns: Source | None, layout: Layout
) -> Tensor:
    """The gradient of ``x``: ``scale * g``, plus what goes through the moments that the rule has read."""
    tables = [] if rows is None else list(rows[:3])
    groups = _groups([row for row, _ in scale or ()] + tables)
    scales = None if scale is None else tuple(_term(f, groups) for f in _filled(scale, x, layout))
    of_rows, of_columns = (None if s is None else _source(s, s is columns, groups) for s in (rows, columns))
    return _combine(g, x, scales, of_rows, of_columns, groups, _View.of(layout, tokens=True))


def _source(source: Source, of_columns: bool, groups: int) -> tuple[Any, ...]:
    mean, dmean, dvar, count, weights = source
    if isinstance(count, Tensor) or count != int(count):
        dmean, dvar = (None if t is None else t / count for t in (dmean, dvar))
        count = 1
    tables = [None if t is None else _term((None, t) if of_columns else (t, None), groups) for t in (mean, dmean, dvar)]
    return (*tables, int(count), None if weights is None else weights.contiguous())


def token_sums(
    g: Tensor, x: Tensor, center: Tensor | None, scale: Sequence[Factor], shift: Sequence[Factor], layout: Layout
) -> tuple[list[Factor], list[Factor]]:
    """Gradients of the factors of ``scale`` and ``shift`` for that of :func:`token_affine`, each in their shape."""
    view, channels = _View.of(layout, tokens=True), layout.size[1]
    of_rows = center is not None and center.shape != (1, channels)
    if not of_rows and all(row is None for row, _ in (*scale, *shift)):
        return _column_sums(g, x, center, scale, shift, view)
    groups = _groups([row for row, _ in (*scale, *shift)] + ([center] if of_rows else []))
    middle = None if center is None else _term((center, None) if of_rows else (None, center), groups)
    tile = _token_tile(view, groups)
    blocks = view.samples * _blocks(view.positions, tile["BP"])
    dtype, tokens = table_dtype(x.dtype), view.samples * view.positions
    columns = sum(column is not None for _, column in (*scale, *shift))
    partial = torch.empty((columns, blocks, channels), dtype=dtype, device=x.device)
    free, kept = iter(partial), []
    for row, column in (*scale, *shift):
        of_row = None if row is None else partial.new_empty((tokens, groups))
        kept.append((of_row, None if column is None else next(free)))
    terms = [(*_term(f, groups), *out) for f, out in zip((*scale, *shift), kept, strict=True)]
    first, second = terms[: len(scale)], terms[len(scale) :]
    padded = [*first, *[None] * (2 - len(first)), *second, *[None] * (2 - len(second))]
    sizes = (channels, view.positions, groups, channels // groups)
    launch("token_sums", (blocks * _blocks(groups, tile["BG"]),), g, x, middle, *padded, *sizes, **tile)
    totals, found = iter(partial.sum(1)), []
    for (row, column), (of_row, _) in zip((*scale, *shift), kept, strict=True):
        if row is not None and of_row is not None:
            of_row = of_row.view(tokens, row.shape[1], -1).sum(2) if row.shape[1] != groups else of_row
        found.append((of_row, None if column is None else next(totals).view(column.shape)))
    return found[: len(scale)], found[len(scale) :]


def _column_sums(
    g: Tensor, x: Tensor, center: Tensor | None, scale: Sequence[Factor], shift: Sequence[Factor], view: _View
) -> tuple[list[Factor], list[Factor]]:
    """Where nothing depends on the token, all terms of a table have the same gradient."""
    s1, s0 = (total.sum(0) for total in _sums(g, x, center, view))
    return [(None, s1.view_as(c)) for _, c in scale if c is not None], [
        (None, s0.view_as(c)) for _, c in shift if c is not None
    ]


def _token_tile(view: _View, groups: int) -> dict[str, int]:
    """BP tokens by BG groups by BW of their channels, fewer tokens where that leaves a GPU idle."""
    wide = 32 if view.rows else 128
    bw = min(_power(view.channels // groups), wide)
    bg = min(_power(groups), wide // bw)
    tokens = min(_power(view.positions), max(_TILE // (bw * bg), 1))
    while tokens > 4 and view.samples * _blocks(view.positions, tokens) * _blocks(groups, bg) < _PROGRAMS // 4:
        tokens //= 2
    return {"BP": tokens, "BG": bg, "BW": bw, **view.order()}
