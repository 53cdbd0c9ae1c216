"""Rules that treat the tables of tokens as tensors in every odd way, against plain tensors in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flexnorm.engine import flex_norm

Rule = Callable[..., Any]


class Plain:
    """Moments of each token of values (R, C) as plain tensors."""

    def __init__(self, mean: Tensor, var: Tensor) -> None:
        self.mean, self.var = mean, var

    def pool(self, over: str, groups: int = 1) -> Plain:
        assert over == "channels"
        split = self.mean.unflatten(1, (groups, -1))
        tables = (t.expand(-1, -1, 1 if groups == 1 else split.shape[2]).flatten(1) for t in _moments(split))
        return Plain(*tables)


def _moments(split: Tensor) -> tuple[Tensor, Tensor]:
    return split.mean(2, keepdim=True), split.var(2, correction=0, keepdim=True)


def in_place(v: Tensor, mean: Tensor, w: Tensor, b: Tensor) -> Any:
    scale = v.clone()
    scale.add_(1.0)
    scale.clamp_(min=1.5)
    return scale * w, b - mean


def in_place_on_moments(v: Tensor, mean: Tensor, w: Tensor, b: Tensor) -> Any:
    v.clamp_(min=0.9)
    return v.rsqrt() * w, b - mean


def items(v: Tensor, mean: Tensor, w: Tensor, b: Tensor) -> Any:
    scale = v * 1
    scale[:3] = 0.0
    return scale * w, b - mean


def tensor_in_place(v: Tensor, mean: Tensor, w: Tensor, b: Tensor) -> Any:
    total = torch.zeros(len(v), 1, dtype=v.dtype)
    total.add_(v)
    return total, mean


def stacked(v: Tensor, mean: Tensor, w: Tensor, b: Tensor) -> Any:
    both = torch.stack([mean, v])
    return both[1].rsqrt() * w, -both[0]


def hooked(v: Tensor, mean: Tensor, w: Tensor, b: Tensor) -> Any:
    scale = v * 1
    scale.register_hook(lambda g: g * g.detach().abs())
    return scale * w, b - mean


def concatenated(v: Tensor, mean: Tensor, w: Tensor, b: Tensor) -> Any:
    both = torch.cat([mean, v], 1)
    return both[:, 1:].rsqrt(), -both[:, :1]


class Through(torch.autograd.Function):
    """Rounds, with the derivative of the identity."""

    @staticmethod
    def forward(ctx: Any, table: Tensor) -> Tensor:
        return table.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


RULES: dict[str, Rule] = {
    "in place": in_place,
    "in place on moments": in_place_on_moments,
    "items": items,
    "a tensor in place": tensor_in_place,
    "stacked": stacked,
    "concatenated": concatenated,
    "hooked": hooked,
    "straight through": lambda v, m, w, b: (Through.apply(v[:] * 3), -m),
    "tokens mixed in a tensor": lambda v, m, w, b: ((v[:].cumsum(0) + 1).rsqrt(), -v[:]),
    "tokens mixed": lambda v, m, w, b: ((v.cumsum(0) + 1).rsqrt() * w, m.flip(0)),
    "tokens turned": lambda v, m, w, b: (v.squeeze(1).flip(0).unsqueeze(1), -v),
    "rsub": lambda v, m, w, b: (torch.rsub(v, 3.0, alpha=2) * w, torch.rsub(m, b)),
    "power": lambda v, m, w, b: (2.0**-v * w, b - m),
    "remainder": lambda v, m, w, b: (v % 0.7 * w, +m),
    "equal": lambda v, m, w, b: (torch.where(v == 0, 1.0, v) * w, (v != 0) * b),
    "bound learned": lambda v, m, w, b: (v.clamp(max=w.abs().mean()).rsqrt(), 0.0),
    "bound of each channel": lambda v, m, w, b: (v.clamp(min=w), b - m),
    "by keyword": lambda v, m, w, b: (torch.mul(input=v, other=w), torch.add(m, other=b)),
    "row learned": lambda v, m, w, b: (w.mean().expand(len(v), 1), -m),
    "product": lambda v, m, w, b: (v @ w.view(1, -1), m),
}


@pytest.mark.quick(4)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("name", RULES)
def test_tables_of_tokens_behave_as_tensors(name: str, groups: int) -> None:
    if groups > 1 and name in (
        "concatenated",
        "hooked",
        "tokens turned",
        "row learned",
        "a tensor in place",
        "product",
    ):
        pytest.skip("a rule for one number a token")
    torch.manual_seed(0)
    x = torch.randn(160, 128, dtype=torch.float64) + 0.3
    given = [x, *(torch.randn(128, dtype=torch.float64) for _ in "wb")]
    upstream = torch.randn_like(x)

    def rule(moments: Any, w: Tensor, b: Tensor) -> Any:
        pooled = moments.pool("channels", groups)
        return RULES[name](pooled.var, pooled.mean, w, b)

    def plainly(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        scale, shift = rule(Plain(x, torch.zeros_like(x)), w, b)
        return x * scale + shift

    found = []
    for function in (plainly, lambda x, w, b: flex_norm(x, rule, w, b, channel_axis=-1)):
        leaves = [t.clone().requires_grad_() for t in given]
        y = function(*leaves)
        outputs = (y * upstream).sum()
        whole = torch.autograd.grad(outputs, leaves, create_graph=True, materialize_grads=True)
        plain = torch.autograd.grad(outputs, leaves, retain_graph=True, materialize_grads=True)
        penalty = y.square().sum() + sum(g.square().sum() for g in whole)
        found.append((y, *whole, *plain, *torch.autograd.grad(penalty, leaves, materialize_grads=True)))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
