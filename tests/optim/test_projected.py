"""SGDP and AdamP against their defining equations and against torch where nothing is projected."""

import pytest
import torch
from sphere_cases import SMALL, drive, gradients, parameters
from torch import nn

from evenkeel.optim import SGDP, AdamP
from evenkeel.optim.projected import projected_update


def test_projection_by_hand():
    w = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    tangent = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    update, projected = projected_update(w, tangent, torch.ones(2, 2), 0.1)
    assert projected
    torch.testing.assert_close(update, tangent)


def test_layer_is_tried_when_rows_are_not_orthogonal_to_their_gradients():
    w, g = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, -1.0]])  # orthogonal as a whole only
    update, projected = projected_update(w, g, w + torch.ones(2, 2), 0.1)
    assert projected
    torch.testing.assert_close(float((update * w).sum()), 0.0, rtol=0, atol=1e-6)


def test_other_weights_are_left_alone():
    w, u = torch.eye(2), torch.randn(2, 2)
    update, projected = projected_update(w, torch.ones(2, 2), u, 0.1)
    assert not projected
    assert torch.equal(update, u)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda p: SGDP(p, 0.1, 0.9, delta=0.0), lambda p: torch.optim.SGD(p, 0.1, 0.9)),
        (lambda p: SGDP(p, 0.1, nesterov=True, delta=0.0), lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True)),
        (lambda p: AdamP(p, 0.1, weight_decay=0.1, delta=0.0), lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1)),
    ],
)
def test_without_projection_they_are_torchs(ours, theirs):
    shapes = [*SMALL, (7,), (0, 3)]
    a, b = parameters(shapes, torch.float64, unit=False), parameters(shapes, torch.float64, unit=False)
    drive(ours(a), a, 10)
    drive(theirs(b), b, 10)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cls", [SGDP, AdamP])
def test_projected_weights_decay_by_the_ratio(cls):
    p = nn.Parameter(torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    p.grad = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    kwargs = {"momentum": 0.0} if cls is SGDP else {}
    cls([p], 0.5, weight_decay=0.1, wd_ratio=0.2, **kwargs).step()
    assert float(p[0, 0].detach()) == pytest.approx(1 - 0.5 * 0.1 * 0.2)
    assert float(p[0, 1].detach()) == pytest.approx(-0.5, rel=1e-6)


def test_momentum_does_not_make_weights_grow():
    lengths = []
    for delta in (0.1, 0.0):
        p = nn.Parameter(torch.randn(1, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
        optimizer = SGDP([p], 0.05, delta=delta)
        for step in range(50):
            (g,) = gradients([p], step, scale=1.0)
            w = p.detach()
            p.grad = g - w * (w * g).sum() / w.square().sum()
            optimizer.step()
        lengths.append(float(p.detach().norm()))
    assert lengths[0] < lengths[1]


def test_transposed_and_low_precision():
    p = nn.Parameter(torch.randn(4, 3, 2, 2).bfloat16())
    optimizer = SGDP([p], 0.1, row_dim=1, row_groups=2)
    p.grad = torch.randn_like(p)
    optimizer.step(lambda: p.sum())
    assert p.dtype == torch.bfloat16
    assert optimizer.state[p]["momentum_buffer"].dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda p: SGDP(p, -1.0), "lr must be"),
        (lambda p: SGDP(p, 1.0, 1.0), "momentum"),
        (lambda p: SGDP(p, 1.0, delta=-1.0), "delta"),
        (lambda p: AdamP(p, 1.0, (1.0, 0.9)), r"betas\[0\]"),
        (lambda p: AdamP(p, 1.0, weight_decay=-1.0), "weight_decay"),
    ],
)
def test_wrong_arguments(make, text):
    with pytest.raises(ValueError, match=text):
        make(parameters([(2, 3)]))
