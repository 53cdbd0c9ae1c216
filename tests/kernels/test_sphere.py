"""The compiled step: it is what runs, equals the plain loop whatever it is given, and any number of threads agrees."""

import logging

import pytest
import torch
from sphere_cases import PAIRS, drive, gradients, parameters
from torch import nn

from flexnorm.kernels import build, sphere
from flexnorm.optim import AdamG, batches

CLASSES = [cls for cls, _ in PAIRS.values()]
both = pytest.mark.parametrize("cls", CLASSES)
needs_compiler = pytest.mark.skipif(build._compiler() is None, reason="no C compiler on this machine")


@pytest.fixture
def only_c(monkeypatch):
    """Any weight that does not go the compiled way is an error, unless it is to go one by one."""
    make = batches._plan

    def checked(params, state, options):
        plan = make(params, state, options)
        assert options.foreach is False or all(batch._in_c is not None for batch in plan.batches)
        return plan

    monkeypatch.setattr(batches, "_plan", checked)


def compare(cls, shapes, dtype=torch.float64, steps=5, atol=1e-12, change=lambda t: t, prepare=lambda p: p, **kwargs):
    """Drive the compiled step and the plain loop with the same gradients."""
    results = []
    for foreach in (None, False):
        params = [nn.Parameter(prepare(p.detach())) for p in parameters(shapes, dtype)]
        optimizer = cls(params, lr=0.05, foreach=foreach, **kwargs)
        for step in range(steps):
            for p, g in zip(params, gradients(params, step), strict=True):
                p.grad = change(g)
            optimizer.step()
        results.append((params, optimizer))
    (a, one), (b, two) = results
    assert all(one.state[p].keys() == two.state[q].keys() for p, q in zip(a, b, strict=True))
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=atol)
        for key, value in one.state[p].items():
            if key != "exp_avg" or kwargs.get("betas", (1,))[0]:  # without a decay rate nobody reads it
                torch.testing.assert_close(value, two.state[q][key], rtol=1e-6, atol=atol)


