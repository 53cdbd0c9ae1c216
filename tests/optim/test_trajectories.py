"""Every path of both optimizers, step by step, against the float64 references written straight from the paper."""

import math

import pytest
import torch
from sphere_cases import PAIRS, SHAPES, SMALL, drive, gradients, parameters

OPTIONS = {
    "sgdg": {
        "paper": {},
        "every third step": {"ortho_every": 3},
        "no momentum": {"momentum": 0.0},
        "no clip": {"grad_clip": None},
        "no regularizer": {"ortho": 0.0},
        "bare": {"momentum": 0.0, "grad_clip": None, "ortho": 0.0},
        "heavy": {"momentum": 0.99, "ortho": 0.5, "grad_clip": 0.02},
        "long steps": {"lr": 20.0, "momentum": 0.0, "grad_clip": 0.2, "ortho": 0.0},
    },
    "adamg": {
        "paper": {},
        "every third step": {"ortho_every": 3},
        "no first moment": {"betas": (0.0, 0.99)},
        "no second moment": {"betas": (0.9, 0.0)},
        "no clip": {"grad_clip": None},
        "no regularizer": {"ortho": 0.0},
        "large eps": {"eps": 1e-3},
    },
}
ALL = [(name, option) for name, options in OPTIONS.items() for option in options]


def run(name, option, dtype, steps=100, shapes=SMALL, **path):
    optimizer_class, reference_class = PAIRS[name]
    kwargs = {"lr": 0.2 if name == "sgdg" else 0.01, "ortho_every": 1, **OPTIONS[name][option]}
    params = parameters(shapes, dtype)
    optimizer = optimizer_class(params, **kwargs, **path)
    clip = kwargs.pop("grad_clip", 0.1)
    reference = reference_class([p.flatten(1) for p in params], grad_clip=math.inf if clip is None else clip, **kwargs)
    worst = 0.0
    for step in range(steps):
        grads = gradients(params, step)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
        if step == 0:  # each weight begins where the optimizer finds that the work is spread most evenly
            waits = [optimizer.state[p].get("ortho_wait", 0) for p in params]
            reference.ortho_first = [(wait + 1) % kwargs["ortho_every"] for wait in waits]
        reference.step([g.flatten(1) for g in grads])
        for p, w in zip(params, reference.weights, strict=True):
            worst = max(worst, float((p.detach().flatten(1).double() - w).abs().max()))
    return worst, optimizer, params, reference


@pytest.mark.quick(8)
@pytest.mark.parametrize(("name", "option"), ALL)
def test_float64_equals_reference(name, option, foreach):
    worst, *_ = run(name, option, torch.float64, foreach=foreach)
    assert worst < 1e-10  # rows that repel each other double a rounding error every few steps


@pytest.mark.quick(8)
@pytest.mark.parametrize(("name", "option"), ALL)
def test_float32_stays_close_to_reference(name, option, foreach):
    worst, *_ = run(name, option, torch.float32, steps=30, foreach=foreach)
    assert worst < 3e-5


@pytest.mark.quick(4)
@pytest.mark.parametrize(("name", "option"), ALL)
def test_the_function_that_is_compiled_equals_reference(name, option, untraced):
    worst, *_ = run(name, option, torch.float64, steps=20, compile=True)
    assert worst < 1e-12


@pytest.mark.slow
def test_compiled_by_inductor_equals_reference():
    torch._dynamo.reset()
    worst, *_ = run("sgdg", "paper", torch.float32, steps=10, shapes=[(6, 36)], compile=True)
    assert worst < 3e-6


