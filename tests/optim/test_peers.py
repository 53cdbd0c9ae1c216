"""Bugs that were live in other implementations of these optimizers, each as a test of ours."""

import math

import pytest
import torch
from sphere_cases import drive, gradients, parameters
from torch import nn

from flexnorm.optim import SGDG, SGDP, AdamG, AdamP


def test_first_step_starts_from_the_projected_gradient():
    """A momentum buffer that starts as the Euclidean gradient lands at (.968, -.252) here."""
    p = nn.Parameter(torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    p.grad = torch.tensor([[3.0, 1.0]], dtype=torch.float64)
    optimizer = SGDG([p], lr=0.1, momentum=0.9, grad_clip=None, ortho=0.0)
    optimizer.step()
    expected = torch.tensor([[math.cos(0.1), -math.sin(0.1)]], dtype=torch.float64)
    torch.testing.assert_close(p.detach(), expected)
    assert abs(float((p.detach() * optimizer.state[p]["momentum_buffer"]).sum())) < 1e-15


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_momentum_has_an_effect(momentum):
    """A buffer that is rebound to a local variable instead of written to has none, and norms do not tell."""
    angles = []
    for gamma in (0.0, momentum):
        p = nn.Parameter(torch.tensor([[1.0, 0.0]], dtype=torch.float64))
        optimizer = SGDG([p], lr=0.01, momentum=gamma, grad_clip=0.1, ortho=0.0)
        seen = []
        optimizer.observer = seen.append
        for _ in range(5):
            tangent = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
            p.grad = -5.0 * p.detach() @ tangent.T  # constant push along the circle, always clipped
            optimizer.step()
        angles.append([float(view.angle[0]) for view in seen])
    torch.testing.assert_close(angles[0], [0.001] * 5, rtol=1e-9, atol=0)
    speeds = [0.001 * (1 - momentum**k) / (1 - momentum) for k in range(1, 6)]
    torch.testing.assert_close(angles[1], speeds, rtol=1e-9, atol=0)


def test_adam_corrects_the_second_moment_under_the_root():
    """With one direction to go, Adam-G is Adam on the angle: sqrt(v / bias2), not sqrt(v) / bias2."""
    p = nn.Parameter(torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    angle = nn.Parameter(torch.tensor([0.0], dtype=torch.float64))
    ours = AdamG([p], lr=0.01, betas=(0.9, 0.99), eps=0.0, grad_clip=None, ortho=0.0)
    adam = torch.optim.Adam([angle], lr=0.01, betas=(0.9, 0.99), eps=0.0)
    for step in range(30):
        slope = math.sin(step) + 0.3
        turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
        p.grad, angle.grad = slope * p.detach() @ turn, torch.tensor([slope], dtype=torch.float64)
        ours.step()
        adam.step()
        expected = torch.stack([angle.detach().cos(), angle.detach().sin()], dim=1)
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cls", [SGDG, AdamG])
def test_constructor_regularizer_is_not_ignored(cls):
    p, q = parameters([(6, 9)]), parameters([(6, 9)])
    drive(cls(p, lr=0.1, ortho=0.1), p, 3)
    drive(cls(q, lr=0.1, ortho=0.0), q, 3)
    assert cls(p, lr=0.1, ortho=0.3).param_groups[0]["ortho"] == 0.3
    assert float((p[0] - q[0]).detach().abs().max()) > 1e-4


@pytest.mark.parametrize("cls", [SGDG, AdamG])
def test_state_survives_a_change_of_the_learning_rate(cls):
    """Re-creating the optimizer at every drop, as one code does, loses it."""
    params = parameters([(4, 9)])
    optimizer = cls(params, lr=0.1)
    drive(optimizer, params, 3)
    key = "exp_avg" if cls is AdamG else "momentum_buffer"
    before = optimizer.state[params[0]][key].clone()
    optimizer.param_groups[0]["lr"] = 0.0
    drive(optimizer, params, 1, start=3)
    after = optimizer.state[params[0]][key]
    assert float(torch.nn.functional.cosine_similarity(before.flatten(), after.flatten(), dim=0)) > 0.5


@pytest.mark.parametrize("cls", [SGDG, AdamG, SGDP, AdamP])
def test_weight_decay_is_applied_once_whatever_the_dtypes(cls):
    """Decay once per dtype in a group gives 0.9025 in place of 0.95."""
    flat = {
        SGDG: {"manifold": False, "momentum": 0.0},
        AdamG: {"manifold": False, "off_manifold": "adamw"},
        SGDP: {"momentum": 0.0, "delta": 0.0},
        AdamP: {"delta": 0.0},
    }[cls]
    params = [nn.Parameter(torch.ones(2, 3, dtype=d)) for d in (torch.float32, torch.float64)]
    for p in params:
        p.grad = torch.zeros_like(p)
    cls(params, lr=0.5, weight_decay=0.1, **flat).step()
    for p in params:
        torch.testing.assert_close(p.detach().double(), torch.full((2, 3), 0.95, dtype=torch.float64))


@pytest.mark.parametrize("cls", [SGDG, AdamG])
def test_buffers_of_float64_parameters_are_float64(cls):
    params = parameters([(4, 9)], torch.float64)
    optimizer = cls(params, lr=0.1)
    drive(optimizer, params, 1)
    floats = [v for k, v in optimizer.state[params[0]].items() if isinstance(v, torch.Tensor) and k != "step"]
    assert all(v.dtype == torch.float64 for v in floats)


@pytest.mark.parametrize("cls", [SGDG, AdamG])
def test_gradients_keep_their_value_with_a_regularizer(cls):
    """Adding the gradient of the regularizer into p.grad shows up in gradient accumulation and clipping."""
    params = parameters()
    optimizer = cls(params, lr=0.1, ortho=0.5)
    grads = gradients(params, 0)
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))
