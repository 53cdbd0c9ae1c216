"""The passes over tokens against float64 operations: every form of the tables, every type, both memory orders."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import reference_tokens as reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexnorm.kernels import tokens
from flexnorm.kernels.layout import Layout, table_dtype
from flexnorm.kernels.tokens import Source

ORDERS = ("cols", "rows")
FORMS = ("r", "c", "b", "R", "B", "cc", "bc", "br", "rb", "Br", "bB", "cb")  # capitals: a row factor per group
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}

pytestmark = pytest.mark.skipif(tokens.load() is None, reason="no C compiler on this machine")

sizes = st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 70), st.sampled_from((1, 2, 3, 12)))
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
orders = st.sampled_from(ORDERS)


def _activation(
    size: tuple[int, int, int], order: str, dtype: torch.dtype, offset: float = 3.0
) -> tuple[Tensor, Layout]:
    samples, channels, positions = size
    shape = size if order == "rows" else (samples * positions, channels)
    return (offset + 2 * torch.randn(shape)).to(dtype), Layout("c", order, size)


def _terms(form: str, count: int, channels: int, groups: int, dtype: torch.dtype) -> tokens.Terms:
    rows = {**dict.fromkeys("rb", 1), **dict.fromkeys("RB", groups)}
    return tuple(
        (
            torch.randn(count, rows[kind], dtype=dtype) if kind in rows else None,
            torch.randn(channels, dtype=dtype) if kind in "cbB" else None,
        )
        for kind in form
    )


def _close(found: Tensor, expected: Tensor, dtype: torch.dtype, values: float = 1.0) -> None:
    """Within the rounding of ``dtype``, relative to what ``values`` numbers of its size sum up to."""
    bound = TOLERANCE[dtype] * max(float(expected.abs().max()), values**0.5)
    torch.testing.assert_close(found.double(), expected.reshape(found.shape), rtol=0, atol=bound)


def _all_close(found: Iterable, expected: Iterable, dtype: torch.dtype, values: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        for of_ours, of_theirs in zip(ours, theirs, strict=True):
            assert (of_ours is None) == (of_theirs is None)
            if of_ours is not None:
                _close(of_ours, of_theirs, dtype, values)


@given(sizes, dtypes, orders)
def test_moments_of_each_token(size: tuple[int, int, int, int], dtype: torch.dtype, order: str) -> None:
    samples, width, positions, groups = size
    x, layout = _activation((samples, width * groups, positions), order, dtype)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    for own, expected in zip(
        tokens.row_moments(x, layout, groups), reference.row_moments(x, layout, groups), strict=True
    ):
        assert own.shape == (samples * positions, groups)
        _close(own, expected, exact)


@given(sizes, dtypes, orders, st.booleans())
def test_moments_of_the_batch(size: tuple[int, int, int, int], dtype: torch.dtype, order: str, weighted: bool) -> None:
    samples, width, positions, groups = size
    x, layout = _activation((16 * samples, width * groups, positions), order, dtype)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    weights = None
    if weighted:
        count = 16 * samples * positions
        weights = torch.rand(count, dtype=exact) * (torch.rand(count) > 0.5)
        weights[-1] = 1.0
        hidden = torch.where(weights > 0, 0.0, torch.nan).to(dtype)
        x += hidden.unsqueeze(1) if order == "cols" else hidden.view(16 * samples, 1, positions)
    own = tokens.column_moments(x, layout, weights)
    for found, expected in zip(own, reference.column_moments(x, layout, weights), strict=True):
        assert found.shape == (1, width * groups)
        _close(found, expected, exact)


@given(sizes, dtypes, orders, st.sampled_from(FORMS), st.sampled_from(("", *FORMS)))
def test_affine(size: tuple[int, int, int, int], dtype: torch.dtype, order: str, scale: str, shift: str) -> None:
    samples, width, positions, groups = size
    x, layout = _activation((samples, width * groups, positions), order, dtype)
    tables = [_terms(form, samples * positions, width * groups, groups, table_dtype(dtype)) for form in (scale, shift)]
    y = tokens.affine(x, *tables, layout)
    assert y.shape == x.shape
    assert y.dtype == dtype
    _close(reference.matrix(y, layout), reference.affine(x, *tables, layout), dtype)


@given(sizes, dtypes, orders, st.sampled_from(FORMS), st.sampled_from(("", *FORMS)), st.sampled_from("01Gc"))
def test_sums(
    size: tuple[int, int, int, int], dtype: torch.dtype, order: str, scale: str, shift: str, center: str
) -> None:
    samples, width, positions, groups = size
    channels, count = width * groups, samples * positions
    x, layout = _activation((samples, channels, positions), order, dtype)
    g = torch.randn_like(x)
    exact = table_dtype(dtype)
    scales, shifts = (_terms(form, count, channels, groups, exact) for form in (scale, shift))
    shapes = {"0": None, "1": (count, 1), "G": (count, groups), "c": (1, channels)}
    shape = shapes[center]
    about = None if shape is None or (count == 1 and center == "G") else torch.randn(shape, dtype=exact)
    found = tokens.sums(g, x, about, scales, shifts, layout)
    for own, expected in zip(found, reference.sums(g, x, scales, shifts, layout), strict=True):
        _all_close(own, expected, exact, 100.0 * max(count, channels))


@given(
    sizes,
    dtypes,
    orders,
    st.sampled_from((None, *FORMS)),
    st.sampled_from((None, "r", "R")),
    st.sampled_from((None, "c", "w")),
    st.sampled_from(("mean", "var", "both")),
)
def test_combine(
    size: tuple[int, int, int, int],
    dtype: torch.dtype,
    order: str,
    scale: str | None,
    rows: str | None,
    columns: str | None,
    which: str,
) -> None:
    samples, width, positions, groups = size
    channels, count, exact = width * groups, samples * positions, table_dtype(dtype)
    x, layout = _activation((samples, channels, positions), order, dtype)

    def source(shape: tuple[int, int], number: float, weights: Tensor | None) -> Source:
        mean, dmean, dvar = torch.randn(3, *shape, dtype=exact)
        return Source(mean, None if which == "var" else dmean, None if which == "mean" else dvar, number, weights)

    of_rows = None if rows is None else source((count, 1 if rows == "r" else groups), channels / 2, None)
    weights = torch.rand(count, dtype=exact) * (torch.rand(count) > 0.5) if columns == "w" else None
    of_columns = None if columns is None else source((1, channels), count / 2, weights)
    terms = None if scale is None else _terms(scale, count, channels, groups, exact)
    g = torch.randn_like(x)
    dx = tokens.combine(g, x, terms, of_rows, of_columns, layout)
    assert dx.dtype == dtype
    _close(reference.matrix(dx, layout), reference.combine(g, x, terms, of_rows, of_columns, layout), dtype)


@pytest.mark.parametrize("order", ORDERS)
def test_what_weighs_nothing_is_not_read(order: str) -> None:
    x, layout = _activation((4, 6, 5), order, torch.float32)
    weights = torch.ones(20)
    weights[7:11] = 0
    mean = torch.zeros(1, 6)
    source = Source(mean, mean + 1, mean + 2, 16.0, weights)
    expected = tokens.combine(x, x, None, None, source, layout)
    hidden = torch.where(weights > 0, 0.0, torch.nan)
    spoilt = x + (hidden.unsqueeze(1) if order == "cols" else hidden.view(4, 1, 5))
    assert torch.equal(tokens.combine(x, spoilt, None, None, source, layout), expected)


@pytest.mark.parametrize("order", ORDERS)
def test_nothing_that_counts_has_no_moments(order: str) -> None:
    x, layout = _activation((4, 6, 5), order, torch.float32)
    assert not any(table.any() for table in tokens.column_moments(x * torch.nan, layout, torch.zeros(20)))


@pytest.mark.parametrize("order", ORDERS)
def test_a_mean_of_a_thousand_deviations_costs_no_digits(order: str) -> None:
    x, layout = _activation((8, 96, 70), order, torch.float32, offset=2e3)
    for own, expected in (
        (tokens.row_moments(x, layout, 2), reference.row_moments(x, layout, 2)),
        (tokens.column_moments(x, layout), reference.column_moments(x, layout)),
    ):
        torch.testing.assert_close(own[0].double(), expected[0], rtol=2e-7, atol=0)
        torch.testing.assert_close(own[1].double(), expected[1], rtol=1e-5, atol=0)
    # The gradient of a weight: what comes by the scale and what comes by the shift cancel but for the deviations.
    g = torch.randn_like(x)
    mean, var = tokens.row_moments(x, layout)
    inverse, weight = var.rsqrt(), torch.ones(96)
    (of_scale,), (of_shift, _) = tokens.sums(
        g, x, mean, ((inverse, weight),), ((-mean * inverse, weight), (None, weight)), layout
    )
    values, incoming = (reference.matrix(t, layout) for t in (x, g))
    expected_weight = ((values - mean.double()) * inverse.double() * incoming).sum(0)
    assert of_scale[1] is not None
    assert of_shift[1] is not None
    error = (of_scale[1].double() + of_shift[1].double() - expected_weight).abs().max()
    summand = float((mean * inverse).abs().mean()) * 560**0.5
    assert error < 1e-6 * summand


@pytest.mark.parametrize("order", ORDERS)
def test_the_same_bits_on_any_number_of_threads(order: str) -> None:
    x, layout = _activation((9, 66, 150), order, torch.float32)
    g = torch.randn_like(x)
    weights = torch.rand(9 * 150)

    def everything() -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        row, column = torch.randn(1350, 1, generator=generator), torch.randn(66, generator=generator)
        mean, var = tokens.row_moments(x, layout)
        tables = ((row, column),), ((row, column), (None, column))
        found = [mean, var, *tokens.row_moments(x, layout, 3), *tokens.column_moments(x, layout)]
        found += [*tokens.column_moments(x, layout, weights), tokens.affine(x, *tables, layout)]
        for about, (scale, shift) in ((mean, tables), (column.view(1, -1), (((None, column),), ((None, column),)))):
            for terms in tokens.sums(g, x, about, scale, shift, layout):
                found += [t for term in terms for t in term if t is not None]
        source = Source(mean, mean, var, 66.0)
        return [*found, tokens.combine(g, x, tables[0], source, None, layout)]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = everything()
        torch.set_num_threads(2)
        assert all(torch.equal(one, two) for one, two in zip(alone, everything(), strict=True))
    finally:
        torch.set_num_threads(before)
