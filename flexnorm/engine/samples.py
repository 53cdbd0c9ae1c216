"""Samples: activations whose positions share their moments, as in convolutional networks.

The graph of one call is ``x -> _Moments -> rule (ordinary autograd on (N, C) tables) -> _Affine -> y``. The backward
takes two passes over the activation: ``_Affine`` reduces the incoming gradient g to the two tables that the rule's
autograd needs, and leaves the rest of its work to ``_Moments``, which writes ``dx = scale*g + a + b*(x - mean)`` in one
go. For that, ``_Affine`` passes g itself along a private way to ``_Moments``, with the scale beside it.

Channels last, what a rule asks of the batch alone is taken from the activation as tokens: (N, C) tables are not small
where the maps are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor

from flexnorm.engine.moments import Moments
from flexnorm.engine.tokens import Tokens
from flexnorm.kernels import passes
from flexnorm.kernels.layout import Layout
from flexnorm.kernels.passes import gradients, must_compose
from flexnorm.kernels.tables import Pair, pool

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_Pending: TypeAlias = "list[Tensor] | None"


class _Moments(torch.autograd.Function):
    """Moments of x, and x itself for the affine pass, so that this node sees every gradient of x at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, pending: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = passes.moments(x, layout)
        ctx.save_for_backward(x, mean)
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.pending = layout, pending
        return mean, var, x.view_as(x)

    @staticmethod
    def backward(
        ctx: Any, dmean: Tensor | None, dvar: Tensor | None, g: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        x, mean = ctx.saved_tensors
        scale = ctx.pending.pop() if ctx.pending else None
        if must_compose(dmean, dvar, g):
            # Double backward: g is the finished part of the gradient, everything stays in the graph.
            grads = (dmean, dvar, None if g is None else g.to(mean.dtype))
            (dx,) = gradients(lambda v: (*passes.composed_moments(v), v), [x.to(mean.dtype)], [True], grads)
            return None if dx is None else dx.to(x.dtype), None, None
        if dmean is None and dvar is None:
            return (g if g is None or scale is None else passes.affine(g, scale, None, ctx.layout)), None, None
        g = torch.zeros_like(x) if g is None else g
        return passes.combine(g, x, scale, dmean, dvar, mean, ctx.layout), None, None


class _Affine(torch.autograd.Function):
    """``y = scale * x + shift``; tables broadcast to (N, C), ``center`` (N, C) conditions the sums of the backward.

    ``pending`` takes the scale still to be applied to the gradient that goes to :class:`_Moments` along ``through``.
    That holds for this node's part only, so nothing else may use ``through``: what a double backward computes from the
    activation, it computes from ``x``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        through: Tensor,  # noqa: ARG004 - the same values; its gradient is what matters
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        center: Tensor | None,
        layout: Layout,
        pending: _Pending,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, center)
        ctx.layout, ctx.pending, ctx.shift_shape = layout, pending, shift.shape
        return passes.affine(x, scale, shift, layout)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, center = ctx.saved_tensors
        layout, needed = ctx.layout, ctx.needs_input_grad
        if ctx.pending is not None:
            ctx.pending.clear()
        if must_compose(g):
            # The value of the shift does not matter to any gradient.
            inputs = [x, scale, scale.new_zeros(ctx.shift_shape, requires_grad=True)]
            found = gradients(passes.composed_affine, inputs, (needed[0], *needed[2:4]), (g,))
            return found[0], None, *found[1:], None, None, None
        if layout.backend != "composed" and g.stride() != x.stride():
            g = torch.empty_like(x).copy_(g)  # the kernels walk both alike
        dx, dscale, dshift = None, None, None
        if needed[2] or needed[3]:
            dscale, dshift = passes.sums(g, x, center, layout, (scale.shape, ctx.shift_shape))
        if needed[0] and ctx.pending is None:
            dx = passes.affine(g, scale, None, layout)
        elif needed[0]:
            ctx.pending.append(scale)
            dx = g
        return dx, None, dscale, dshift, None, None, None


class Samples:
    """The activation of one call, and what its moments need.

    Args:
        x: The activation, (N, C, *spatial).
        layout: Its layout.
    """

    def __init__(self, x: Tensor, layout: Layout) -> None:
        self.x, self.layout = x, layout
        self.tokens = Tokens(x, 1, layout, None) if layout.backend == "c" and layout.order == "cols" else None
        self._through: Tensor | None = None
        self._pending: list[Tensor] = []
        self._own: Pair | None = None
        self._differentiable = False

    def own(self, differentiable: bool) -> Pair:
        """Moments of each channel of each sample, (N, C)."""
        differentiable = differentiable and torch.is_grad_enabled() and self.x.requires_grad
        if self._own is None or differentiable > self._differentiable:
            if differentiable:
                # After moments of the batch, along their way: then their node adds its part to a finished gradient.
                x = self.x if self.tokens is None else self.tokens.through
                mean, var, self._through = _Moments.apply(x, self.layout, self._pending)  # type: ignore[no-untyped-call]
            else:
                mean, var = passes.moments(self.x, self.layout)
            self._own, self._differentiable = (mean, var), differentiable
        mean, var = self._own
        return (mean, var) if differentiable else (mean.detach(), var.detach())

    def batch(self, differentiable: bool) -> Pair:
        """Moments of each channel over the batch, (1, C): pooled from those of the samples if there are any."""
        if self.tokens is None or self._own is not None:
            return pool(*self.own(differentiable), 0, self.layout.backend)
        return self.tokens.reduce(("batch", 0), differentiable)

    def affine(self, scale: Tensor, shift: Tensor) -> Tensor:
        """``scale * x + shift``; tables of two axes that broadcast to (N, C)."""
        if self.tokens is not None and self._own is None and scale.shape[0] == shift.shape[0] == 1:
            return self.tokens.affine(self.tokens.terms(scale, "scale"), self.tokens.terms(shift, "shift"))
        if not torch.is_grad_enabled() or not (self.x.requires_grad or scale.requires_grad or shift.requires_grad):
            return passes.affine(self.x, scale, shift, self.layout)
        origin, link = (self.x, None) if self._through is None else (self._through, self._pending)
        center = None if self._own is None else self._own[0].detach()
        made = _Affine.apply(origin, self.x, scale, shift, center, self.layout, link)  # type: ignore[no-untyped-call]
        return cast("Tensor", made)


class SampleMoments(Moments):
    """The moments that a rule for samples receives; those of the batch are computed when they are read."""

    def __init__(
        self, source: Samples, count: int, process_group: ProcessGroup | None, differentiable: bool = True
    ) -> None:
        def compute(wanted: bool) -> Pair:  # a method would make a circle, in which the graph lives until it is found
            return source.own(wanted and differentiable)

        super().__init__(count=count, process_group=process_group, backend=source.layout.backend, _compute=compute)
        self._source = source
        self._differentiable = differentiable

    def detach(self) -> Moments:
        """Return the same moments outside the graph: for running statistics, at the price of one forward pass only."""
        return SampleMoments(self._source, cast("int", self.count), self.process_group, False)

    def _pool_batch(self) -> Moments:
        source, differentiable, samples = self._source, self._differentiable, self._source.layout.size[0]
        if self.process_group is not None or source.tokens is None:
            return super()._pool_batch()
        count = cast("int", self.count) * samples
        return Moments(count=count, backend="c", _compute=lambda wanted: source.batch(wanted and differentiable))
