"""The rules: every normalization as a few lines that turn moments into a scale and a shift.

Each function has the signature ``rule(moments, *params) -> (scale, shift)`` of :func:`evenkeel.flex_norm` and can be
used with it directly; the modules of this room call the same functions. ``weight`` and ``bias`` are (C,) or ``None``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evenkeel.flexnorm import Moments

__all__ = ["batch", "group", "instance", "layer", "population", "standardize", "unitize", "unitized"]


def standardize(
    mean: Tensor, var: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Return the scale and shift of ``weight * (x - mean) / sqrt(var + eps) + bias``.

    Args:
        mean: Means, any shape that broadcasts to (N, C).
        var: Biased variances, of the shape of ``mean``.
        weight: (C,), or ``None`` for 1.
        bias: (C,), or ``None`` for 0.
        eps: Added to the variance.

    Example:
        >>> scale, shift = standardize(torch.tensor([2.0]), torch.tensor([4.0]), eps=0.0)
        >>> scale.item(), shift.item()
        (0.5, -1.0)
    """
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def batch(
    moments: Moments, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Batch normalization (Ioffe & Szegedy 2015): moments per channel, over samples and positions.

    Args:
        moments: Moments of the input, tables (N, C).
        weight: (C,) or ``None``.
        bias: (C,) or ``None``.
        eps: Added to the variance.
    """
    pooled = moments.pool("batch")
    return standardize(pooled.mean, pooled.var, weight, bias, eps)


def instance(
    moments: Moments, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Instance normalization (Ulyanov et al. 2016): moments per sample and channel, over positions.

    Args:
        moments: Moments of the input, tables (N, C).
        weight: (C,) or ``None``.
        bias: (C,) or ``None``.
        eps: Added to the variance.
    """
    return standardize(moments.mean, moments.var, weight, bias, eps)


def group(
    moments: Moments, weight: Tensor | None = None, bias: Tensor | None = None, *, groups: int, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Group normalization (Wu & He 2018): moments per sample, over positions and the channels of a group.

    Args:
        moments: Moments of the input, tables (N, C).
        weight: (C,) or ``None``.
        bias: (C,) or ``None``.
        groups: Number of groups of neighbouring channels; divides C.
        eps: Added to the variance.
    """
    pooled = moments.pool("channels", groups=groups)
    return standardize(pooled.mean, pooled.var, weight, bias, eps)


def layer(
    moments: Moments, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Layer normalization over (C, *spatial) (Ba et al. 2016), with one weight and bias per channel.

    Args:
        moments: Moments of the input, tables (N, C).
        weight: (C,) or ``None``.
        bias: (C,) or ``None``.
        eps: Added to the variance.
    """
    return group(moments, weight, bias, groups=1, eps=eps)


def population(
    moments: Moments,  # noqa: ARG001 - a rule receives them; this one needs none, and so costs no pass over x
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Population normalization (Luo et al. 2019, sec. 2): fixed moments of the whole population, in training too.

    Args:
        moments: Not read: this rule costs one affine pass.
        mean: Population means (C,).
        var: Population variances (C,).
        weight: (C,) or ``None``.
        bias: (C,) or ``None``.
        eps: Added to the variance.
    """
    return standardize(mean, var, weight, bias, eps)


def unitize(
    moments: Moments,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    alpha: Tensor,
    *,
    eps: float = 1e-5,
    norm: str = "paper",
) -> tuple[Tensor, Tensor]:
    """Unitization on top of given statistics (Huang & Yu 2020, layer as released by the authors).

    With xhat = (x - mean) / sqrt(var + eps) and one squared norm per sample, ``s_n = ||xhat_n||^2 / P^2``
    (``norm="paper"``, P positions) or ``||xhat_n||^2 / (C P)`` (``norm="rms"``, about 1 whatever the shape)::

        y = weight * xhat * (alpha / sqrt(s_n + eps) + 1 - alpha) + bias

    The norm needs no pass of its own: ``||xhat_n||^2 = P * sum_c (var[n,c] + (mean[n,c] - mean_c)^2) / (var_c + eps)``.

    Args:
        moments: Moments of the input, tables (N, C).
        mean: Statistics to standardize with, (C,) or (1, C).
        var: Statistics to standardize with, (C,) or (1, C).
        weight: (C,) or ``None``.
        bias: (C,) or ``None``.
        alpha: (C,); 0 is the plain standardization, 1 is full unitization.
        eps: Added to the variance and to the squared norm.
        norm: ``"paper"`` or ``"rms"``.
    """
    power = (var + eps).reciprocal()
    square = ((moments.var + (moments.mean - mean).square()) * power).sum(1, keepdim=True)
    square = square / (moments.count if norm == "paper" else moments.mean.shape[1])
    scale = torch.addcmul(1 - alpha, alpha, (square + eps).rsqrt()) * power.sqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def unitized(
    moments: Moments,
    weight: Tensor | None,
    bias: Tensor | None,
    alpha: Tensor,
    *,
    eps: float = 1e-5,
    norm: str = "paper",
) -> tuple[Tensor, Tensor]:
    """Unitized batch normalization: :func:`unitize` on the statistics of the batch.

    Args:
        moments: Moments of the input, tables (N, C).
        weight: (C,) or ``None``.
        bias: (C,) or ``None``.
        alpha: (C,).
        eps: Added to the variance and to the squared norm.
        norm: ``"paper"`` or ``"rms"``.
    """
    pooled = moments.pool("batch")
    return unitize(moments, pooled.mean, pooled.var, weight, bias, alpha, eps=eps, norm=norm)
