"""flex_norm: any normalization, written as a rule on two small tables, at the speed of a fused kernel.

The graph of one call is ``x -> _Moments -> rule (ordinary autograd on (N, C) tables) -> _Affine -> y``. The backward
takes two passes over the activation: ``_Affine`` reduces the incoming gradient g to the two tables that the rule's
autograd needs, and leaves the rest of its work to ``_Moments``, which writes ``dx = scale*g + a + b*(x - mean)`` in one
go. For that, ``_Affine`` passes g itself along a private way to ``_Moments``, with the scale beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor

from flexnorm.engine.moments import Moments
from flexnorm.kernels import passes
from flexnorm.kernels.layout import Layout, layout_of, positions_of, table_dtype
from flexnorm.kernels.passes import gradients, must_compose, transformed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Rule: TypeAlias = Callable[..., tuple[Tensor, Tensor]]
_Pending: TypeAlias = list[Tensor] | None


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

    ``pending`` takes the scale still to be applied to the gradient that goes to :class:`_Moments`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, center: Tensor | None, layout: Layout, pending: _Pending
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
            return *gradients(passes.composed_affine, inputs, needed, (g,)), None, None, None
        if layout.backend != "composed" and g.stride() != x.stride():
            g = torch.empty_like(x).copy_(g)  # the kernels walk both alike
        dx, dscale, dshift = None, None, None
        if needed[1] or needed[2]:
            dscale, dshift = passes.sums(g, x, center, layout, (scale.shape, ctx.shift_shape))
        if needed[0] and ctx.pending is None:
            dx = passes.affine(g, scale, None, layout)
        elif needed[0]:
            ctx.pending.append(scale)
            dx = g
        return dx, dscale, dshift, None, None, None


def _left_to_torch(x: Tensor) -> bool:
    """Where the plain composition has to run: traced, transformed or forward-mode code, and tensors without strides."""
    return (
        torch.compiler.is_compiling()
        or transformed()
        or torch._C._get_tracing_state() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or x.is_meta
        or type(x) not in (Tensor, torch.nn.Parameter)
        or (x.requires_grad and not x.is_floating_point())
    )


def _apply_rule(rule: Rule, moments: Moments, params: tuple[Any, ...], x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift of a rule as tables of two axes that broadcast to (N, C), in the type of the tables."""
    result = rule(moments, *params)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"a rule returns the pair (scale, shift), got {type(result).__name__}")
    return _table(result[0], "scale", x), _table(result[1], "shift", x)


def _table(table: Tensor | float, name: str, x: Tensor) -> Tensor:
    if not isinstance(table, Tensor):
        if not isinstance(table, (int, float)):
            raise TypeError(f"the rule returned {table!r} as {name}; it must be a tensor or a number (0.0 for none)")
        table = torch.as_tensor(float(table), device=x.device)
    dtype = table_dtype(x.dtype)
    flat = table if table.dtype == dtype else table.to(dtype)
    if flat.dim() < 2:
        flat = flat.reshape(1, -1)
    if flat.dim() != 2 or flat.shape[0] not in (1, x.shape[0]) or flat.shape[1] not in (1, x.shape[1]):
        raise ValueError(
            f"the rule returned a {name} of shape {tuple(table.shape)}, "
            f"which does not broadcast to (N, C) = {tuple(x.shape[:2])}"
        )
    return flat


def flex_norm(x: Tensor, rule: Rule, *params: Any, process_group: ProcessGroup | None = None) -> Tensor:
    """Normalize ``x`` by a rule: ``y[n, c, ...] = scale[n, c] * x[n, c, ...] + shift[n, c]``.

    Args:
        x: (N, C) or (N, C, *spatial) with one to three spatial axes; float64, float32, bfloat16 or float16;
            contiguous, channels last, or any strides.
        rule: Called as ``rule(moments, *params)`` with the :class:`Moments` of ``x``; returns ``(scale, shift)``, each
            broadcastable to (N, C). Plain PyTorch on small tables; it may have side effects (running statistics).
        *params: Handed to the rule, typically ``weight`` and ``bias``. Gradients also reach tensors that the rule
            captures by itself.
        process_group: Pool ``moments.pool("batch")`` over the processes of this group too, on any backend.

    Returns:
        A tensor of the shape, type and memory format of ``x`` (contiguous if ``x`` has holes or overlaps). Only ``x``
        and (N, C) tables are kept for the backward.

    Raises:
        TypeError: If ``x`` is no floating-point tensor, or the rule returns no pair.
        ValueError: If ``x`` has fewer than 2 or more than 5 axes, or a table does not broadcast to (N, C).

    Examples:
        >>> def rms(moments, weight):                       # root mean square normalization, in two lines
        ...     scale = weight * (moments.pool("channels").mean_square + 1e-6).rsqrt()
        ...     return scale, torch.zeros_like(scale)
        >>> x = torch.randn(8, 16, 4, 4)
        >>> y = flex_norm(x, rms, torch.ones(16))
        >>> y.square().mean((1, 2, 3)).allclose(torch.ones(8), atol=1e-4)
        True
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"flex_norm needs a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"flex_norm needs a real floating-point tensor, got {x.dtype}; convert it with x.float()")
    if not 2 <= x.dim() <= 5:
        shape = tuple(x.shape)
        raise ValueError(f"flex_norm needs (N, C) or (N, C, *spatial) with 1 to 3 spatial axes, got shape {shape}")
    count = positions_of(x)
    if _left_to_torch(x):
        moments = Moments(count=count, process_group=process_group, _compute=lambda _: passes.composed_moments(x))
        scale, shift = _apply_rule(rule, moments, params, x)
        return passes.composed_affine(x, scale, shift)
    layout = layout_of(x)
    if layout.order == "none":
        x = x.contiguous()
        layout = layout_of(x)
    pending: list[Tensor] = []
    through: Tensor | None = None
    center: Tensor | None = None

    def compute(differentiable: bool) -> tuple[Tensor, Tensor]:
        nonlocal through, center
        if differentiable and torch.is_grad_enabled() and x.requires_grad:
            mean, var, through = _Moments.apply(x, layout, pending)  # type: ignore[no-untyped-call]
        else:
            mean, var = passes.moments(x, layout)
        center = mean.detach()
        return mean, var

    moments = Moments(count=count, process_group=process_group, _compute=compute, _backend=layout.backend)
    scale, shift = _apply_rule(rule, moments, params, x)
    if not torch.is_grad_enabled() or not (x.requires_grad or scale.requires_grad or shift.requires_grad):
        return passes.affine(x, scale, shift, layout)
    origin, link = (x, None) if through is None else (through, pending)
    return cast("Tensor", _Affine.apply(origin, scale, shift, center, layout, link))  # type: ignore[no-untyped-call]
