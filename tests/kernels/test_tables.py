"""Tables between the passes: in one C call or by torch's operations, with the same values and derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from flexnorm.kernels import normalization, passes, tables
from flexnorm.nn import rules

pytestmark = pytest.mark.skipif(normalization.load() is None, reason="needs a C compiler")
SHAPES = [(1, 1), (5, 3), (3, 300)]
Pair = tuple[Tensor, Tensor]


def moments(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = True) -> Pair:
    mean, var = torch.randn(shape, dtype=dtype), torch.rand(shape, dtype=dtype) + 0.2
    return mean.requires_grad_(grad), var.requires_grad_(grad)


def never(name: str, *_: object) -> None:
    pytest.fail(f"called {name}")


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_pooling_is_that_of_the_union(shape: tuple[int, int], dim: int) -> None:
    values = torch.randn(*shape, 7, dtype=torch.float64)
    var, mean = torch.var_mean(values, 2, correction=0)
    joined_var, joined = torch.var_mean(values, (dim, 2), correction=0)
    for backend in ("c", "composed"):
        pooled, pooled_var = tables.pool(mean, var, dim, backend)
        assert pooled.shape == pooled_var.shape == ((shape[0], 1) if dim else (1, shape[1]))
        torch.testing.assert_close(pooled.flatten(), joined)
        torch.testing.assert_close(pooled_var.flatten(), joined_var)


@pytest.mark.parametrize("dim", [0, 1])
def test_derivatives_of_pooling(dim: int) -> None:
    pair = moments(4, 3)
    for chosen in (lambda *p: p, lambda *p: p[0], lambda *p: p[1]):
        assert gradcheck(lambda *p, f=chosen: f(*tables.pool(*p, dim, "c")), pair)
        assert gradgradcheck(lambda *p, f=chosen: f(*tables.pool(*p, dim, "c")), pair)


def test_pooling_leaves_other_strides_and_empty_tables_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "call", never)
    mean, var = moments(3, 4, grad=False)
    tables.pool(mean.T, var.T, 0, "c")
    tables.pool(mean.view(3, 2, 2), var.view(3, 2, 2), 2, "c")
    tables.pool(mean, var, 0, "torch")
    for table in tables.pool(torch.zeros(3, 0), torch.zeros(3, 0), 0, "composed"):
        assert table.shape == (1, 0)


@pytest.mark.parametrize("poison", [None, 0, 1], ids=["finite", "mean", "var"])
@pytest.mark.parametrize("momentum", [0.3, 0.0, None])
@pytest.mark.parametrize("function", ["track", "follow"])
def test_running_statistics_are_the_same_on_both_backends(
    function: str, momentum: float | None, poison: int | None
) -> None:
    kept = {backend: (*moments(4, grad=False), torch.tensor(0)) for backend in ("c", "composed")}
    for a, b in zip(*kept.values(), strict=True):
        b.copy_(a)
    for _ in range(3):
        batch = moments(1, 4, grad=False)
        if poison is not None:
            batch[poison][0, 2] = float("inf")
        for backend, (mean, var, batches) in kept.items():
            version = mean._version
            if function == "track":
                tables.track(batch, (mean, var), batches, momentum, 6, backend)
            else:
                tables.follow(batch, (mean, var), batches, momentum, backend)
            assert mean._version > version
    for a, b in zip(*kept.values(), strict=True):
        torch.testing.assert_close(a, b)
    assert kept["c"][2] == (3 if poison is None else 0)


def test_a_count_of_other_processes_and_unlike_types_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, kept, batches = moments(1, 4, grad=False), moments(4, grad=False), torch.tensor(0)
    plain = [t.clone() for t in kept]
    tables.track(batch, (plain[0], plain[1]), batches, 0.5, 6, "c")
    monkeypatch.setattr(tables, "call", never)
    tables.track(batch, kept, batches, 0.5, torch.tensor(6.0, dtype=torch.float64), "c")
    for a, b in zip(kept, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    low = (batch[0].float(), batch[1].float())
    tables.track(low, kept, batches, 0.5, 6, "c")
    tables.follow(low, kept, batches, 0.5, "c")
    tables.guard(low, kept, 1e-5, 2.0, "c")
    assert batches == 4


def test_guard_bounds_both_moments_and_tells_how_many_moved() -> None:
    batch = (torch.tensor([[0.0, 0.0, 0.0, float("nan")]]), torch.tensor([[1.0, 1.0, 1.0, 1.0]]))
    kept = (torch.tensor([0.5, -9.0, 0.0, 7.0]), torch.tensor([1.0, 1.0, 100.0, 50.0]))
    (mean, var), moved = tables.guard(batch, kept, 0.0, 2.0, "c")
    torch.testing.assert_close(mean, torch.tensor([0.5, -1.0, 0.0, 7.0]))
    torch.testing.assert_close(var, torch.tensor([1.0, 1.0, 4.0, 50.0]))
    assert moved == 0.5
    (other_mean, other_var), _ = tables.guard(batch, kept, 0.0, 2.0, "composed")
    torch.testing.assert_close(other_mean, mean)
    torch.testing.assert_close(other_var, var)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("backend", ["c", "composed"])
def test_derivatives_of_unitization(backend: str, affine: bool) -> None:
    inputs = [*moments(4, 3), *moments(3), *(t if affine else None for t in moments(3)), moments(3)[0]]

    def function(*given: Tensor) -> Pair:
        left = iter(given)
        m, v, mean, var, weight, bias, alpha = (None if t is None else next(left) for t in inputs)
        return tables.unitize((m, v), (mean, var), weight, bias, alpha, 1e-3, 9, backend)

    given = tuple(t for t in inputs if t is not None)
    assert gradcheck(function, given)
    assert gradgradcheck(function, given)


def test_unitization_by_a_count_of_other_processes_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (moments(4, 3), moments(3), None, None, moments(3)[0], 1e-5)
    want = tables.unitize(*arguments, 9, "c")
    monkeypatch.setattr(tables, "call", never)
    for a, b in zip(tables.unitize(*arguments, torch.tensor(9.0), "c"), want, strict=True):
        torch.testing.assert_close(a, b)
    tables.unitize(*arguments, 9, "torch")
    tables.unitize(arguments[0], moments(3, dtype=torch.float32), *arguments[2:], 9, "c")


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("backend", ["c", "composed"])
def test_statistics_that_follow_the_weights_are_renormalization_without_limits(backend: str, affine: bool) -> None:
    batch, kept = moments(1, 4), moments(4, grad=False)
    weight, bias = moments(4) if affine else (None, None)
    leaves = [t for t in (*batch, weight, bias) if t is not None]
    free = float("inf")
    results = []
    for pair in (
        tables.follow_weights(batch, kept, weight, bias, 1e-3, backend),
        rules.renormalize(*batch, *kept, weight, bias, r_max=free, d_max=free, eps=1e-3),
    ):
        once = torch.autograd.grad(pair, leaves, [t.detach().cos() for t in pair], retain_graph=True)
        first = torch.autograd.grad(pair, leaves, [t.cos() for t in pair], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, allow_unused=True)
        results.append([*pair, *once, *first, *second])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_by_operations() -> None:
    a, b = moments(3)
    (da, db) = passes.gradients(lambda x, y: (x * y, x), [a, b], [True, False, True], (None, torch.ones_like(a)))
    assert db is None
    torch.testing.assert_close(da, torch.ones_like(a))
    da, nothing, db = passes.gradients(lambda x, _, y: x * y * y, [a, None, b], [True] * 3, [b])
    assert nothing is None
    torch.testing.assert_close(db, 2 * a * b * b)
    # Twice differentiable while gradients are on: d/db of (2 a b) b.
    torch.testing.assert_close(torch.autograd.grad(db.sum(), b)[0], 4 * a * b)
    with torch.no_grad():
        assert not passes.gradients(lambda x: x.exp(), [a], [True], [b])[0].requires_grad


def test_a_backward_is_composed_when_it_is_differentiated_batched_or_transformed() -> None:
    x = torch.ones(3)
    assert passes.must_compose(x)
    with torch.no_grad():
        assert not passes.must_compose(x, None)
        seen = []
        torch.vmap(lambda t: (seen.append(passes.must_compose(t)), t)[1])(x)
        assert seen == [True]
