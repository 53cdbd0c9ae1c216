"""What happens between the passes, on tables of a rule's own size: pooling, running statistics, unitization.

Each function runs in one call of a C kernel where ``backend`` is ``"c"`` (the tables come from a large activation on
the CPU) and types and strides allow it, else by torch's operations: the dispatch of a dozen small operations costs more
than the passes. A double backward always goes through the operations.
"""

from __future__ import annotations

import functools
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from flexnorm.kernels.normalization import call
from flexnorm.kernels.passes import gradients, must_compose

Pair: TypeAlias = tuple[Tensor, Tensor]
"""Means and biased variances, (1, C) of a batch, (C,) as a layer keeps them; or scales and shifts."""

Param: TypeAlias = Tensor | None
"""A weight or a bias (C,); ``None`` for 1 or 0."""


def pool(mean: Tensor, var: Tensor, dim: int, backend: str) -> Pair:
    """Moments of equally large groups pooled along axis ``dim`` of their tables, which stays with length 1.

    By the formula of Chan, Golub & LeVeque (1979): the variance of a union is the mean of the variances plus the
    variance of the means. Zeros where there is nothing to pool.
    """
    if backend == "c" and mean.dim() == 2 and mean.is_contiguous() and var.is_contiguous():
        return cast("Pair", _Pool.apply(mean, var, dim))  # type: ignore[no-untyped-call]
    if mean.numel() == 0:
        # An empty batch has no moments; zeros keep 0/0 out of the graph and out of the other processes' tables.
        zeros = mean.sum(dim, keepdim=True)
        return zeros, zeros
    between, pooled = torch.var_mean(mean, dim, correction=0, keepdim=True)
    return pooled, var.mean(dim, keepdim=True) + between


def pool_unequal(mean: Tensor, var: Tensor, count: Tensor) -> Pair:
    """Moments (N, C) of samples of unlike sizes pooled over the samples, (1, C); ``count`` (N, 1) is how many values.

    What stands in the row of a sample without values does not matter; zeros where there is nothing to pool.
    """
    total = count.sum()
    share = (count / torch.where(total > 0, total, 1)).to(mean.dtype)
    mean, var = torch.where(share > 0, mean, 0), torch.where(share > 0, var, 0)
    pooled = (share * mean).sum(0, keepdim=True)
    return pooled, (share * (var + (mean - pooled).square())).sum(0, keepdim=True)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor, dim: int) -> Pair:
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
        if must_compose(dm, dv):
            through = None if dv is None else 2 * dv * (mean - pooled) / merged
            direct = None if dm is None else (dm / merged).expand(mean.shape)
            return direct if through is None else through if direct is None else direct + through, dvar, None
        dmean = torch.empty_like(mean)
        grads = [None if d is None else d.contiguous() for d in (dm, dv)]
        call("unpool_channels" if ctx.dim else "unpool_samples", mean.dtype, *grads, mean, pooled, dmean, *mean.shape)
        return dmean, dvar, None


def _in_c(backend: str, batch: Pair, kept: Pair) -> bool:
    mean, var = kept
    alike = mean.dtype == var.dtype == batch[0].dtype
    return backend == "c" and alike and mean.is_contiguous() and var.is_contiguous()


