"""Rules with their backward written out: what they do takes dozens of small operations otherwise.

On small activations the dispatch of those operations costs more than the passes. Unitization runs in one compiled call
each way where the engine has kernels. A double backward goes through the composition of torch operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from flexnorm.engine import Moments
from flexnorm.kernels.passes import transformed

__all__ = ["compose_unitize", "follow_statistics", "unitize_tables"]


def compose_unitize(
    own_mean: Tensor,
    own_var: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    alpha: Tensor,
    eps: float,
    divisor: float,
) -> tuple[Tensor, Tensor]:
    """Scale and shift (N, C) from the moments of each sample (N, C), statistics and parameters (C,)."""
    power = (var + eps).reciprocal()
    square = ((own_var + (own_mean - mean).square()) * power).sum(1, keepdim=True) / divisor
    scale = torch.addcmul(1 - alpha, alpha, (square + eps).rsqrt()) * power.sqrt()
    if weight is not None:
        scale = scale * weight
    return scale, -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)


class _Unitize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        own_mean: Tensor,
        own_var: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        alpha: Tensor,
        eps: float,
        divisor: float,
        native: Any,
    ) -> tuple[Tensor, Tensor]:
        scale, shift, q = native.unitize(own_mean, own_var, mean, var, weight, bias, alpha, eps, divisor)
        ctx.save_for_backward(own_mean, own_var, mean, var, weight, bias, alpha, q)
        ctx.eps, ctx.divisor, ctx.native = eps, divisor, native
        return scale, shift

    @staticmethod
    def backward(ctx: Any, ds: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, q = ctx.saved_tensors
        if torch.is_grad_enabled() or transformed(ds, dh):
            return (*_recomputed(inputs, ds, dh, ctx), None, None, None)
        own_mean, own_var, mean, var, weight, bias, alpha = inputs
        dmean, dvar, rows = ctx.native.deunitize(
            ds.contiguous(), dh.contiguous(), own_mean, own_var, mean, var, weight, alpha, q, ctx.eps, ctx.divisor
        )
        rows = rows.to(mean.dtype)
        vectors = [
            rows[k].view(t.shape) if t is not None and needed else None
            for k, (t, needed) in enumerate(
                zip((mean, var, weight, bias, alpha), ctx.needs_input_grad[2:7], strict=True)
            )
        ]
        return (dmean, dvar, *vectors, None, None, None)


def _recomputed(inputs: list[Tensor | None], ds: Tensor, dh: Tensor, ctx: Any) -> list[Tensor | None]:
    """Gradients that can be differentiated again, through the composition."""

    def composition(*tensors: Any) -> tuple[Tensor, Tensor]:
        mean, var, batch_mean, batch_var, weight, bias, alpha = tensors
        return compose_unitize(mean, var, batch_mean, batch_var, weight, bias, alpha, ctx.eps, ctx.divisor)

    return _partial(composition, inputs, ctx.needs_input_grad[:7], (ds, dh))


def _partial(
    function: Callable[..., tuple[Tensor, Tensor]],
    inputs: list[Tensor | None],
    needed: Sequence[bool],
    grads: tuple[Tensor, Tensor],
) -> list[Tensor | None]:
    """Gradients of a composition, themselves differentiable if gradients are on."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Some inputs are functions of others: only aliases have partial derivatives.
        aliases = [None if t is None else t.view_as(t) if again else t.detach().requires_grad_() for t in inputs]
        wanted = [t for t, need in zip(aliases, needed, strict=True) if t is not None and need]
        outputs = function(*aliases)
        found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=again, allow_unused=True))
    return [next(found) if t is not None and need else None for t, need in zip(inputs, needed, strict=True)]


def unitize_tables(
    moments: Moments,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    alpha: Tensor,
    eps: float,
    divisor: int | Tensor,
) -> tuple[Tensor, Tensor]:
    """Scale and shift of unitized batch normalization; see :func:`flexnorm.nn.rules.unitize`."""
    own_mean, own_var = moments.mean, moments.var
    tensors = [t for t in (mean, var, weight, bias, alpha) if t is not None]
    alike = all(t.dtype == own_mean.dtype and t.is_contiguous() and t.numel() == own_mean.shape[1] for t in tensors)
    if moments.native is None or not alike or isinstance(divisor, Tensor):
        return compose_unitize(own_mean, own_var, mean, var, weight, bias, alpha, eps, cast("float", divisor))
    result = _Unitize.apply(  # type: ignore[no-untyped-call]
        own_mean, own_var, mean, var, weight, bias, alpha, eps, float(divisor), moments.native
    )
    return cast("tuple[Tensor, Tensor]", result)


class _Follow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        batch_mean: Tensor,
        batch_var: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        inverse = (var + eps).rsqrt().view(1, -1)
        scale = inverse if weight is None else inverse * weight
        shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
        ctx.save_for_backward(batch_mean, batch_var, mean, inverse, weight, bias)
        ctx.eps = eps
        return scale, shift

    @staticmethod
    def backward(ctx: Any, ds: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:
        batch_mean, batch_var, mean, inverse, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():

            def composition(m: Tensor, v: Tensor, w: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
                own = (v + ctx.eps).rsqrt()
                scale = own * (inverse / own).detach()
                shift = ((m - mean) * inverse).detach() - m * scale
                scale, shift = (scale, shift) if w is None else (scale * w, shift * w)
                return scale, shift if b is None else shift + b

            needed = [ctx.needs_input_grad[k] for k in (0, 1, 4, 5)]
            parts = _partial(composition, [batch_mean, batch_var, weight, bias], needed, (ds, dh))
            return parts[0], parts[1], None, None, parts[2], parts[3], None
        # With r and d constant: scale = w r / sigma_B, shift = b + w d - mu_B scale.
        gain = inverse if weight is None else inverse * weight
        dmean = -gain * dh
        dvar = -0.5 * gain * (ds - batch_mean * dh) / (batch_var + ctx.eps)
        dweight = None if weight is None else (inverse * (ds - mean * dh)).view(-1)
        return dmean, dvar, None, None, dweight, None if bias is None else dh.view(-1), None


def follow_statistics(
    batch_mean: Tensor,
    batch_var: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Scale and shift (1, C) of given statistics (C,), with the derivatives of those of the batch (1, C).

    The same as :func:`flexnorm.nn.rules.renormalize` without limits.
    """
    result = _Follow.apply(batch_mean, batch_var, mean, var, weight, bias, eps)  # type: ignore[no-untyped-call]
    return cast("tuple[Tensor, Tensor]", result)
