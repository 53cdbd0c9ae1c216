"""Variance-only batch normalization, the other half (as in Luo et al. 2019, fig. 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from flexnorm.engine import Moments
from flexnorm.nn._base import BatchStatistics, Pair, Param


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
    positions_matter = False
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
