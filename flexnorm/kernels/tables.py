"""What happens between the passes, on tables of a rule's own size: pooling, running statistics, unitization.

Each function runs in one call of a C kernel where ``backend`` is ``"c"`` (the tables come from a large activation on
the CPU) and types and strides allow it, else by torch's operations: the dispatch of a dozen small operations costs more
than the passes. A double backward always goes through the operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from flexnorm.kernels.layout import transformed
from flexnorm.kernels.normalization import call

__all__ = ["follow", "guard", "pool", "population_tables", "track", "unitize_tables"]


def _var_mean(table: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Biased variance and mean along one axis, kept; zeros where there is nothing to average."""
    if table.numel() == 0:
        zeros = table.sum(dim, keepdim=True)
        return zeros, zeros
    return torch.var_mean(table, dim, correction=0, keepdim=True)


def pool(mean: Tensor, var: Tensor, dim: int, backend: str) -> tuple[Tensor, Tensor]:
    """Moments of equally large groups pooled along axis ``dim`` of their tables, which stays with length 1.

    By the formula of Chan, Golub & LeVeque (1979): the variance of a union is the mean of the variances plus the
    variance of the means.
    """
    if backend == "c" and mean.dim() == 2 and mean.is_contiguous() and var.is_contiguous():
        result = _Pool.apply(mean, var, dim)  # type: ignore[no-untyped-call]
        return cast("tuple[Tensor, Tensor]", result)
    between, pooled = _var_mean(mean, dim)
    return pooled, var.mean(dim, keepdim=True) + between


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        shape = (mean.shape[0], 1) if dim else (1, mean.shape[1])
        pooled, pooled_var = mean.new_empty(shape), mean.new_empty(shape)
        call("pool_channels" if dim else "pool_samples", mean.dtype, mean, var, pooled, pooled_var, *mean.shape)
        ctx.dim = dim
        ctx.save_for_backward(mean, pooled)
        ctx.set_materialize_grads(False)
        return pooled, pooled_var

    @staticmethod
    def backward(ctx: Any, dm: Tensor | None, dv: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        mean, pooled = ctx.saved_tensors
        merged = mean.shape[ctx.dim]
        dvar = None if dv is None else (dv / merged).expand(mean.shape)
        if not torch.is_grad_enabled() and not transformed(dm, dv):
            if dm is None and dv is None:
                return None, None, None
            dmean = torch.empty_like(mean)
            grads = [None if d is None else d.contiguous() for d in (dm, dv)]
            name = "unpool_channels" if ctx.dim else "unpool_samples"
            call(name, mean.dtype, *grads, mean, pooled, dmean, *mean.shape)
            return dmean, dvar, None
        direct: Tensor | None = None if dm is None else (dm / merged).expand(mean.shape)
        if dv is not None:
            through = 2 * dv * (mean - pooled) / merged
            direct = through if direct is None else direct + through
        return direct, dvar, None


def _in_c(backend: str, batch_mean: Tensor, mean: Tensor, var: Tensor) -> bool:
    alike = mean.dtype == var.dtype == batch_mean.dtype
    return backend == "c" and alike and mean.is_contiguous() and var.is_contiguous()


def _finite(mean: Tensor, var: Tensor) -> Tensor:
    return torch.isfinite(mean).all() & torch.isfinite(var).all()


def track(
    batch_mean: Tensor,
    batch_var: Tensor,
    count: int | Tensor,
    mean: Tensor,
    var: Tensor,
    batches: Tensor,
    momentum: float | None,
    backend: str,
) -> None:
    """Let the moments of a batch enter running statistics (C,) in place, the variance unbiased; count the batch.

    A batch with a non-finite moment in any channel is left out whole. ``momentum=None`` is the cumulative average.
    """
    if isinstance(count, int) and _in_c(backend, batch_mean, mean, var):
        rate = momentum if momentum is not None else 1.0 / (int(batches) + 1)
        correction = count / max(count - 1, 1)
        batches.add_(call("track", mean.dtype, batch_mean, batch_var, mean, var, rate, correction, mean.numel()))
        torch.autograd.graph.increment_version([mean, var])
        return
    unbiased = count / max(count - 1, 1) if isinstance(count, int) else (count / (count - 1).clamp_min(1)).float()
    new_mean = batch_mean.detach().reshape(-1).to(mean.dtype)
    new_var = batch_var.detach().reshape(-1).to(var.dtype) * unbiased
    usable = _finite(new_mean, new_var)
    batches.add_(usable.to(batches.dtype))
    rate_now = momentum if momentum is not None else 1.0 / batches.clamp_min(1).to(mean.dtype)
    mean.copy_(torch.where(usable, mean + rate_now * (new_mean - mean), mean))
    var.copy_(torch.where(usable, var + rate_now * (new_var - var), var))


def _bias_corrected(momentum: float, batches: Any) -> Any:
    """Weight of the newest of so many batches, whose weights (1 - momentum)^age are made to sum to 1."""
    return momentum / (1.0 - (1.0 - momentum) ** batches + 1e-30)


def follow(
    batch_mean: Tensor,
    batch_var: Tensor,
    mean: Tensor,
    var: Tensor,
    batches: Tensor,
    momentum: float | None,
    backend: str,
) -> None:
    """As :func:`track`, by a bias-corrected average of biased moments that keeps the variance between batches."""
    if _in_c(backend, batch_mean, mean, var):
        seen = int(batches) + 1
        rate = 1.0 / seen if seen == 1 or momentum is None else _bias_corrected(momentum, seen)
        batches.add_(call("follow", mean.dtype, batch_mean, batch_var, mean, var, rate, int(seen == 1), mean.numel()))
        torch.autograd.graph.increment_version([mean, var])
        return
    new_mean = batch_mean.detach().reshape(-1).to(mean.dtype)
    new_var = batch_var.detach().reshape(-1).to(var.dtype)
    usable = _finite(new_mean, new_var)
    batches.add_(usable.to(batches.dtype))
    counted = batches.clamp_min(1).to(mean.dtype)
    # The first batch replaces the initial values.
    first = (counted <= 1).to(mean.dtype)
    later = 1.0 / counted if momentum is None else _bias_corrected(momentum, counted)
    rate_now = torch.maximum(later, first)
    gap = new_mean - mean
    between = rate_now * (1 - rate_now) * gap.square() * (1 - first)
    var.copy_(torch.where(usable, (1 - rate_now) * var + rate_now * new_var + between, var))
    mean.copy_(torch.where(usable, mean + rate_now * gap, mean))


def guard(
    batch_mean: Tensor, batch_var: Tensor, mean: Tensor, var: Tensor, eps: float, ratio: float, backend: str
) -> tuple[Tensor, Tensor, Tensor | float]:
    """Statistics (C,) within ``ratio`` of the batch's deviation and ``ratio - 1`` of its deviations from its mean.

    Returns:
        Mean (C,), variance (C,), and the share of the channels that moved. A channel whose moments in the batch are not
        finite keeps its statistics.
    """
    if _in_c(backend, batch_mean, mean, var):
        kept_mean, kept_var = torch.empty_like(mean), torch.empty_like(var)
        inputs = (batch_mean, batch_var, mean, var, eps, ratio)
        moved = call("guard", mean.dtype, *inputs, kept_mean, kept_var, mean.numel())
        return kept_mean, kept_var, moved / max(mean.numel(), 1)
    batch_mean, batch_var = batch_mean.detach().reshape(-1), batch_var.detach().reshape(-1)
    least = batch_var + eps
    kept_var = torch.minimum(torch.maximum(var + eps, least / ratio**2), least * ratio**2) - eps
    reach = least.sqrt() * (ratio - 1)
    kept_mean = torch.minimum(torch.maximum(mean, batch_mean - reach), batch_mean + reach)
    acted = (kept_mean != mean) | ((kept_var - var).abs() > 1e-3 * var)
    usable = torch.isfinite(batch_mean) & torch.isfinite(batch_var)
    return torch.where(usable, kept_mean, mean), torch.where(usable, kept_var, var), acted.float().mean()


def _compose_unitize(tables: Sequence[Any], eps: float, divisor: int | Tensor) -> tuple[Tensor, Tensor]:
    own_mean, own_var, mean, var, weight, bias, alpha = tables
    power = (var + eps).reciprocal()
    square = ((own_var + (own_mean - mean).square()) * power).sum(1, keepdim=True) / divisor
    scale = torch.addcmul(1 - alpha, alpha, (square + eps).rsqrt()) * power.sqrt()
    if weight is not None:
        scale = scale * weight
    return scale, -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)


