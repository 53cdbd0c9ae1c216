"""Unitized batch normalization of tokens in one node: the norm of each token would take the passes over x thrice."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from flexnorm.kernels.build import declare, library, threads
from flexnorm.kernels.normalization import SUFFIXES
from flexnorm.kernels.passes import gradients, must_compose
from flexnorm.kernels.tables import Pair, Param

_SOURCE = Path(__file__).with_name("unitize.c")
_SIGNATURES = {"forward": "ppppppddppnni", "backward": "pppppppddippppnni"}


@functools.cache
def load() -> dict[tuple[str, torch.dtype], Any] | None:
    """Return the kernels by name and type, building them if this machine has not yet; ``None`` if not."""
    found = library(_SOURCE, "unitization")
    if found is None:
        return None
    return {
        (name, dtype): declare(getattr(found[0], f"{name}_{SUFFIXES[dtype]}"), signature)
        for name, signature in _SIGNATURES.items()
        for dtype in (torch.float32, torch.float64)
    }


def unitize_tokens(
    x: Tensor, kept: Pair, of_batch: bool, weight: Param, bias: Param, alpha: Tensor, eps: float, divisor: float
) -> Tensor | None:
    """Unitized batch normalization of tokens.

    Args:
        x: (R, C), contiguous, on the CPU.
        kept: Means and biased variances, C numbers each, constants outside the graph.
        of_batch: Whether they are those of ``x``: then the gradient goes through them.
        weight: (C,), or ``None`` for 1.
        bias: (C,), or ``None`` for 0.
        alpha: (C,).
        eps: Added to variances and squared norms.
        divisor: What a squared norm is divided by.

    Returns:
        (R, C), or ``None`` where there is no kernel for the type of ``x`` or its parameters.
    """
    given = (*kept, *(t for t in (weight, bias, alpha) if t is not None))
    alike = all(t.dtype == x.dtype and t.is_contiguous() for t in given)
    if not alike or x.dtype not in (torch.float32, torch.float64) or load() is None:
        return None
    made = _Unitize.apply(x, weight, bias, alpha, *kept, of_batch, eps, divisor)  # type: ignore[no-untyped-call]
    return cast("Tensor", made)


def _run(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    kernels = load()
    assert kernels is not None
    kernels[name, dtype](*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments])


class _Unitize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Param,
        bias: Param,
        alpha: Tensor,
        mean: Tensor,
        var: Tensor,
        of_batch: bool,
        eps: float,
        divisor: float,
    ) -> Tensor:
        y, q = torch.empty_like(x), x.new_empty(len(x))
        _run("forward", x.dtype, x, mean, var, weight, bias, alpha, eps, divisor, y, q, *x.shape, threads(x.numel()))
        ctx.save_for_backward(x, weight, bias, alpha, mean, var, q)
        ctx.options = of_batch, eps, divisor
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, alpha, mean, var, q = ctx.saved_tensors
        (of_batch, eps, divisor), needed = ctx.options, ctx.needs_input_grad
        rest = (None,) * 5
        if must_compose(g):

            def compose(v: Tensor, w: Param, b: Param, a: Tensor) -> Tensor:
                spread, center = torch.var_mean(v, 0, correction=0) if of_batch else (var.view(-1), mean.view(-1))
                standard = (v - center) * (spread + eps).rsqrt()
                root = (standard.square().sum(1, keepdim=True) / divisor + eps).rsqrt()
                standard = standard * (1 - a + a * root)
                standard = standard if w is None else standard * w
                return cast("Tensor", standard if b is None else standard + b)

            return *gradients(compose, [x, weight, bias, alpha], needed, (g,)), *rest
        dx, g = torch.empty_like(x), g.contiguous()
        vectors = x.new_empty((3, x.shape[1])).unbind()
        given = (g, x, mean, var, weight, alpha, q, eps, divisor, of_batch)
        _run("backward", x.dtype, *given, dx, *vectors, *x.shape, threads(x.numel()))
        return dx, *(t if need else None for t, need in zip(vectors, needed[1:4], strict=True)), *rest