def _entering(batch: Pair, kept: Pair, batches: Tensor, count: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The batch's moments as the kept ones are stored, and whether they may enter; if so, the batch counts."""
    mean, var = (new.detach().reshape(-1).to(old.dtype) for new, old in zip(batch, kept, strict=True))
    usable = torch.isfinite(mean).all() & torch.isfinite(var).all()
    if isinstance(count, Tensor):
        usable = usable & (count > 0).all()
    batches.add_(usable.to(batches.dtype))
    return mean, var, usable


def track(batch: Pair, kept: Pair, batches: Tensor, momentum: float | None, count: int | Tensor, backend: str) -> None:
    """Let the moments of a batch of ``count`` values enter running ones in place, the variance unbiased; count it.

    A batch with a non-finite moment in any channel is left out whole. ``momentum=None`` is the cumulative average.
    """
    mean, var = kept
    if isinstance(count, int) and _in_c(backend, batch, kept):
        rate = momentum if momentum is not None else 1.0 / (int(batches) + 1)
        batches.add_(call("track", mean.dtype, *batch, *kept, rate, count / max(count - 1, 1), mean.numel()))
        torch.autograd.graph.increment_version(kept)
        return
    unbiased = (
        count / max(count - 1, 1) if isinstance(count, int) else (count / (count - 1).clamp_min(1)).to(mean.dtype)
    )
    new_mean, new_var, usable = _entering(batch, kept, batches, count)
    rate_now = momentum if momentum is not None else 1.0 / batches.clamp_min(1).to(mean.dtype)
    mean.copy_(torch.where(usable, mean + rate_now * (new_mean - mean), mean))
    var.copy_(torch.where(usable, var + rate_now * (new_var * unbiased - var), var))


def _bias_corrected(momentum: float, batches: Any) -> Any:
    """Weight of the newest of so many batches, whose weights (1 - momentum)^age are made to sum to 1."""
    return momentum / (1.0 - (1.0 - momentum) ** batches + 1e-30)


def follow(
    batch: Pair, kept: Pair, batches: Tensor, momentum: float | None, backend: str, count: int | Tensor = 1
) -> None:
    """As :func:`track`, by a bias-corrected average of biased moments that keeps the variance between batches."""
    mean, var = kept
    if isinstance(count, int) and _in_c(backend, batch, kept):
        seen = int(batches) + 1
        rate = 1.0 / seen if seen == 1 or momentum is None else _bias_corrected(momentum, seen)
        batches.add_(call("follow", mean.dtype, *batch, *kept, rate, int(seen == 1), mean.numel()))
        torch.autograd.graph.increment_version(kept)
        return
    new_mean, new_var, usable = _entering(batch, kept, batches, count)
    counted = batches.clamp_min(1).to(mean.dtype)
    first = (counted <= 1).to(mean.dtype)  # the first batch replaces the initial values
    rate_now = torch.maximum(1.0 / counted if momentum is None else _bias_corrected(momentum, counted), first)
    gap = new_mean - mean
    between = rate_now * (1 - rate_now) * gap.square() * (1 - first)
    var.copy_(torch.where(usable, (1 - rate_now) * var + rate_now * new_var + between, var))
    mean.copy_(torch.where(usable, mean + rate_now * gap, mean))


def guard(batch: Pair, kept: Pair, eps: float, ratio: float, backend: str) -> tuple[Pair, Tensor | float]:
    """Statistics (C,) within ``ratio`` of the batch's deviation and ``ratio - 1`` of its deviations from its mean.

    A channel whose moments in the batch are not finite keeps its own. Beside them the share of the channels that moved.
    """
    mean, var = kept
    if _in_c(backend, batch, kept):
        bounded = torch.empty_like(mean), torch.empty_like(var)
        moved = call("guard", mean.dtype, *batch, *kept, eps, ratio, *bounded, mean.numel())
        return bounded, moved / max(mean.numel(), 1)
    batch_mean, batch_var = (t.detach().reshape(-1) for t in batch)
    least = batch_var + eps
    new_var = torch.minimum(torch.maximum(var + eps, least / ratio**2), least * ratio**2) - eps
    reach = least.sqrt() * (ratio - 1)
    new_mean = torch.minimum(torch.maximum(mean, batch_mean - reach), batch_mean + reach)
    acted = (new_mean != mean) | ((new_var - var).abs() > 1e-3 * var)
    usable = torch.isfinite(batch_mean) & torch.isfinite(batch_var)
    return (torch.where(usable, new_mean, mean), torch.where(usable, new_var, var)), acted.float().mean()


def standardize(kept: Pair, weight: Param, bias: Param, eps: float) -> Pair:
    """Scale and shift (1, C) of given statistics, in a C kernel."""
    scale, shift = kept[0].new_empty((2, 1, kept[0].numel())).unbind()
    call("standardize", scale.dtype, *kept, weight, bias, eps, scale, shift, scale.numel())
    return scale, shift


def follow_guarded(
    batch: Pair,
    kept: Pair,
    batches: Tensor,
    momentum: float | None,
    running: bool,
    ratio: float | None,
    clipped: Tensor,
    weight: Param,
    bias: Param,
    eps: float,
) -> tuple[Pair, Pair]:
    """In one C kernel: :func:`follow` if ``running``, :func:`guard`, its share to ``clipped``, :func:`standardize`.

    Returns:
        The guarded statistics, and scale and shift.
    """
    mean, var = kept
    guarded_mean, guarded_var, scale, shift = made = mean.new_empty((4, 1, mean.numel())).unbind()
    rate = -1.0 if momentum is None else momentum
    options = (rate, running, eps, ratio or 0.0, weight, bias)
    call("population", mean.dtype, *batch, mean, var, batches, *options, *made, clipped, mean.numel())
    if running:
        torch.autograd.graph.increment_version(kept)
    return (guarded_mean, guarded_var), (scale, shift)


def unitize(
    own: Pair, kept: Pair, weight: Param, bias: Param, alpha: Tensor, eps: float, divisor: int | Tensor, backend: str
) -> Pair:
    """Scale and shift (N, C) of unitized batch normalization, :func:`flexnorm.nn.rules.unitize`.

    ``own`` are the moments of each sample (N, C); ``divisor`` is what a squared norm is divided by.
    """
    own_mean, inputs = own[0], (*own, *kept, weight, bias, alpha)
    vectors = [t for t in inputs[2:] if t is not None]
    alike = all(t.dtype == own_mean.dtype and t.is_contiguous() and t.numel() == own_mean.shape[1] for t in vectors)
    if backend != "c" or not alike or isinstance(divisor, Tensor):
        return _compose_unitize(*inputs, eps=eps, divisor=divisor)
    return cast("Pair", _Unitize.apply(eps, divisor, *inputs))  # type: ignore[no-untyped-call]


def _compose_unitize(*inputs: Any, eps: float, divisor: int | Tensor) -> Pair:
    own_mean, own_var, mean, var, weight, bias, alpha = inputs
    power = (var + eps).reciprocal()
    if isinstance(divisor, Tensor):
        divisor = torch.where(divisor > 0, divisor, 1)  # a sample of which nothing counts
    square = ((own_var + (own_mean - mean).square()) * power).sum(1, keepdim=True) / divisor
    scale = torch.addcmul(1 - alpha, alpha, (square + eps).rsqrt()) * power.sqrt()
    if weight is not None:
        scale = scale * weight
    return scale, -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)