def unitize_tables(
    own_mean: Tensor,
    own_var: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    alpha: Tensor,
    eps: float,
    divisor: int | Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Scale and shift of unitized batch normalization (:func:`flexnorm.nn.rules.unitize`), each (N, C).

    Args:
        own_mean: Means of each sample, (N, C).
        own_var: Variances of each sample, (N, C).
        mean: Statistics, (C,) or (1, C).
        var: Statistics, (C,) or (1, C).
        weight: (C,) or ``None``.
        bias: (C,) or ``None``.
        alpha: (C,).
        eps: Added to the variance and to the squared norm.
        divisor: What the squared norm of a sample is divided by.
        backend: Where the tables come from.
    """
    inputs = (own_mean, own_var, mean, var, weight, bias, alpha)
    vectors = [t for t in inputs[2:] if t is not None]
    alike = all(t.dtype == own_mean.dtype and t.is_contiguous() and t.numel() == own_mean.shape[1] for t in vectors)
    if backend != "c" or not alike or isinstance(divisor, Tensor):
        return _compose_unitize(inputs, eps, divisor)
    result = _Unitize.apply(*inputs, eps, divisor)  # type: ignore[no-untyped-call]
    return cast("tuple[Tensor, Tensor]", result)


class _Unitize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *inputs, eps, divisor = arguments
        own_mean, alpha = inputs[0], inputs[6]
        scale, shift, q = torch.empty_like(own_mean), torch.empty_like(own_mean), own_mean.new_empty(len(own_mean))
        call("unitize", own_mean.dtype, *inputs, eps, divisor, scale, shift, q, *own_mean.shape)
        ctx.save_for_backward(*inputs[:6], alpha, q)
        ctx.eps, ctx.divisor = eps, divisor
        return scale, shift

    @staticmethod
    def backward(ctx: Any, ds: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, q = ctx.saved_tensors
        if torch.is_grad_enabled() or transformed(ds, dh):

            def composition(*tensors: Any) -> tuple[Tensor, Tensor]:
                return _compose_unitize(tensors, ctx.eps, ctx.divisor)

            return (*_partial(composition, inputs, ctx.needs_input_grad[:7], (ds, dh)), None, None)
        own_mean, own_var, mean, var, weight, bias, alpha = inputs
        dmean, dvar = torch.empty_like(own_mean), torch.empty_like(own_mean)
        sums = torch.empty((5, own_mean.shape[1]), dtype=torch.float64)
        tables = (ds.contiguous(), dh.contiguous(), own_mean, own_var, mean, var, weight, alpha, q)
        call("unitize_backward", mean.dtype, *tables, ctx.eps, ctx.divisor, dmean, dvar, *sums, *own_mean.shape)
        sums = sums.to(mean.dtype)
        vectors = [
            sums[k].view(t.shape) if t is not None and needed else None
            for k, (t, needed) in enumerate(
                zip((mean, var, weight, bias, alpha), ctx.needs_input_grad[2:7], strict=True)
            )
        ]
        return (dmean, dvar, *vectors, None, None)


def _partial(
    function: Callable[..., tuple[Tensor, Tensor]],
    inputs: Sequence[Tensor | None],
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


def population_tables(
    batch_mean: Tensor,
    batch_var: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Scale and shift (1, C) of given statistics (C,), with the derivatives of those of the batch (1, C).

    The same as :func:`flexnorm.nn.rules.renormalize` without limits, with its backward written out.
    """
    result = _Population.apply(batch_mean, batch_var, mean, var, weight, bias, eps)  # type: ignore[no-untyped-call]
    return cast("tuple[Tensor, Tensor]", result)


class _Population(torch.autograd.Function):
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
