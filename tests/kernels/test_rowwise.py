"""The backward of tokens by moments of their own, in one pass: rules that fit it, rules that must not, all right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flexnorm import flex_norm
from flexnorm.kernels import rowwise

pytestmark = pytest.mark.skipif(rowwise.load() is None, reason="no C compiler on this machine")

C, EPS = 96, 1e-3


def _layer(m: Any, w: Tensor, b: Tensor) -> tuple[Any, Any]:
    p = m.pool("channels")
    scale = w * (p.var + EPS).rsqrt()
    return scale, b - p.mean * scale


def _rms(m: Any, w: Tensor, b: Tensor) -> tuple[Any, Any]:
    return w * (m.pool("channels").mean_square + EPS).rsqrt(), 0.0


def _bare(m: Any, w: Tensor, b: Tensor) -> tuple[Any, Any]:
    p = m.pool("channels")
    scale = 1 / (p.var + EPS).sqrt()
    return scale, -p.mean * scale


def _odd(m: Any, w: Tensor, b: Tensor) -> tuple[Any, Any]:
    """Scale and shift depend on mean and variance, each its own way."""
    p = m.pool("channels")
    return w * torch.sigmoid(p.mean + p.var.square()), b + w * (p.mean * p.var).tanh()


def _joined(m: Any, w: Tensor, b: Tensor) -> tuple[Any, Any]:
    """Moments of all tokens enter: no derivative is a number of one token."""
    p = m.pool("channels")
    scale = w * (p.var / p.var.mean() + EPS).rsqrt()
    return scale, b - p.mean * scale


def _by_batch(m: Any, w: Tensor, b: Tensor) -> tuple[Any, Any]:
    p, q = m.pool("channels"), m.pool("batch")
    scale = w * (p.var + EPS).rsqrt()
    return scale, b + q.mean - p.mean * scale


def _learned(m: Any, w: Tensor, b: Tensor) -> tuple[Any, Any]:
    """A number that is learned enters between the moments and the factor."""
    p = m.pool("channels")
    scale = w * (p.var + w[0].square() + EPS).rsqrt()
    return scale, b - p.mean * scale


FITS = [_layer, _rms, _odd]
RULES = [*FITS, _bare, _joined, _by_batch, _learned]


def _naive(rule: Callable[..., Any], x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    class Whole:
        def __init__(self, axis: int) -> None:
            self.var, self.mean = torch.var_mean(x, axis, correction=0, keepdim=True)
            self.mean_square = x.square().mean(axis, keepdim=True)

        def pool(self, over: str) -> Whole:
            return Whole(1 if over == "channels" else 0)

    scale, shift = rule(Whole(1), w, b)
    return scale * x + shift


def _as_image(t: Tensor) -> Tensor:
    """A token at each position of contiguous images."""
    return t.reshape(-1, 37, 3, C).movedim(-1, 1).contiguous()


@pytest.mark.parametrize("image", [False, True], ids=["tokens", "positions"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_gradients(rule: Callable[..., Any], dtype: torch.dtype, image: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    inner = rowwise.backward
    monkeypatch.setattr(rowwise, "backward", lambda *args: calls.append(rule) or inner(*args))
    table = torch.float64 if dtype == torch.float64 else torch.float32
    x = (torch.randn(333, C, dtype=torch.float64) * 2 + 1).to(dtype)
    w, b = torch.rand(2, C, dtype=table) + 0.5
    g = torch.randn(333, C, dtype=torch.float64).to(dtype)
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    others = [t.double().requires_grad_() for t in (x, w, b)]
    if image:
        leaves[0] = _as_image(leaves[0].detach()).requires_grad_()
    y = flex_norm(leaves[0], rule, *leaves[1:], per_position=True)
    found = list(torch.autograd.grad(y, leaves, _as_image(g) if image else g, allow_unused=True))
    if image and found[0] is not None:
        found[0] = found[0].movedim(1, -1).reshape(x.shape)
    wanted = torch.autograd.grad(_naive(rule, *others), others, g.double(), allow_unused=True)
    rtol = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    for got, want in zip(found, wanted, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got.double(), want, rtol=rtol, atol=rtol * float(want.abs().max()))
    assert bool(calls) == (rule in FITS or rule is _bare), "what is made of other tokens too is left to autograd"


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, w, b = torch.randn(333, C, requires_grad=True), torch.rand(C), torch.rand(C, requires_grad=True)
    y = flex_norm(x, _layer, w, b)
    dx, db = torch.autograd.grad(y, [x, b], torch.ones_like(y))
    torch.testing.assert_close(db, torch.full((C,), 333.0))
    other = x.detach().requires_grad_()
    (only,) = torch.autograd.grad(flex_norm(other, _layer, w, b.detach()).sum(), other)
    torch.testing.assert_close(dx, only)


def test_threads_do_not_change_the_bits() -> None:
    x, w, b = torch.randn(777, C, requires_grad=True), *(t.requires_grad_() for t in torch.rand(2, C).unbind())
    results, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(torch.autograd.grad(flex_norm(x, _layer, w, b).square().sum(), [x, w, b]))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
