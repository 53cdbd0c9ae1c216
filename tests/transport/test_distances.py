"""Distances against SciPy, POT, closed forms, brute force and the axioms of a metric."""

from __future__ import annotations

import itertools

import ot
import pytest
import reference_distances
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexnorm.transport import wasserstein

METHODS = ("marginal", "sliced", "max_sliced", "exact", "coupled")
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
orders = pytest.mark.parametrize("p", [1, 2, 3])
sizes = pytest.mark.parametrize(("n", "m"), [(40, 40), (40, 27), (1, 5), (1, 1)])


def draw(n: int, m: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d, dtype=dtype), 1.5 * torch.randn(m, d, dtype=dtype) + 0.5


def agree(value: Tensor, expected: object, dtype: torch.dtype) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert value.dtype == dtype
    assert value.shape == expected.shape
    torch.testing.assert_close(value.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.quick(8)
@dtypes
@orders
@sizes
def test_marginal_equals_pot_per_channel(n: int, m: int, p: int, dtype: torch.dtype) -> None:
    x, y = draw(n, m, 6, dtype)
    agree(wasserstein(x, y, p=p), ot.wasserstein_1d(x.double(), y.double(), p=p) ** (1 / p), dtype)


@dtypes
@sizes
def test_marginal_equals_scipy(n: int, m: int, dtype: torch.dtype) -> None:
    x, y = draw(n, m, 3, dtype)
    a, b = torch.rand(n, dtype=dtype) + 0.1, torch.rand(m, dtype=dtype) + 0.1
    plain = [scipy.stats.wasserstein_distance(x[:, c].double(), y[:, c].double()) for c in range(3)]
    weighted = [
        scipy.stats.wasserstein_distance(x[:, c].double(), y[:, c].double(), a.double(), b.double()) for c in range(3)
    ]
    agree(wasserstein(x, y), plain, dtype)
    agree(wasserstein(x, y, weights=(a, b)), weighted, dtype)


@orders
@pytest.mark.parametrize("weighted", [(True, True), (True, False), (False, True), (False, False)])
def test_marginal_equals_a_walk_along_both_lists(p: int, weighted: tuple[bool, bool]) -> None:
    x, y = draw(9, 14, 4, torch.float64)
    x[3], y[5] = x[2], x[2]
    a = torch.rand(9, dtype=torch.float64) if weighted[0] else None
    b = torch.rand(14, dtype=torch.float64) if weighted[1] else None
    agree(wasserstein(x, y, p=p, weights=(a, b)), reference_distances.marginal(x, y, p, a, b), torch.float64)


@pytest.mark.quick(8)
@dtypes
@orders
@sizes
def test_sliced_equals_pot_on_the_same_directions(n: int, m: int, p: int, dtype: torch.dtype) -> None:
    x, y = draw(n, m, 5, dtype)
    u = torch.randn(5, 12, dtype=dtype)
    unit = u.double() / u.double().norm(dim=0)
    a, b = torch.rand(n, dtype=torch.float64), torch.rand(m, dtype=torch.float64)
    a, b = a / a.sum(), b / b.sum()
    for weights in (None, (a, b)):
        masses = weights or (None, None)
        expected = ot.sliced_wasserstein_distance(x.double(), y.double(), *masses, p=p, projections=unit)
        agree(wasserstein(x, y, "sliced", p, projections=u, weights=weights), expected, dtype)
        expected = ot.max_sliced_wasserstein_distance(x.double(), y.double(), *masses, p=p, projections=unit)
        agree(wasserstein(x, y, "max_sliced", p, projections=u, weights=weights), expected, dtype)


def test_sliced_equals_reference() -> None:
    x, y = draw(8, 8, 3, torch.float64)
    u = torch.randn(3, 5, dtype=torch.float64)
    agree(wasserstein(x, y, "sliced", 2, projections=u), reference_distances.sliced(x, y, u, 2), torch.float64)


@pytest.mark.quick(8)
@dtypes
@orders
@sizes
def test_exact_equals_pot(n: int, m: int, p: int, dtype: torch.dtype) -> None:
    x, y = draw(n, m, 4, dtype)
    cost = torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist") ** p
    a, b = torch.rand(n, dtype=torch.float64), torch.rand(m, dtype=torch.float64)
    a[: n // 2] = 0
    a, b = a / a.sum(), b / b.sum()
    even = [torch.full((k,), 1 / k, dtype=torch.float64) for k in (n, m)]
    uniform = ot.emd2(*even, cost)
    agree(wasserstein(x, y, "exact", p), uniform ** (1 / p), dtype)
    agree(wasserstein(x, y, "exact", p, weights=(a, b)), ot.emd2(a, b, cost) ** (1 / p), dtype)


@orders
def test_exact_equals_trying_all_assignments(p: int) -> None:
    x, y = draw(6, 6, 3, torch.float64)
    agree(wasserstein(x, y, "exact", p), reference_distances.exact(x, y, p), torch.float64)


@pytest.mark.parametrize("method", METHODS)
@orders
def test_a_move_by_a_vector_costs_its_length(method: str, p: int) -> None:
    x = torch.randn(30, 4, dtype=torch.float64)
    step = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    value = wasserstein(x, x + step, method, p, projections=torch.eye(4))
    expected = {
        "marginal": step.abs(),
        "sliced": step.abs().pow(p).mean() ** (1 / p),
        "max_sliced": step.abs().max(),
    }.get(method, step.norm())
    agree(value, expected, torch.float64)


def test_doubling_costs_the_root_mean_square_of_the_norms() -> None:
    # x -> 2 x is the gradient of a convex function, hence optimal for p = 2; W_2 is the root mean square of the norms.
    x = torch.randn(50, 3, dtype=torch.float64)
    agree(wasserstein(x, 2 * x, "exact", 2), x.square().sum(-1).mean().sqrt(), torch.float64)


def test_max_sliced_looks_along_the_difference_of_the_means() -> None:
    x = torch.randn(60, 200, dtype=torch.float64)
    step = torch.randn(200, dtype=torch.float64)
    agree(wasserstein(x, x + step, "max_sliced", projections=1), step.norm(), torch.float64)
    assert wasserstein(x, x, "max_sliced") == 0


def test_two_samples_of_one_gaussian_are_far_apart_in_high_dimension() -> None:
    x, y = torch.randn(2, 128, 64, dtype=torch.float64)
    assert wasserstein(x, y, "exact") > 8
    assert wasserstein(x, x.flip(0), "exact") == 0


points = st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=1, max_size=6)


def cloud(values: list[tuple[int, int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64) / 7


@given(points, points, points, st.sampled_from([1, 2]), st.sampled_from(["exact", "sliced", "max_sliced"]))
def test_axioms_of_a_metric(a: list, b: list, c: list, p: int, method: str) -> None:
    x, y, z = cloud(a), cloud(b), cloud(c)
    axes = torch.eye(2, dtype=torch.float64)

    def distance(u: Tensor, v: Tensor) -> float:
        return float(wasserstein(u, v, method, p, projections=axes))

    assert distance(x, x) == 0
    assert distance(x, y) >= 0
    assert distance(x, y) == pytest.approx(distance(y, x), abs=1e-9)
    assert distance(x, z) <= distance(x, y) + distance(y, z) + 1e-6
    assert distance(3 * x, 3 * y) == pytest.approx(3 * distance(x, y), abs=1e-9)
    assert distance(x + 5, y + 5) == pytest.approx(distance(x, y), abs=1e-6)
    assert distance(x.repeat(2, 1), y) == pytest.approx(distance(x, y), abs=1e-6)
    assert distance(x.flip(0), y) == pytest.approx(distance(x, y), abs=1e-9)


@given(points, points)
def test_weights_count_points(a: list, b: list) -> None:
    x, y = cloud(a), cloud(b)
    copies = torch.arange(1, len(x) + 1)
    repeated = x.repeat_interleave(copies, 0)
    for method in ("marginal", "exact"):
        weighted = wasserstein(x, y, method, weights=(copies.double(), None))
        torch.testing.assert_close(weighted, wasserstein(repeated, y, method), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
@orders
def test_gradients(method: str, p: int) -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u, v: wasserstein(u, v, method, p, projections=4), (x, y))


@pytest.mark.parametrize("method", ["marginal", "sliced", "exact"])
def test_gradients_between_unequal_sizes(method: str) -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u, v: wasserstein(u, v, method, 2, projections=4), (x, y))


@pytest.mark.parametrize("method", ["marginal", "sliced", "max_sliced"])
def test_gradients_of_the_weights(method: str) -> None:
    x, y = draw(5, 4, 2, torch.float64)
    a = (torch.rand(5, dtype=torch.float64) + 0.5).requires_grad_()
    u = torch.randn(2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda w: wasserstein(x, y, method, 2, weights=(w, None), projections=u), (a,))


@pytest.mark.parametrize("method", METHODS)
@orders
def test_gradient_of_equal_samples_is_zero(method: str, p: int) -> None:
    x = torch.randn(6, 3)
    y = x.clone().requires_grad_()
    wasserstein(x, y, method, p).sum().backward()
    assert y.grad is not None
    assert torch.equal(y.grad, torch.zeros_like(y))


@pytest.mark.parametrize("method", METHODS)
def test_leading_axes_are_a_batch_and_broadcast(method: str) -> None:
    x, y = torch.randn(2, 3, 6, 4), torch.randn(3, 6, 4)
    value = wasserstein(x, y, method, 2)
    for i, j in itertools.product(range(2), range(3)):
        torch.testing.assert_close(value[i, j], wasserstein(x[i, j], y[j], method, 2))


def test_batched_weights() -> None:
    x, y, a = torch.randn(2, 6, 4), torch.randn(2, 5, 4), torch.rand(2, 6)
    for method in ("marginal", "sliced", "exact"):
        value = wasserstein(x, y, method, weights=(a, None))
        for i in range(2):
            torch.testing.assert_close(value[i], wasserstein(x[i], y[i], method, weights=(a[i], None)))


def test_points_on_the_line_need_no_second_axis() -> None:
    assert wasserstein(torch.tensor([0.0, 1.0]), torch.tensor([2.0]), "exact") == 1.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_computed_in_float32(dtype: torch.dtype) -> None:
    x, y = torch.randn(8, 3).to(dtype), torch.randn(8, 3).to(dtype)
    for method in METHODS:
        assert torch.equal(wasserstein(x, y, method), wasserstein(x.float(), y.float(), method))


def test_autocast_does_not_round_the_projections() -> None:
    x, y = torch.randn(8, 3), torch.randn(8, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = wasserstein(x, y, "sliced")
    assert torch.equal(inside, wasserstein(x, y, "sliced"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_neither_overflow_nor_vanish(method: str, scale: float) -> None:
    x, y = draw(6, 6, 3, torch.float32)
    scaled, plain = wasserstein(x * scale, y * scale, method, 2), wasserstein(x, y, method, 2) * scale
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=0)


def test_samples_and_memory_stay_as_they_are() -> None:
    x = torch.randn(3, 9).T
    kept = x.clone()
    y = torch.randn(9, 3)
    state = torch.get_rng_state()
    for method in METHODS:
        wasserstein(x, y, method)
        wasserstein(x[:, :1], y[:, :1], method)
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), state)


def test_vmap_and_compile_give_the_same() -> None:
    x, y = torch.randn(3, 6, 2), torch.randn(3, 6, 2)
    plain = wasserstein(x, y)
    torch.testing.assert_close(torch.vmap(wasserstein)(x, y), plain)
    compiled = torch.compile(wasserstein, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, y), plain)


def test_nan_is_passed_on_or_refused() -> None:
    x, y = draw(5, 5, 2, torch.float32)
    x[0, 0] = torch.nan
    assert wasserstein(x, y).isnan().tolist() == [True, False]
    assert wasserstein(x, y, p=2).isnan().tolist() == [True, False]
    with pytest.raises(ValueError, match="x holds 1 values that are NaN"):
        wasserstein(x, y, "exact")


def test_failure_of_the_solver_is_an_error() -> None:
    x, y = draw(40, 30, 3, torch.float64)
    with pytest.raises(RuntimeError, match="raise max_iterations"):
        wasserstein(x, y, "exact", max_iterations=1)


X = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "x must be a tensor", ([1.0], X), {}),
        (TypeError, "y must be floating point", (X, X.int()), {}),
        (ValueError, "one d", (X, torch.zeros(3, 4)), {}),
        (ValueError, "one d", (torch.tensor(1.0), X), {}),
        (ValueError, "at least one point", (X[:0], X), {}),
        (ValueError, "do not broadcast", (torch.zeros(2, 3, 2), torch.zeros(3, 3, 2)), {}),
        (ValueError, "did you mean 'sliced'", (X, X, "slices"), {}),
        (ValueError, "order p", (X, X, "exact", 0.5), {}),
        (ValueError, "same points on both sides", (X, X[:2], "coupled"), {}),
        (ValueError, "same weights", (X, X, "coupled"), {"weights": (torch.ones(3), torch.arange(3.0))}),
        (ValueError, "3 points but weights", (X, X), {"weights": (torch.ones(2), None)}),
        (ValueError, "not negative", (X, X), {"weights": (-torch.ones(3), None)}),
        (ValueError, "sum to more than 0", (X, X), {"weights": (None, torch.zeros(3))}),
        (TypeError, "weights of x must be a tensor", (X, X), {"weights": ([1, 2, 3], None)}),
        (ValueError, "projections must be a positive number", (X, X, "sliced"), {"projections": 0}),
        (ValueError, r"projections must be \(d, k\)", (X, X, "sliced"), {"projections": torch.ones(3, 2)}),
        (ValueError, "on one device", (X, X.to("meta")), {}),
    ],
)
def test_errors(error: type[Exception], message: str, arguments: tuple, options: dict) -> None:
    with pytest.raises(error, match=message):
        wasserstein(*arguments, **options)