@needs_compiler
@both
@pytest.mark.parametrize("ortho", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_of_a_network_goes_the_compiled_way(cls, ortho, maximize, dtype, only_c):
    shapes = [(4, 9), (4, 9), (6, 2, 3), (1, 7), (5, 1), (8, 3, 3, 3), (3, 2, 2, 2, 2), (9, 4)]
    atol = 1e-12 if dtype == torch.float64 else 1e-5
    compare(cls, shapes, dtype, ortho=ortho, maximize=maximize, atol=atol)


@needs_compiler
@both
def test_tensor_lr_and_no_momentum(cls, only_c):
    compare(cls, [(4, 9), (3, 5)], **({"betas": (0.0, 0.9)} if cls is AdamG else {"momentum": 0.0}))
    a, b = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    drive(cls(a, lr=torch.tensor(0.05, dtype=torch.float64)), a, 3)
    drive(cls(b, lr=0.05), b, 3)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@needs_compiler
@both
@pytest.mark.parametrize("ortho", [0.0, 0.1])
def test_rows_in_any_order_of_memory_and_gradients_in_another(cls, ortho, only_c):
    last = {"memory_format": torch.channels_last}
    shapes = [(6, 4, 3, 3), (5, 8, 1, 1)]
    compare(cls, shapes, prepare=lambda p: p.to(**last), ortho=ortho)  # contiguous gradients
    compare(cls, shapes, prepare=lambda p: p.to(**last), change=lambda g: g.to(**last), ortho=ortho)
    compare(cls, shapes, change=lambda g: g.to(**last), ortho=ortho)
    compare(cls, shapes, change=lambda g: g.transpose(0, 1).contiguous().transpose(0, 1), ortho=ortho)


@needs_compiler
@both
def test_what_it_does_not_take_is_left_to_torch(cls):
    def outer(p):
        return p.transpose(0, 1).contiguous().transpose(0, 1)

    compare(cls, [(4, 9), (4, 9)], prepare=outer, change=outer)
    params = [*parameters([(4, 9), (4, 9)]), *parameters([(4, 9)], torch.bfloat16), nn.Parameter(torch.zeros(0, 3))]
    params[1] = nn.Parameter(outer(params[1].detach()))
    optimizer, seen = cls(params, lr=0.1, ortho_every=1), []
    optimizer.observer = seen.append
    drive(optimizer, params, 2)
    assert {id(view.param) for view in seen} == {id(p) for p in params[:3]}
    (plan,) = optimizer._workspace._plans.values()
    in_c = {job.index for batch in plan.batches if batch._in_c is not None for job in batch.jobs}
    others = {job.index for batch in plan.batches if batch._in_c is None for job in batch.jobs}
    assert (in_c, others) == ({0}, {1, 2})  # the last is empty
    assert all(float(optimizer.state[p]["step"]) == 2 for p in params if cls is AdamG)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_any_size_and_direction(cls, dtype, foreach):
    """Huge, tiny, zero, and along the row: where a norm overflows or the tangent part is what rounding leaves."""
    double = dtype == torch.float64
    huge, tiny = (1e200, 1e-200) if double and foreach is False else (1e30, 1e-30)
    p = nn.Parameter(parameters([(6, 5)], torch.float64)[0].detach().to(dtype))
    before = p.detach().clone()
    (g,) = gradients([p], 0, scale=1.0)
    p.grad = torch.stack([g[1], g[1] * huge, g[2] * tiny, 0 * g[3], 1e6 * before[4], before[5] * huge])
    seen = []
    optimizer = cls([p], lr=0.5, ortho=0.0, foreach=foreach)
    optimizer.observer = seen.append
    optimizer.step()
    assert p.isfinite().all()
    torch.testing.assert_close(p.detach().double().norm(dim=1), torch.ones(6, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(p[2:4], before[2:4])
    tangent = g[1].double() - (g[1].double() @ before[1].double()) * before[1].double()
    torch.testing.assert_close(seen[0].tangent_norm[1].double() / huge, tangent.norm(), rtol=1e-5, atol=0)
    # A gradient along the row has no tangent part but rounding.
    assert float(seen[0].tangent_norm[4]) < 1e7 * torch.finfo(dtype).eps
    if cls is not AdamG:
        assert float(seen[0].angle[1]) == pytest.approx(0.05, rel=1e-6)


@needs_compiler
def test_float64_products_beyond_the_range_of_doubles():
    for scale in (1e200, 1e-200):
        compare(PAIRS["sgdg"][0], [(4, 9)], change=lambda g, scale=scale: g * scale, ortho=0.0, steps=3)
        compare(PAIRS["sgdg"][0], [(4, 9)], change=lambda g, s=scale: g * s, ortho=0.0, momentum=0.0, maximize=True)


@both
def test_a_row_pruned_on_the_way_stays_pruned_and_at_rest(cls, foreach):
    (p,) = parameters([(4, 9)])
    optimizer = cls([p], lr=0.1, foreach=foreach)
    drive(optimizer, [p], 3)
    with torch.no_grad():
        p[1] = 0
    drive(optimizer, [p], 3, start=3)
    state = optimizer.state[p]
    moment = state["exp_avg" if cls is AdamG else "momentum_buffer"]
    assert (p[1] == 0).all()
    assert (moment[1] == 0).all()
    torch.testing.assert_close(p.detach().norm(dim=1), torch.tensor([1.0, 0.0, 1.0, 1.0]))


@both
def test_a_row_pruned_on_the_way_when_compiled(cls, untraced):
    (p,) = parameters([(4, 9)])
    optimizer = cls([p], lr=0.1, compile=True)
    drive(optimizer, [p], 2)
    with torch.no_grad():
        p[1] = 0
    drive(optimizer, [p], 2, start=2)
    assert (p[1] == 0).all()
    assert (optimizer.state[p]["exp_avg" if cls is AdamG else "momentum_buffer"][1] == 0).all()


@needs_compiler
@both
def test_any_number_of_threads_gives_the_same_bits(cls):
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            params = parameters([(40, 300), (64, 27), (7, 5000), (1, 70_000)])
            drive(cls(params, lr=0.1, ortho=0.0), params, 3)
            results.append(params)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


@needs_compiler
@both
def test_autograd_notices_that_weights_changed(cls):
    (p,) = parameters([(4, 9)])
    loss = (p * p).sum()
    p.grad = torch.ones_like(p)
    cls([p], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_compiler
def test_weights_of_different_age_in_one_call(only_c):
    ages = {}
    for foreach in (None, False):
        params = parameters([(4, 9), (4, 9), (3, 5)], torch.float64)
        optimizer = AdamG(params, lr=0.05, foreach=foreach)
        for step in range(6):
            for i, (p, g) in enumerate(zip(params, gradients(params, step), strict=True)):
                p.grad = None if step < 2 * i else g
            optimizer.step()
        ages[foreach] = params
        assert [int(optimizer.state[p]["step"]) for p in params] == [6, 4, 2]
    for p, q in zip(ages[None], ages[False], strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A machine that has compiled nothing yet."""
    monkeypatch.setenv("FLEXNORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FLEXNORM_KERNELS", raising=False)
    sphere.load.cache_clear()
    yield tmp_path / "cache"
    sphere.load.cache_clear()


@needs_compiler
def test_it_is_built_once_with_a_line_in_the_log(fresh, caplog):
    with caplog.at_level(logging.INFO, "flexnorm"):
        assert sphere.load() is not None
    assert "compiling the optimizer kernels once" in caplog.text
    (library,) = fresh.iterdir()
    assert library.name.startswith("sphere-")


@both
def test_without_it_steps_are_taken_by_torch(cls, fresh, monkeypatch):
    monkeypatch.setenv("FLEXNORM_KERNELS", "0")
    assert sphere.load() is None
    params, expected = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    drive(cls(params, lr=0.1), params, 3)
    drive(cls(expected, lr=0.1, foreach=False), expected, 3)
    assert not fresh.exists()
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
