"""Standardization by statistics that follow those of the batch, in one node, for what is too small for a rule.

A rule costs some fifty operations of a microsecond each, whatever the size of the input. Batch, renormalized and
population statistics all have one form, ``y = weight * (x - mean) / sqrt(var + eps) + bias`` with statistics whose
values are given and whose derivatives are those of the batch (:func:`flexnorm.kernels.tables.follow_weights`), so one
node serves them all. It needs the C kernels, at any size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from flexnorm.kernels import normalization, passes, tokens
from flexnorm.kernels.layout import Layout, best_by_torch, memory_order, positions_of
from flexnorm.kernels.normalization import call
from flexnorm.kernels.passes import gradients, must_compose
from flexnorm.kernels.tables import Pair, Param, follow_weights, pool
from flexnorm.kernels.tokens import Source

Keep = Callable[[Pair], tuple[Pair, Pair]]
"""From the moments (1, C) of a batch to the statistics (C,) to normalize it with, and their scale and shift (1, C)."""


def standardize_at_once(x: Tensor, weight: Param, bias: Param, eps: float, keep: Keep) -> Tensor | None:
    """Normalize ``x`` by what ``keep`` makes of the moments of the batch; gradients are those of the batch's moments.

    Args:
        x: (N, C, *spatial), or tokens (R, C), on the CPU.
        weight: (C,), or ``None`` for 1.
        bias: (C,), or ``None`` for 0.
        eps: Added to the variance.
        keep: Called once with the moments of the batch, outside the graph.

    Returns:
        The result, or ``None`` where there are no C kernels for ``x``, or it is a large image, contiguous.
    """
    order = memory_order(x)
    alike = all(t is None or (t.dtype == x.dtype and t.is_contiguous()) for t in (weight, bias))
    if order == "none" or not alike or x.numel() == 0 or x.dtype not in (torch.float32, torch.float64):
        return None
    if normalization.load() is None:
        return None
    layout = Layout("c", order, (x.shape[0], x.shape[1], positions_of(x)))
    if layout.size[2] == 1:
        layout = layout._replace(order="cols")
    if layout.order == "rows" and not best_by_torch(x):
        return None  # the moments of each sample are small tables there, and the rule costs nothing
    made = _Standardize.apply(x, weight, bias, eps, layout, keep)  # type: ignore[no-untyped-call]
    return cast("Tensor", made)


class _Standardize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Param, bias: Param, eps: float, layout: Layout, keep: Keep) -> Tensor:
        if layout.order == "cols":
            own, batch = None, tokens.column_moments(x, layout)
        else:
            own, spread = passes.moments(x, layout)
            batch = pool(own, spread, 0, "c")
        kept, (scale, shift) = keep(batch)
        ctx.save_for_backward(x, weight, bias, own, *batch, *kept, scale)
        ctx.eps, ctx.layout = eps, layout
        if own is not None:
            return passes.affine(x, scale, shift, layout)
        return tokens.affine(x, ((None, scale),), ((None, shift),), layout)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, own, mean, var, kept_mean, kept_var, scale = ctx.saved_tensors
        layout, needed = ctx.layout, ctx.needs_input_grad
        samples, channels, positions = layout.size
        if must_compose(g):

            def compose(v: Tensor, w: Param, b: Param) -> Tensor:
                axes = (0, *range(2, v.dim()))
                batch = (v.mean(axes).view(1, -1), v.var(axes, correction=0).view(1, -1))
                return passes.composed_affine(
                    v, *follow_weights(batch, (kept_mean, kept_var), w, b, ctx.eps, "composed")
                )

            return *gradients(compose, [x, weight, bias], needed, (g,)), None, None, None
        if g.stride() != x.stride():
            g = torch.empty_like(x).copy_(g)
        if own is None:
            (of_scale,), (of_shift,) = tokens.sums(g, x, mean, ((None, scale),), ((None, scale),), layout)
            ds, dh = cast("Tensor", of_scale[1]), cast("Tensor", of_shift[1])
        else:
            ds, dh = passes.sums(g, x, own, layout, ((1, channels), (1, channels)))
        dmean, dvar, dweight = torch.empty((3, 1, channels), dtype=x.dtype).unbind()
        tables = (ds, dh, mean, var, kept_mean, kept_var, weight)
        call("standardize_backward", x.dtype, *tables, ctx.eps, dmean, dvar, dweight, channels)
        if own is None:
            source = Source(mean, dmean, dvar, samples * positions)
            dx = tokens.combine(g, x, ((None, scale),), None, source, layout)
        else:
            every = (samples, channels)
            dmean, dvar = ((t / samples).expand(every) for t in (dmean, dvar))
            dx = passes.combine(g, x, scale, dmean, dvar, mean.expand(every).contiguous(), layout)
        of_weight = dweight.view(-1) if needed[1] else None
        return dx, of_weight, dh.view(-1) if needed[2] else None, None, None, None
