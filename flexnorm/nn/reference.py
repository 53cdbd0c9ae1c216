"""Slow, obvious references: each normalization straight from its definition, on whole tensors, by plain autograd.

Nothing here shares code with the engine. Use them to check a layer, never to train: they read the activation many times
and keep every intermediate result. All take ``x`` (N, C, *spatial), per-channel parameters (C,) or ``None``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexnorm.nn._base import Param


def _channels(vector: Tensor, x: Tensor) -> Tensor:
    return vector.view((1, -1) + (1,) * (x.dim() - 2))


def _affine(xhat: Tensor, weight: Param, bias: Param) -> Tensor:
    y = xhat if weight is None else xhat * _channels(weight, xhat)
    return y if bias is None else y + _channels(bias, xhat)


def _standardize_over(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    mean = x.mean(axes, keepdim=True)
    var = ((x - mean) ** 2).mean(axes, keepdim=True)
    return (x - mean) / torch.sqrt(var + eps)


def batch(x: Tensor, weight: Param = None, bias: Param = None, *, eps: float = 1e-5) -> Tensor:
    """Batch normalization: mean and variance over samples and positions."""
    return _affine(_standardize_over(x, (0, *range(2, x.dim())), eps), weight, bias)


def instance(x: Tensor, weight: Param = None, bias: Param = None, *, eps: float = 1e-5) -> Tensor:
    """Instance normalization: mean and variance over positions."""
    return _affine(_standardize_over(x, tuple(range(2, x.dim())), eps), weight, bias)


def layer(x: Tensor, weight: Param = None, bias: Param = None, *, eps: float = 1e-5) -> Tensor:
    """Layer normalization: mean and variance over channels and positions."""
    return _affine(_standardize_over(x, tuple(range(1, x.dim())), eps), weight, bias)


def group(x: Tensor, weight: Param = None, bias: Param = None, *, groups: int, eps: float = 1e-5) -> Tensor:
    """Group normalization: mean and variance over positions and the channels of a group."""
    split = x.reshape(x.shape[0], groups, -1)
    return _affine(_standardize_over(split, (2,), eps).reshape(x.shape), weight, bias)


def population(
    x: Tensor, mean: Tensor, var: Tensor, weight: Param = None, bias: Param = None, *, eps: float = 1e-5
) -> Tensor:
    """Population normalization: given mean and variance (C,)."""
    return _affine((x - _channels(mean, x)) / torch.sqrt(_channels(var, x) + eps), weight, bias)


def unitized(
    x: Tensor,
    weight: Param,
    bias: Param,
    alpha: Tensor,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    *,
    eps: float = 1e-5,
    unit_norm: str = "paper",
) -> Tensor:
    """Unitized batch normalization; batch statistics unless ``mean`` and ``var`` (C,) are given."""
    xhat = batch(x, eps=eps) if mean is None or var is None else population(x, mean, var, eps=eps)
    axes = tuple(range(1, x.dim()))
    positions = x[0, 0].numel() if x.dim() > 2 else 1
    divisor = positions**2 if unit_norm == "paper" else x.shape[1] * positions
    square = (xhat**2).sum(axes, keepdim=True) / divisor
    a = _channels(alpha, x)
    return _affine(xhat * (a / torch.sqrt(square + eps) + (1 - a)), weight, bias)


def rms(x: Tensor, weight: Param = None, *, eps: float = 1e-5) -> Tensor:
    """Root mean square normalization over channels and positions."""
    return _affine(x / torch.sqrt((x**2).mean(tuple(range(1, x.dim())), keepdim=True) + eps), weight, None)


def filter_response(x: Tensor, weight: Param = None, bias: Param = None, *, eps: float | Tensor = 1e-6) -> Tensor:
    """Filter response normalization, without its activation."""
    axes = tuple(range(2, x.dim()))
    square = (x**2).mean(axes, keepdim=True) if axes else x**2
    return _affine(x / torch.sqrt(square + torch.as_tensor(eps).abs()), weight, bias)


def renorm(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Param = None,
    bias: Param = None,
    *,
    r_max: float,
    d_max: float,
    eps: float = 1e-5,
) -> Tensor:
    """Batch renormalization with running ``mean`` and ``var`` (C,)."""
    axes = (0, *range(2, x.dim()))
    mu, sigma = x.mean(axes), torch.sqrt(x.var(axes, correction=0) + eps)
    running = torch.sqrt(var + eps)
    r = (sigma / running).clamp(1 / r_max, r_max).detach()
    d = ((mu - mean) / running).clamp(-d_max, d_max).detach()
    return _affine((x - _channels(mu, x)) / _channels(sigma, x) * _channels(r, x) + _channels(d, x), weight, bias)


def switchable(
    x: Tensor, mean_weight: Tensor, var_weight: Tensor, weight: Param = None, bias: Param = None, *, eps: float = 1e-5
) -> Tensor:
    """Switchable normalization with the statistics of the batch; order instance, layer, batch."""
    space = tuple(range(2, x.dim()))
    mean, var = torch.zeros_like(x), torch.zeros_like(x)
    for k, axes in enumerate((space, (1, *space), (0, *space))):
        own = x.mean(axes, keepdim=True) if axes else x
        mean = mean + torch.softmax(mean_weight, 0)[k] * own
        var = var + torch.softmax(var_weight, 0)[k] * (((x - own) ** 2).mean(axes, keepdim=True) if axes else x * 0)
    return _affine((x - mean) / torch.sqrt(var + eps), weight, bias)


def mean_only(x: Tensor, weight: Param = None, bias: Param = None) -> Tensor:
    """Mean-only batch normalization."""
    return _affine(x - x.mean((0, *range(2, x.dim())), keepdim=True), weight, bias)


def variance_only(x: Tensor, weight: Param = None, bias: Param = None, *, eps: float = 1e-5) -> Tensor:
    """Variance-only batch normalization."""
    var = x.var((0, *range(2, x.dim())), correction=0, keepdim=True)
    return _affine(x / torch.sqrt(var + eps), weight, bias)


def batch_instance(x: Tensor, gate: Tensor, weight: Param = None, bias: Param = None, *, eps: float = 1e-5) -> Tensor:
    """Batch-instance normalization."""
    share = _channels(gate.clamp(0, 1), x)
    return _affine(share * batch(x, eps=eps) + (1 - share) * instance(x, eps=eps), weight, bias)