def test_a_failing_compiler_costs_a_warning_and_no_step(monkeypatch, torch_only):
    from flexnorm.optim import step

    def fail(*args):
        raise torch._dynamo.exc.BackendCompilerFailed(fail, RuntimeError("no compiler"), None)

    monkeypatch.setattr(torch, "compile", lambda f: fail)
    step.compiled_rotation.cache_clear()
    params, expected = parameters(), parameters()
    try:
        with pytest.warns(RuntimeWarning, match="compiled step is not available"):
            drive(PAIRS["sgdg"][0](params, lr=0.2, compile=True), params, 1)
    finally:
        step.compiled_rotation.cache_clear()
    drive(PAIRS["sgdg"][0](expected, lr=0.2), expected, 1)
    for a, b in zip(params, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", PAIRS)
def test_weights_beyond_one_chunk(name, foreach):
    worst, *_ = run(name, "no regularizer", torch.float64, steps=3, shapes=SHAPES, foreach=foreach)
    assert worst < 1e-13


@pytest.mark.parametrize("name", PAIRS)
def test_state_equals_reference_and_momentum_is_tangent(name, foreach):
    _, optimizer, params, reference = run(name, "paper", torch.float64, steps=20, foreach=foreach)
    for i, p in enumerate(params):
        state = optimizer.state[p]
        tau = state["momentum_buffer" if name == "sgdg" else "exp_avg"].flatten(1)
        torch.testing.assert_close(tau, reference.tau[i], rtol=0, atol=1e-12)
        assert (p.detach().flatten(1) * tau).sum(1).abs().max() < 1e-14
        if name == "adamg":
            torch.testing.assert_close(state["exp_avg_sq"], reference.second[i], rtol=1e-9, atol=1e-15)
            assert state["exp_avg_sq"].shape == (len(p),)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_unit_norm_to_four_ulp_after_ten_thousand_steps(name, foreach):
    params = parameters([(4, 9), (4, 3, 3)])
    optimizer = PAIRS[name][0](params, lr=0.2, foreach=foreach, ortho=0.0)
    generator = torch.Generator().manual_seed(0)
    for p in params:
        p.grad = torch.zeros_like(p)
    for _ in range(1_000 if foreach is False else 10_000):
        for p in params:
            p.grad.normal_(generator=generator)
        optimizer.step()
    for p in params:
        norm = p.detach().flatten(1).double().norm(dim=1)
        assert ((norm - 1).abs() <= 4 * torch.finfo(torch.float32).eps).all()


def test_step_is_the_arc_it_claims():
    params = parameters([(5, 20)], torch.float64)
    before = params[0].detach().clone()
    (grad,) = gradients(params, 0)
    params[0].grad = grad
    PAIRS["sgdg"][0](params, lr=0.3, ortho=0.0, grad_clip=0.1).step()
    from flexnorm.optim.manifold import angle, project

    expected = 0.3 * project(before, grad).norm(dim=1).clamp(max=0.1)
    torch.testing.assert_close(angle(before, params[0].detach()), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", PAIRS)
def test_direction_does_not_depend_on_the_length_one_starts_from(name):
    a, b = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    with torch.no_grad():
        for p in b:
            p.mul_(torch.logspace(-3, 3, len(p), dtype=torch.float64).view(-1, *[1] * (p.ndim - 1)))
    for params in (a, b):
        drive(PAIRS[name][0](params, lr=0.01), params, 10)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_the_clip_bounds_loss_and_regularizer_together(name, foreach):
    # Two nearly equal rows: without a gradient of the loss, all that is left is the regularizer, and it is clipped.
    p = torch.nn.Parameter(torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0]], dtype=torch.float64))
    p.grad = torch.zeros_like(p)
    optimizer = PAIRS[name][0]([p], lr=1.0, ortho=100.0, grad_clip=0.01, foreach=foreach)
    seen = []
    optimizer.observer = seen.append
    optimizer.step()
    assert (seen[0].tangent_norm > 10).all()
    if name == "sgdg":
        torch.testing.assert_close(seen[0].angle, torch.full((2,), 0.01, dtype=torch.float64))


@pytest.mark.parametrize("name", PAIRS)
def test_maximize_climbs_the_loss_and_still_lowers_the_regularizer(name, foreach):
    a, b = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    up = PAIRS[name][0](a, lr=0.01, maximize=True, foreach=foreach)
    down = PAIRS[name][0](b, lr=0.01, foreach=foreach)
    for step in range(5):
        for p, q, g in zip(a, b, gradients(a, step), strict=True):
            p.grad, q.grad = g, -g
        up.step()
        down.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", PAIRS)
def test_a_quadratic_on_the_sphere_is_minimized(name):
    # The minimum of y^T A y on the sphere is the eigenvector of the smallest eigenvalue: a known answer.
    matrix = torch.diag(torch.tensor([3.0, 2.0, 0.5, 1.0], dtype=torch.float64))
    p = torch.nn.Parameter(torch.ones(1, 4, dtype=torch.float64))
    optimizer = PAIRS[name][0]([p], lr=0.05, ortho=0.0)
    for _ in range(600):
        optimizer.zero_grad()
        (p @ matrix @ p.T).sum().backward()
        optimizer.step()
    assert float((p @ matrix @ p.T).detach()) == pytest.approx(0.5, abs=1e-3)
