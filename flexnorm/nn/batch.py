"""Batch normalization, with torch's arguments, parameters and buffers; and its halves (for Luo et al. 2019, fig. 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from flexnorm.engine import Moments
from flexnorm.nn._base import BatchStatistics, Pair, Param, standardize


def batch(moments: Moments, weight: Param = None, bias: Param = None, *, eps: float = 1e-5) -> Pair:
    """Batch normalization (Ioffe & Szegedy 2015): moments per channel, over samples and positions."""
    pooled = moments.pool("batch")
    return standardize(pooled.mean, pooled.var, weight, bias, eps)


class _BatchNorm(BatchStatistics):
    """Batch normalization (Ioffe & Szegedy 2015) on the engine: see :class:`flexnorm.FlexNorm` for the arguments.

    Differs from ``nn.BatchNorm*`` in what users of it asked for: ``process_group`` synchronizes on any backend,
    :meth:`~flexnorm.FlexNorm.freeze` survives ``train()``, activation checkpointing updates the statistics once, a
    non-finite batch does not enter them, and they stay in float32.

    Raises:
        ValueError: In training, if there is only one value per channel (its variance is 0 whatever the input).
    """

    norm_name = torch_layer = "batch"

    def rule(self, moments: Moments) -> Pair:
        """Standardize with the statistics of the batch in training, with the running ones in evaluation."""
        mean, var = self.batch_or_running(moments)
        return standardize(mean, var, self.weight, self.bias, self.eps)


class BatchNorm1d(_BatchNorm, ndims=(2, 3)):
    """Batch normalization of (N, C) or (N, C, L) input."""


class BatchNorm2d(_BatchNorm, ndims=(4,)):
    """Batch normalization of (N, C, H, W) input."""


class BatchNorm3d(_BatchNorm, ndims=(5,)):
    """Batch normalization of (N, C, D, H, W) input."""


def mean_only(mean: Tensor, weight: Param = None, bias: Param = None) -> Pair:
    """Mean-only batch normalization (Salimans & Kingma 2016, sec. 4): ``weight * (x - mean) + bias``.

    ``mean`` is that of the batch, or the running one, (1, C) or (C,).
    """
    scale = torch.ones_like(mean) if weight is None else weight.expand(mean.shape)
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


class _MeanOnlyBatchNorm(BatchStatistics):
    """Mean-only batch normalization (Salimans & Kingma 2016, sec. 4): ``weight * (x - mean) + bias``.

    Meant for weights that are normalized by themselves. Arguments, parameters and buffers as of batch normalization.
    """

    norm_name = "mean_only"
    options = ()
    torch_layer = "batch"

    def rule(self, moments: Moments) -> Pair:
        """Subtract the mean of the batch in training, the running one in evaluation."""
        mean, _ = self.batch_or_running(moments)
        return mean_only(mean, self.weight, self.bias)


class MeanOnlyBatchNorm1d(_MeanOnlyBatchNorm, ndims=(2, 3)):
    """Mean-only batch normalization of (N, C) or (N, C, L) input."""


class MeanOnlyBatchNorm2d(_MeanOnlyBatchNorm, ndims=(4,)):
    """Mean-only batch normalization of (N, C, H, W) input."""


class MeanOnlyBatchNorm3d(_MeanOnlyBatchNorm, ndims=(5,)):
    """Mean-only batch normalization of (N, C, D, H, W) input."""


def variance_only(var: Tensor, weight: Param = None, bias: Param = None, *, eps: float = 1e-5) -> Pair:
    """Variance-only batch normalization (Luo et al. 2019, sec. 5): ``weight * x / sqrt(var + eps) + bias``.

    ``var`` is the variance about the mean of the batch, or the running one, (1, C) or (C,).
    """
    scale = (var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    return scale, torch.zeros_like(scale) if bias is None else bias


class _VarianceOnlyBatchNorm(BatchStatistics):
    """Variance-only batch normalization (Luo et al. 2019, sec. 5): ``weight * x / sqrt(var + eps) + bias``.

    The variance is taken about the mean, which is not subtracted. Arguments, parameters and buffers as of batch
    normalization.
    """

    norm_name = "variance_only"
    torch_layer = "batch"

    def rule(self, moments: Moments) -> Pair:
        """Divide by the standard deviation of the batch in training, by the running one in evaluation."""
        _, var = self.batch_or_running(moments)
        return variance_only(var, self.weight, self.bias, eps=self.eps)


class VarianceOnlyBatchNorm1d(_VarianceOnlyBatchNorm, ndims=(2, 3)):
    """Variance-only batch normalization of (N, C) or (N, C, L) input."""


class VarianceOnlyBatchNorm2d(_VarianceOnlyBatchNorm, ndims=(4,)):
    """Variance-only batch normalization of (N, C, H, W) input."""


class VarianceOnlyBatchNorm3d(_VarianceOnlyBatchNorm, ndims=(5,)):
    """Variance-only batch normalization of (N, C, D, H, W) input."""
