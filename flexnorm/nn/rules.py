"""The rules: every normalization as a few lines that turn moments into a scale and a shift.

Each function has the signature ``rule(moments, *params) -> (scale, shift)`` of :func:`flexnorm.flex_norm` and can be
used with it directly; the modules of this room call the same functions. ``weight`` and ``bias`` are (C,) or ``None``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexnorm.engine import Moments
from flexnorm.nn._fused import unitize_tables

__all__ = [
    "batch",
    "batch_instance",
    "filter_response",
    "group",
    "instance",
    "layer",
    "mean_only",
    "population",
    "renorm",
    "renormalize",
    "rms",
    "standardize",
    "switch",
    "unitize",
    "unitized",
    "variance_only",
]


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

    Examples:
        >>> scale, shift = standardize(torch.tensor([2.0]), torch.tensor([4.0]), eps=0.0)
        >>> scale.item(), shift.item()
        (0.5, -1.0)
    """
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    return scale, -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)


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
    divisor = moments.count if norm == "paper" else mean.shape[-1]
    return unitize_tables(moments, mean, var, weight, bias, alpha, eps, divisor)


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


def rms(moments: Moments, weight: Tensor | None = None, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Root mean square normalization (Zhang & Sennrich 2019) of each sample over (C, *spatial).

    Args:
        moments: Moments of the input, tables (N, C).
        weight: (C,) or ``None``.
        eps: Added to the mean square.
    """
    scale = (moments.pool("channels").mean_square + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    return scale, torch.zeros_like(scale)


def filter_response(
    moments: Moments, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float | Tensor = 1e-6
) -> tuple[Tensor, Tensor]:
    """Filter response normalization (Singh & Krishnan 2020, eq. 1-2): mean square per sample and channel.

    Args:
        moments: Moments of the input, tables (N, C).
        weight: (C,) or ``None``.
        bias: (C,) or ``None``.
        eps: Added to the mean square; a tensor (1,) or (C,) if it is learned (its absolute value is used).
    """
    scale = (moments.mean_square + (eps.abs() if isinstance(eps, Tensor) else eps)).rsqrt()
    scale = scale if weight is None else scale * weight
    return scale, torch.zeros_like(scale) if bias is None else bias


def renorm(
    moments: Moments,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    r_max: float | Tensor,
    d_max: float | Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Batch renormalization (Ioffe 2017, alg. 1): batch statistics, corrected towards the running ones.

    ``y = weight * (r * (x - mu_B) / sigma_B + d) + bias`` with ``r = sigma_B / sigma`` clipped to [1/r_max, r_max] and
    ``d = (mu_B - mean) / sigma`` clipped to [-d_max, d_max], both constant in the backward.

    Args:
        moments: Moments of the input, tables (N, C).
        mean: Running mean (C,).
        var: Running variance (C,).
        weight: (C,) or ``None``.
        bias: (C,) or ``None``.
        r_max: Largest correction factor of the standard deviation; 1 with ``d_max=0`` is batch normalization.
        d_max: Largest correction of the mean, in running standard deviations.
        eps: Added to the variances.
    """
    pooled = moments.pool("batch")
    return renormalize(pooled.mean, pooled.var, mean, var, weight, bias, r_max=r_max, d_max=d_max, eps=eps)


def renormalize(
    batch_mean: Tensor,
    batch_var: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    r_max: float | Tensor,
    d_max: float | Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Batch statistics corrected towards others: :func:`renorm` on given statistics of the batch.

    Without limits (``r_max = d_max = inf``) the values are those of ``mean`` and ``var``, and the derivatives those of
    the batch statistics: population normalization whose statistics follow the weights.

    Args:
        batch_mean: Mean of the batch, (1, C).
        batch_var: Variance of the batch, (1, C).
        mean: Mean to correct towards, (C,).
        var: Variance to correct towards, (C,).
        weight: (C,) or ``None``.
        bias: (C,) or ``None``.
        r_max: Largest correction factor of the standard deviation.
        d_max: Largest correction of the mean, in standard deviations of ``var``.
        eps: Added to the variances.
    """
    inverse = (batch_var + eps).rsqrt()
    with torch.no_grad():
        population = (var + eps).rsqrt()
        r = population / inverse
        d = (batch_mean - mean) * population
        if not isinstance(r_max, float) or r_max != float("inf"):
            upper = torch.as_tensor(r_max, dtype=inverse.dtype, device=inverse.device)
            r = r.clamp(upper.reciprocal(), upper)
        if not isinstance(d_max, float) or d_max != float("inf"):
            reach = torch.as_tensor(d_max, dtype=inverse.dtype, device=inverse.device)
            d = d.clamp(-reach, reach)
    scale = inverse * r
    shift = d - batch_mean * scale
    if weight is not None:
        scale, shift = scale * weight, shift * weight
    return scale, shift if bias is None else shift + bias


def switch(
    moments: Moments,
    mean: Tensor,
    var: Tensor,
    mean_weight: Tensor,
    var_weight: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Switchable normalization (Luo et al. 2019, eq. 3-5): learned mixtures of instance, layer and batch statistics.

    Args:
        moments: Moments of the input, tables (N, C).
        mean: Batch (or running) mean, (1, C) or (C,).
        var: Batch (or running) variance.
        mean_weight: (3,) logits of the mixture of means, in the order instance, layer, batch.
        var_weight: (3,) logits of the mixture of variances.
        weight: (C,) or ``None``.
        bias: (C,) or ``None``.
        eps: Added to the variance.
    """
    layered = moments.pool("channels")
    share, spread = mean_weight.softmax(0), var_weight.softmax(0)
    mixed_mean = share[0] * moments.mean + share[1] * layered.mean + share[2] * mean
    mixed_var = spread[0] * moments.var + spread[1] * layered.var + spread[2] * var
    return standardize(mixed_mean, mixed_var, weight, bias, eps)


def mean_only(mean: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean-only batch normalization (Salimans & Kingma 2016, sec. 4): ``weight * (x - mean) + bias``.

    Args:
        mean: Batch (or running) mean, (1, C) or (C,).
        weight: (C,) or ``None``.
        bias: (C,) or ``None``.
    """
    scale = torch.ones_like(mean) if weight is None else weight.expand(mean.shape)
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def variance_only(
    var: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Variance-only batch normalization (Luo et al. 2019, sec. 5): ``weight * x / sqrt(var + eps) + bias``.

    Args:
        var: Batch (or running) variance about the mean, (1, C) or (C,).
        weight: (C,) or ``None``.
        bias: (C,) or ``None``.
        eps: Added to the variance.
    """
    scale = (var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    return scale, torch.zeros_like(scale) if bias is None else bias


def batch_instance(
    moments: Moments,
    mean: Tensor,
    var: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Batch-instance normalization (Nam & Kim 2018, eq. 4): a gate per channel between batch and instance.

    ``y = weight * (gate * x_batch + (1 - gate) * x_instance) + bias`` with the gate clipped to [0, 1].

    Args:
        moments: Moments of the input, tables (N, C).
        mean: Batch (or running) mean, (1, C) or (C,).
        var: Batch (or running) variance.
        gate: (C,); 1 is batch, 0 is instance normalization.
        weight: (C,) or ``None``.
        bias: (C,) or ``None``.
        eps: Added to the variances.
    """
    share = gate.clamp(0, 1)
    batch_scale, batch_shift = standardize(mean, var, eps=eps)
    own_scale, own_shift = standardize(moments.mean, moments.var, eps=eps)
    scale = share * batch_scale + (1 - share) * own_scale
    shift = share * batch_shift + (1 - share) * own_shift
    if weight is not None:
        scale, shift = scale * weight, shift * weight
    return scale, shift if bias is None else shift + bias
