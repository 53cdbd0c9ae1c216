"""Every bound holds, for every input, in floating point; and the good ones are tight where they should be."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexnorm.shift import moment_lower_bound, shift_bounds, wasserstein
from flexnorm.transport.bounds import LOWER, UPPER, _moved


def sample(kind: str, n: int, d: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    if kind == "heavy":
        return torch.sinh(6 * x)
    if kind == "cauchy":
        return x / torch.randn(n, d, generator=generator, dtype=torch.float64)
    if kind == "duplicates":
        return x.round()
    if kind == "far":
        return 1e-3 * x + 1e5
    if kind == "wild":
        return x.sign() * 10 ** (15 * x.abs().clamp(max=3))
    return x


@pytest.mark.slow
@settings(max_examples=500)
@given(
    kinds=st.tuples(*2 * [st.sampled_from(["normal", "heavy", "cauchy", "duplicates", "far", "wild"])]),
    relation=st.sampled_from(["independent", "permuted", "nearby", "scaled"]),
    n=st.integers(1, 16),
    m=st.integers(1, 16),
    d=st.integers(1, 9),
    exponent=st.integers(-280, 280),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16]),
    p=st.sampled_from([1, 1, 2, 3]),
    weighted=st.booleans(),
    seed=st.integers(0, 10**6),
)
@example(("wild", "wild"), "permuted", 12, 12, 5, 280, torch.float64, 1, False, 1)
@example(("normal", "normal"), "independent", 1, 1, 1, -280, torch.float64, 1, False, 2)
@example(("far", "far"), "permuted", 16, 16, 9, 0, torch.float64, 2, False, 3)
def test_the_interval_holds(
    kinds: tuple[str, str],
    relation: str,
    n: int,
    m: int,
    d: int,
    exponent: int,
    dtype: torch.dtype,
    p: int,
    weighted: bool,
    seed: int,
) -> None:
    g = torch.Generator().manual_seed(seed)
    x = sample(kinds[0], n, d, g)
    y = {
        "independent": lambda: sample(kinds[1], m, d, g),
        "permuted": lambda: x[torch.randperm(n, generator=g)],
        "nearby": lambda: x * (1 + 1e-9 * torch.randn(n, d, generator=g, dtype=torch.float64)),
        "scaled": lambda: 1.5 * x + 1,
    }[relation]()
    limit = {torch.float64: 280, torch.float32: 25, torch.float16: 0}[dtype]
    top = torch.finfo(dtype).max / 1e6 if dtype != torch.float16 else 100.0
    scale = 10.0 ** max(-limit, min(limit, exponent))
    x, y = ((values * scale).clamp(-top, top).to(dtype) for values in (x, y))
    weights = tuple(torch.rand(len(v), generator=g) ** 4 + 1e-9 for v in (x, y)) if weighted else None
    bounds = shift_bounds(x, y, p, weights=weights)
    value = float(wasserstein(x, y, "exact", p, weights=weights))
    assert value in bounds, (value, bounds)
    assert bounds.lower <= value <= bounds.upper
    assert max(bounds.lower_bounds.values()) == bounds.lower == bounds[bounds.best_lower]
    assert min(bounds.upper_bounds.values()) == bounds.upper == bounds[bounds.best_upper]
    assert all(math.isfinite(v) and v >= 0 for v in (*bounds.lower_bounds.values(), *bounds.upper_bounds.values()))


@pytest.mark.parametrize("p", [1, 2])
def test_every_bound_by_its_definition(p: int) -> None:
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64).exp()
    bounds = shift_bounds(x, y, p)
    marginal = wasserstein(x, y, "marginal", p)
    gap = (x.mean(0) - y.mean(0)).norm()
    mid = (x.mean(0) + y.mean(0)) / 2
    radius_x, radius_y = (x - x.mean(0)).norm(dim=1), (y - y.mean(0)).norm(dim=1)
    expected = {
        "mean": gap,
        "marginal": marginal.norm(),
        "marginal_max": marginal.max(),
        "sliced": wasserstein(x, y, "sliced", p, projections=32),
        "max_sliced": wasserstein(x, y, "max_sliced", p, projections=32),
        "radial": wasserstein((x - mid).norm(dim=1), (y - mid).norm(dim=1), "exact", p),
        "coupled": wasserstein(x, y, "coupled", p),
        "triangle": radius_x.pow(p).mean() ** (1 / p) + radius_y.pow(p).mean() ** (1 / p) + gap,
        "moment": radius_x.square().mean().sqrt() + radius_y.square().mean().sqrt() + gap,
    }
    if p == 1:
        expected["marginal_sum"] = marginal.sum() / 2
    for name, value in expected.items():
        assert bounds[name] == pytest.approx(float(value), rel=1e-7, abs=1e-7), name
    assert set(bounds.lower_bounds) == set(LOWER) - ({"marginal_sum"} if p == 2 else set())
    assert set(bounds.upper_bounds) == set(UPPER)
    assert bounds["marginal"] >= bounds["marginal_max"]
    assert bounds["marginal"] >= bounds["mean"]


def test_the_interval_closes_on_a_move_and_on_the_line() -> None:
    x = torch.randn(40, 5, dtype=torch.float64)
    step = torch.tensor([1.0, 2.0, 0.0, -1.0, 0.5], dtype=torch.float64)
    moved = shift_bounds(x, x + step)
    assert moved.upper - moved.lower < 1e-10
    assert moved.lower == pytest.approx(float(step.norm()))
    line = shift_bounds(torch.randn(30), torch.randn(22) * 3)
    assert line.upper == pytest.approx(line.lower, rel=1e-5)


def test_moment_matched_distributions_are_told_apart_by_order_four() -> None:
    # Both have mean 0 and variance 1: BatchNorm calls them equal.
    x = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(50).unsqueeze(1)
    y = torch.tensor([-2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0], dtype=torch.float64).unsqueeze(1)
    bounds = shift_bounds(x, y)
    assert bounds["mean"] == 0
    assert bounds["moment_4"] > 0.1
    torch.testing.assert_close(moment_lower_bound(x, y, 4), torch.tensor([abs(1 - 4.0) / (4 * 8)], dtype=torch.float64))
    assert float(moment_lower_bound(x, y, 4, limit=1.0)) == pytest.approx((1 - 0.25) / 4)


@given(st.integers(1, 6), st.floats(0.1, 10), st.integers(0, 10**6))
def test_moment_bound_is_below_the_distance_of_each_coordinate(order: int, limit: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, y = sample("heavy", 9, 3, g), sample("normal", 5, 3, g)
    distance = wasserstein(x, y)
    assert bool((moment_lower_bound(x, y, order, limit) <= distance * (1 + 1e-12)).all())
    assert bool((moment_lower_bound(x, y, order) <= distance * (1 + 1e-12)).all())


def test_gelbrich_is_the_distance_of_gaussians_and_needs_no_more_points_than_axes() -> None:
    x = torch.randn(4, 30, dtype=torch.float64)
    step = torch.randn(30, dtype=torch.float64)
    assert shift_bounds(x, x + step, 2)["gelbrich"] == pytest.approx(float(step.norm()), rel=1e-6)


def test_bounds_can_be_chosen() -> None:
    x = torch.randn(6, 3)
    bounds = shift_bounds(x, x + 1, include=["mean", "coupled"])
    assert set(bounds.lower_bounds) == {"mean"}
    assert set(bounds.upper_bounds) == {"coupled"}
    none = shift_bounds(x, x[:4], include=["coupled"])
    assert (none.lower, none.upper) == (0.0, math.inf)


def test_a_basis_larger_than_allowed_is_left_out() -> None:
    assert "rotated" not in shift_bounds(torch.randn(2, 600), torch.randn(3, 600)).lower_bounds
    assert "rotated" in shift_bounds(torch.randn(2, 600), torch.randn(2, 600)).lower_bounds


def test_result_is_plain_and_frozen() -> None:
    bounds = shift_bounds(torch.randn(4, 2), torch.randn(4, 2))
    assert pickle.loads(pickle.dumps(bounds)) == bounds
    with pytest.raises(AttributeError):
        bounds.lower = 0.0  # type: ignore[misc]
    with pytest.raises(KeyError, match="did you mean 'coupled'"):
        bounds["couple"]


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("one pair, points", lambda x: shift_bounds(x.unsqueeze(0), x)),
        ("NaN or infinite", lambda x: shift_bounds(x / 0, x)),
        ("did you mean 'marginal'", lambda x: shift_bounds(x, x, include=["marginals"])),
        ("the order p must be finite and at least 1", lambda x: moment_lower_bound(x, x, 0.5)),
        ("limit must be positive", lambda x: moment_lower_bound(x, x, 2, 0.0)),
    ],
)
def test_errors(message: str, call) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(3, 2))


def test_rounding_moves_every_bound_outwards() -> None:
    for p, in_power in ((1, True), (2, False), (2, True), (3, True)):
        for value in (0.0, 1e-9, 0.5, 4.0):
            low, high = (_moved(value, p, outwards, 1e-12, 2.0, in_power) for outwards in (-1, 1))
            assert 0 <= low <= value < high
            assert high - value >= 2e-12 * (1 - 1e-3)
    assert _moved(0.0, 2, 1, 1e-12, 2.0, True) > 1e-6, "the root magnifies an error of the power near 0"
    assert _moved(0.0, 2, 1, 1e-12, 0.0, True) == 0
