"""Masks and segments on the C kernels: what the composition of torch's operations gives, derivatives of both orders."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from flexnorm import Segments, flex_norm
from flexnorm.engine import functional
from flexnorm.kernels import ragged
from flexnorm.nn import rules

pytestmark = pytest.mark.skipif(ragged.load() is None, reason="no C compiler on this machine")
C = 12
RULES: dict[str, Any] = {
    "batch": rules.batch,
    "layer": rules.layer,
    "group": partial(rules.group, groups=3),
    "instance": partial(rules.instance, eps=0.1),
    "unitized": partial(rules.unitized, alpha=torch.linspace(0, 1, C, dtype=torch.float64)),
    "mixed": lambda m, w, b: (w * (m.pool("batch").var + m.var + 0.1).rsqrt(), b - m.pool("all").mean),
}


def _case(kind: str, hidden: float) -> tuple[Tensor, dict[str, Any]]:
    if "segments" in kind:
        x, index = torch.randn(1500, C, dtype=torch.float64), torch.randint(0, 40, (1500,))
        index[index == 7] = 8  # a sample without rows
        index = index.sort().values if "sorted" in kind else index
        where: dict[str, Any] = {"segments": Segments(index, 41)}
        mask = torch.rand(1500) < 0.8
        if "masked" in kind:
            x[~mask] = hidden
            where["mask"] = mask
        return x, where
    x, mask = torch.randn(10, C, 15, 11, dtype=torch.float64), torch.rand(10, 15, 11)
    mask = mask * (mask > 0.3) if "weights" in kind else mask > 0.3
    mask[4] = 0  # a sample of which nothing counts
    x = torch.where(mask.unsqueeze(1) > 0, x, hidden)
    return x.to(memory_format=torch.channels_last) if "last" in kind else x, {"mask": mask}


KINDS = ["mask", "mask, channels last", "weights", "weights, channels last"]
KINDS += ["segments, sorted", "segments", "segments, masked", "segments, sorted, masked"]


@pytest.mark.quick(12)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RULES)
def test_equals_the_composition(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, where = _case(kind, hidden=3.0)
    params = torch.rand(2, C, dtype=torch.float64).unbind()
    found = []
    for composed in (False, True):
        if composed:
            monkeypatch.setattr(functional, "_left_to_torch", lambda _: True)
        leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, *params)]
        y = flex_norm(leaves[0], RULES[name], *leaves[1:], **where)
        assert ("ragged" in type(y.grad_fn).__module__ or "_AffineBackward" in type(y.grad_fn).__name__) != composed
        first = torch.autograd.grad((y**3).sum(), leaves, retain_graph=True)
        (again,) = torch.autograd.grad((y**3).sum(), leaves[0], create_graph=True)
        second = torch.autograd.grad(again.square().sum() + (y**3).sum(), leaves)
        found.append((y, *first, *second))
        assert y.stride() == x.stride()
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * float(want.detach().abs().max() + 1))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "mask" in kind or "weights" in kind])
def test_what_does_not_count_is_not_read(kind: str) -> None:
    torch.manual_seed(0)
    results = []
    for hidden in (1.0, float("nan")):
        torch.manual_seed(1)
        x, where = _case(kind, hidden)
        leaf, weight = x.requires_grad_(), torch.rand(C, dtype=torch.float64, requires_grad=True)
        y = flex_norm(leaf, rules.layer, weight, torch.zeros(C, dtype=torch.float64), **where)
        mask = where["mask"].unsqueeze(1)
        kept = torch.where(mask > 0, y, 0)
        results.append((kept, *torch.autograd.grad(kept.square().sum(), [leaf, weight])))
    for finite, other in zip(*results, strict=True):
        torch.testing.assert_close(other, finite, rtol=1e-12, atol=1e-12)