class _Unitize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, eps: float, divisor: int, *inputs: Any) -> Pair:
        own_mean = inputs[0]
        scale, shift, q = torch.empty_like(own_mean), torch.empty_like(own_mean), own_mean.new_empty(len(own_mean))
        call("unitize", own_mean.dtype, *inputs, eps, divisor, scale, shift, q, *own_mean.shape)
        ctx.save_for_backward(*inputs, q)
        ctx.eps, ctx.divisor = eps, divisor
        return scale, shift

    @staticmethod
    def backward(ctx: Any, ds: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, q = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        if must_compose(ds, dh):
            composition = functools.partial(_compose_unitize, eps=ctx.eps, divisor=ctx.divisor)
            return None, None, *gradients(composition, inputs, needed, (ds, dh))
        own_mean, own_var, mean, var, weight, bias, alpha = inputs
        dmean, dvar = torch.empty_like(own_mean), torch.empty_like(own_mean)
        sums = torch.empty((5, own_mean.shape[1]), dtype=torch.float64)
        tables = (ds.contiguous(), dh.contiguous(), own_mean, own_var, mean, var, weight, alpha, q)
        call("unitize_backward", mean.dtype, *tables, ctx.eps, ctx.divisor, dmean, dvar, *sums, *own_mean.shape)
        found = zip((mean, var, weight, bias, alpha), needed[2:], sums.to(mean.dtype), strict=True)
        vectors = [total.view(t.shape) if t is not None and need else None for t, need, total in found]
        return None, None, dmean, dvar, *vectors


def follow_weights(batch: Pair, kept: Pair, weight: Param, bias: Param, eps: float, backend: str) -> Pair:
    """Scale and shift (1, C) of the statistics ``kept``, with the derivatives of those of the ``batch``.

    :func:`flexnorm.nn.rules.renormalize` without limits: population statistics that follow the weights.
    """
    if backend == "c" and batch[0].dtype == kept[0].dtype:
        return cast("Pair", _FollowWeights.apply(eps, *batch, weight, bias, *kept))  # type: ignore[no-untyped-call]
    return _compose_follow(*batch, weight, bias, mean=kept[0], inverse=(kept[1] + eps).rsqrt(), eps=eps)


def _compose_follow(*inputs: Any, mean: Tensor, inverse: Tensor, eps: float) -> Pair:
    batch_mean, batch_var, weight, bias = inputs
    own = (batch_var + eps).rsqrt()
    scale = own * (inverse / own).detach()
    shift = ((batch_mean - mean) * inverse).detach() - batch_mean * scale
    scale, shift = (scale, shift) if weight is None else (scale * weight, shift * weight)
    return scale, shift if bias is None else shift + bias


class _FollowWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, eps: float, *inputs: Any) -> Pair:
        batch_mean, batch_var, weight, bias, mean, var = inputs
        inverse = (var + eps).rsqrt().view(1, -1)
        scale = inverse if weight is None else inverse * weight
        shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
        ctx.save_for_backward(batch_mean, batch_var, weight, bias, mean, inverse)
        ctx.eps = eps
        return scale, shift

    @staticmethod
    def backward(ctx: Any, ds: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:
        batch_mean, batch_var, weight, bias, mean, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():
            composition = functools.partial(_compose_follow, mean=mean, inverse=inverse, eps=ctx.eps)
            inputs = (batch_mean, batch_var, weight, bias)
            return None, *gradients(composition, inputs, ctx.needs_input_grad[1:], (ds, dh)), None, None
        # With r and d constant: scale = w r / sigma_B, shift = b + w d - mu_B scale.
        gain = inverse if weight is None else inverse * weight
        dvar = -0.5 * gain * (ds - batch_mean * dh) / (batch_var + ctx.eps)
        dweight = None if weight is None else (inverse * (ds - mean * dh)).view(-1)
        return None, -gain * dh, dvar, dweight, None if bias is None else dh.view(-1), None, None