def test_coupled_takes_the_weights_of_either_side() -> None:
    x, y, a = torch.randn(3, 2), torch.randn(3, 2), torch.tensor([1.0, 2.0, 5.0])
    expected = ((x - y).norm(dim=1) * a).sum() / 8
    for weights in ((a, None), (None, a), (a, a)):
        torch.testing.assert_close(wasserstein(x, y, "coupled", weights=weights), expected)


def test_a_common_move_does_not_change_the_distance_along_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 64, 8, generator=generator, dtype=torch.float64).float() * torch.tensor(0.1)
    exact = wasserstein(x.double(), y.double(), method="sliced", seed=0)
    moved = wasserstein(x + 100, y + 100, method="sliced", seed=0)
    rounding = wasserstein((x + 100).double(), (y + 100).double(), method="sliced", seed=0)
    torch.testing.assert_close(moved.double(), rounding, rtol=1e-6, atol=0)
    torch.testing.assert_close(rounding, exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "x must be a tensor, got list", {"x": [1.0]}),
        (TypeError, "weights must be a pair", {"weights": torch.ones(3)}),
        (TypeError, "the order p must be a number", {"p": "2"}),
        (
            ValueError,
            "on the device meta",
            {"x": torch.ones(3, 2, device="meta"), "y": torch.ones(3, 2, device="meta")},
        ),
        (ValueError, "max_iterations must be at least 1", {"method": "exact", "max_iterations": 0}),
    ],
)
def test_wrong_arguments_are_named(error: type[Exception], message: str, arguments: dict[str, object]) -> None:
    with pytest.raises(error, match=message):
        wasserstein(**{"x": torch.ones(3, 2), "y": torch.zeros(3, 2), **arguments})


def test_exact_distance_of_no_pairs_is_empty() -> None:
    assert wasserstein(torch.ones(0, 3, 2), torch.ones(0, 3, 2), method="exact").shape == (0,)
