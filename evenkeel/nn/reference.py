"""Slow, obvious references: each normalization straight from its definition, on whole tensors, by plain autograd.

Nothing here shares code with the engine. Use them to check a layer, never to train: they read the activation many times
and keep every intermediate result. All take ``x`` (N, C, *spatial), per-channel parameters (C,) or ``None``.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["batch", "group", "instance", "layer", "population", "unitized"]


def _channels(vector: Tensor, x: Tensor) -> Tensor:
    return vector.view((1, -1) + (1,) * (x.dim() - 2))


def _affine(xhat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = xhat if weight is None else xhat * _channels(weight, xhat)
    return y if bias is None else y + _channels(bias, xhat)


def _standardize_over(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    mean = x.mean(axes, keepdim=True)
    var = ((x - mean) ** 2).mean(axes, keepdim=True)
    return (x - mean) / torch.sqrt(var + eps)


def batch(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Batch normalization: mean and variance over samples and positions."""
    return _affine(_standardize_over(x, (0, *range(2, x.dim())), eps), weight, bias)


def instance(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Instance normalization: mean and variance over positions."""
    return _affine(_standardize_over(x, tuple(range(2, x.dim())), eps), weight, bias)


def layer(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Layer normalization: mean and variance over channels and positions."""
    return _affine(_standardize_over(x, tuple(range(1, x.dim())), eps), weight, bias)


def group(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, groups: int, eps: float = 1e-5
) -> Tensor:
    """Group normalization: mean and variance over positions and the channels of a group."""
    split = x.reshape(x.shape[0], groups, -1)
    return _affine(_standardize_over(split, (2,), eps).reshape(x.shape), weight, bias)


def population(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """Population normalization: given mean and variance (C,)."""
    return _affine((x - _channels(mean, x)) / torch.sqrt(_channels(var, x) + eps), weight, bias)


def unitized(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    alpha: Tensor,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    *,
    eps: float = 1e-5,
    norm: str = "paper",
) -> Tensor:
    """Unitized batch normalization; batch statistics unless ``mean`` and ``var`` (C,) are given."""
    xhat = batch(x, eps=eps) if mean is None or var is None else population(x, mean, var, eps=eps)
    axes = tuple(range(1, x.dim()))
    positions = x[0, 0].numel() if x.dim() > 2 else 1
    divisor = positions**2 if norm == "paper" else x.shape[1] * positions
    square = (xhat**2).sum(axes, keepdim=True) / divisor
    a = _channels(alpha, x)
    return _affine(xhat * (a / torch.sqrt(square + eps) + (1 - a)), weight, bias)
