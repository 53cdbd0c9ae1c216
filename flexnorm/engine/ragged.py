"""Samples whose positions do not all count, or are not equally many, on the C kernels: masks, and graphs of a batch.

The graph of one call is that of :mod:`flexnorm.engine.samples`, with passes that read a weight or the sample of a row
where they go, and no copy of the activation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from flexnorm.kernels import ragged
from flexnorm.kernels.layout import Layout
from flexnorm.kernels.passes import gradients, must_compose
from flexnorm.kernels.ragged import Spans


class Part(NamedTuple):
    """What counts of an activation, for the kernels and in torch's operations, which are differentiable."""

    spans: Spans
    moments: Callable[[Tensor], tuple[Tensor, Tensor, Any]]
    affine: Callable[[Tensor, Tensor, Tensor], Tensor]


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, part: Part, layout: Layout, pending: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, var, count = ragged.moments(x, layout, part.spans)
        ctx.save_for_backward(x, mean, count)
        ctx.mark_non_differentiable(count)
        ctx.set_materialize_grads(False)
        ctx.part, ctx.layout, ctx.pending = part, layout, pending
        return mean, var, count, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dmean: Tensor | None, dvar: Tensor | None, _: Any, g: Tensor | None) -> tuple[Any, ...]:
        x, mean, count = ctx.saved_tensors
        scale = ctx.pending.pop() if ctx.pending else None
        if must_compose(dmean, dvar, g):
            grads = (dmean, dvar, None if g is None else g.to(mean.dtype))
            values = x.to(mean.dtype)
            (dx,) = gradients(lambda v: (*ctx.part.moments(v)[:2], v), [values], [True], grads)
            return None if dx is None else dx.to(x.dtype), None, None, None
        if dmean is None and dvar is None:
            if g is not None and scale is not None:
                g = ragged.affine(g, scale, None, ctx.layout, ctx.part.spans)
            return g, None, None, None
        g = torch.zeros_like(x) if g is None else g
        return ragged.combine(g, x, scale, dmean, dvar, mean, count, ctx.layout, ctx.part.spans), None, None, None


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        through: Tensor,  # noqa: ARG004 - as in :mod:`flexnorm.engine.samples`
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        center: Tensor,
        part: Part,
        layout: Layout,
        pending: list[Tensor] | None,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, center)
        ctx.part, ctx.layout, ctx.pending, ctx.shift_shape = part, layout, pending, shift.shape
        return ragged.affine(x, scale, shift, layout, part.spans)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, center = ctx.saved_tensors
        needed, spans, rest = ctx.needs_input_grad, ctx.part.spans, (None,) * 4
        if ctx.pending is not None:
            ctx.pending.clear()
        if must_compose(g):
            inputs = [x, scale, scale.new_zeros(ctx.shift_shape, requires_grad=True)]
            found = gradients(ctx.part.affine, inputs, (needed[0], *needed[2:4]), (g,))
            return found[0], None, *found[1:], *rest
        if g.stride() != x.stride():
            g = torch.empty_like(x).copy_(g)
        dscale, dshift = None, None
        if needed[2] or needed[3]:
            s1, s0 = ragged.sums(g, x, center, ctx.layout, spans)
            dscale, dshift = s1.sum_to_size(scale.shape), s0.sum_to_size(ctx.shift_shape)
        if not needed[0]:
            return None, None, dscale, dshift, *rest
        if ctx.pending is None:
            return ragged.affine(g, scale, None, ctx.layout, spans), None, dscale, dshift, *rest
        ctx.pending.append(scale)
        return g, None, dscale, dshift, *rest


class Ragged:
    """The activation of one call.

    Args:
        x: (N, C, *spatial), or rows (R, C) of samples of various sizes.
        part: What counts of it.
        layout: Its layout.
    """

    def __init__(self, x: Tensor, part: Part, layout: Layout) -> None:
        self._x, self._part, self._layout = x, part, layout
        self._through: Tensor | None = None
        self._pending: list[Tensor] = []
        self._center: Tensor | None = None

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and biased variance (S, C), and count (S, 1)."""
        if torch.is_grad_enabled() and self._x.requires_grad:
            made = _Moments.apply(self._x, self._part, self._layout, self._pending)  # type: ignore[no-untyped-call]
            mean, var, count, self._through = made
        else:
            mean, var, count = ragged.moments(self._x, self._layout, self._part.spans)
        self._center = mean.detach()
        return mean, var, count

    def affine(self, scale: Tensor, shift: Tensor) -> Tensor:
        """``scale * x + shift``; tables broadcast to (S, C)."""
        x = self._x
        if not torch.is_grad_enabled() or not (x.requires_grad or scale.requires_grad or shift.requires_grad):
            return ragged.affine(x, scale, shift, self._layout, self._part.spans)
        origin, link = (x, None) if self._through is None else (self._through, self._pending)
        made = _Affine.apply(origin, x, scale, shift, self._center, self._part, self._layout, link)  # type: ignore[no-untyped-call]
        return cast("Tensor", made)
