"""Masks and graphs of a batch: the passes over samples of their own sizes against float64 operations, one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexnorm.kernels import ragged
from flexnorm.kernels.layout import Layout, table_dtype
from flexnorm.kernels.ragged import Spans

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
KINDS = ("rows", "cols", "sorted", "mixed")  # masks in both memory orders; graphs whose nodes lie together, or do not

pytestmark = pytest.mark.skipif(ragged.load() is None, reason="no C compiler on this machine")

kinds = st.sampled_from(KINDS)
sizes = st.tuples(st.integers(1, 7), st.integers(1, 300), st.integers(1, 150))
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


class Case:
    """An activation, its samples as the kernels see them, and each sample's rows one by one."""

    def __init__(self, kind: str, size: tuple[int, int, int], dtype: torch.dtype, weighted: bool) -> None:
        self.samples, self.channels, positions = size
        exact = table_dtype(dtype)
        rows = self.samples * positions
        weights = (
            torch.rand(rows, dtype=exact) * (torch.rand(rows) > 0.4) if weighted or kind in ("rows", "cols") else None
        )
        self.weights = torch.ones(rows).double() if weights is None else weights.double()
        self.size, self.kind = size, kind
        if kind in ("rows", "cols"):
            index = torch.arange(rows) // positions
            self.spans = Spans(None if weights is None else weights.view(self.samples, positions))
            self.layout = Layout("c", kind, size)
        else:
            index = torch.randint(self.samples, (rows,))  # some samples may have no rows
            index = index.sort().values if kind == "sorted" else index
            self.spans = Spans.of(index, self.samples, weights)
            self.layout = Layout("c", "cols", (rows, self.channels, 1))
        self.members = [torch.nonzero(index == s).view(-1) for s in range(self.samples)]
        self.x = self.activation(3 + 2 * torch.randn(rows, self.channels), dtype)

    def activation(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        samples, channels, positions = self.size
        if self.kind == "rows":
            rows = rows.view(samples, positions, channels).movedim(2, 1).contiguous()
        return rows.to(dtype)

    def rows(self, x: Tensor) -> Tensor:
        x = x.double()
        return x.movedim(1, 2).reshape(-1, self.channels) if self.kind == "rows" else x


def _close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    bound = TOLERANCE[dtype] * max(1.0, float(expected.abs().max()) if expected.numel() else 1.0)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound)


@given(kinds, sizes, dtypes, st.booleans())
def test_moments(kind: str, size: tuple[int, int, int], dtype: torch.dtype, weighted: bool) -> None:
    case = Case(kind, size, dtype, weighted)
    hidden = torch.where(case.weights > 0, 0.0, torch.nan).unsqueeze(1).expand(-1, case.channels)
    mean, var, count = ragged.moments(case.x + case.activation(hidden, dtype), case.layout, case.spans)
    values = case.rows(case.x)
    for sample, members in enumerate(case.members):
        weights = case.weights[members].unsqueeze(1)
        total = weights.sum()
        share = weights / total if total > 0 else weights
        expected = (share * values[members]).sum(0)
        _close(mean[sample], expected, table_dtype(dtype))
        _close(var[sample], (share * (values[members] - expected) ** 2).sum(0), table_dtype(dtype))
        torch.testing.assert_close(count[sample].double(), total.view(1), rtol=1e-5, atol=1e-6)


@given(kinds, sizes, dtypes, st.sampled_from(("", "n", "c", "nc")))
def test_affine_and_sums(kind: str, size: tuple[int, int, int], dtype: torch.dtype, shift: str) -> None:
    case, exact = Case(kind, size, dtype, False), table_dtype(dtype)
    samples, channels = case.samples, case.channels
    scale, center = torch.randn(2, samples, channels, dtype=exact)
    shapes = {"n": (samples, 1), "c": (1, channels), "nc": (samples, channels)}
    table = torch.randn(shapes[shift], dtype=exact) if shift else None
    y = ragged.affine(case.x, scale, table, case.layout, case.spans)
    g = torch.randn_like(case.x)
    first, zeroth = ragged.sums(g, case.x, center if shift else None, case.layout, case.spans)
    wide = torch.zeros(samples, channels) if table is None else table.expand(samples, channels)
    incoming, values, made = (case.rows(t) for t in (g, case.x, y))
    for sample, members in enumerate(case.members):
        _close(made[members], scale[sample].double() * values[members] + wide[sample].double(), dtype)
        scatter = len(members) ** 0.5 * 10
        torch.testing.assert_close(zeroth[sample].double(), incoming[members].sum(0), rtol=0, atol=1e-6 * scatter)
        products = (incoming[members] * values[members]).sum(0)
        torch.testing.assert_close(first[sample].double(), products, rtol=1e-6, atol=1e-6 * scatter)


@given(kinds, sizes, dtypes, st.booleans(), st.sampled_from(("mean", "var", "both")), st.booleans())
def test_combine(
    kind: str, size: tuple[int, int, int], dtype: torch.dtype, weighted: bool, which: str, scaled: bool
) -> None:
    case, exact = Case(kind, size, dtype, weighted), table_dtype(dtype)
    samples, channels = case.samples, case.channels
    mean, dmean, dvar = torch.randn(3, samples, channels, dtype=exact)
    scale = torch.randn(samples, 1, dtype=exact) if scaled else None
    count = 1 + torch.rand(samples, 1, dtype=exact)
    g = torch.randn_like(case.x)
    hidden = torch.where(case.weights > 0, 0.0, torch.nan).unsqueeze(1).expand(-1, channels)
    x = case.x + case.activation(hidden, dtype)
    tables = (None if which == "var" else dmean, None if which == "mean" else dvar)
    dx = case.rows(ragged.combine(g, x, scale, *tables, mean, count, case.layout, case.spans))
    incoming, values = case.rows(g), case.rows(case.x)
    of_mean, of_var = (torch.zeros(samples, channels).double() if t is None else t.double() for t in tables)
    for sample, members in enumerate(case.members):
        part = of_mean[sample] + 2 * of_var[sample] * (values[members] - mean[sample].double())
        factor = 1.0 if scale is None else scale[sample].double()
        expected = factor * incoming[members] + case.weights[members].unsqueeze(1) * part / count[sample].double()
        _close(dx[members], expected, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_on_any_number_of_threads(kind: str) -> None:
    case = Case(kind, (7, 66, 90), torch.float32, True)
    g, tables = torch.randn_like(case.x), torch.randn(7, 66)

    def everything() -> list[Tensor]:
        mean, var, count = ragged.moments(case.x, case.layout, case.spans)
        y = ragged.affine(case.x, tables, tables, case.layout, case.spans)
        first, zeroth = ragged.sums(g, case.x, mean, case.layout, case.spans)
        dx = ragged.combine(g, case.x, tables, mean, var, mean, count, case.layout, case.spans)
        return [mean, var, count, y, first, zeroth, dx]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = everything()
        torch.set_num_threads(2)
        assert all(torch.equal(one, two) for one, two in zip(alone, everything(), strict=True))
    finally:
        torch.set_num_threads(before)
