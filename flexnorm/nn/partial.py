"""Halves of batch normalization: only the mean, or only the variance (for Luo et al. 2019, fig. 2)."""

from __future__ import annotations

from torch import Tensor

from flexnorm.engine import Moments
from flexnorm.nn import rules
from flexnorm.nn.batch import _BatchNorm

__all__ = [
    "MeanOnlyBatchNorm1d",
    "MeanOnlyBatchNorm2d",
    "MeanOnlyBatchNorm3d",
    "VarianceOnlyBatchNorm1d",
    "VarianceOnlyBatchNorm2d",
    "VarianceOnlyBatchNorm3d",
]


class _MeanOnlyBatchNorm(_BatchNorm):
    """Mean-only batch normalization (Salimans & Kingma 2016, sec. 4): ``weight * (x - mean) + bias``.

    Meant for weights that are normalized by themselves. Arguments, parameters and buffers as of batch normalization.
    """

    def rule(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Subtract the mean of the batch in training, the running one in evaluation."""
        mean, _ = self.statistics(moments)
        return rules.mean_only(mean, self.weight, self.bias)


class MeanOnlyBatchNorm1d(_MeanOnlyBatchNorm):
    """Mean-only batch normalization of (N, C) or (N, C, L) input."""

    ndims = (2, 3)


class MeanOnlyBatchNorm2d(_MeanOnlyBatchNorm):
    """Mean-only batch normalization of (N, C, H, W) input."""

    ndims = (4,)


class MeanOnlyBatchNorm3d(_MeanOnlyBatchNorm):
    """Mean-only batch normalization of (N, C, D, H, W) input."""

    ndims = (5,)


class _VarianceOnlyBatchNorm(_BatchNorm):
    """Variance-only batch normalization (Luo et al. 2019, sec. 5): ``weight * x / sqrt(var + eps) + bias``.

    The variance is taken about the mean, which is not subtracted. Arguments, parameters and buffers as of batch
    normalization.
    """

    def rule(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Divide by the standard deviation of the batch in training, by the running one in evaluation."""
        _, var = self.statistics(moments)
        return rules.variance_only(var, self.weight, self.bias, eps=self.eps)


class VarianceOnlyBatchNorm1d(_VarianceOnlyBatchNorm):
    """Variance-only batch normalization of (N, C) or (N, C, L) input."""

    ndims = (2, 3)


class VarianceOnlyBatchNorm2d(_VarianceOnlyBatchNorm):
    """Variance-only batch normalization of (N, C, H, W) input."""

    ndims = (4,)


class VarianceOnlyBatchNorm3d(_VarianceOnlyBatchNorm):
    """Variance-only batch normalization of (N, C, D, H, W) input."""

    ndims = (5,)
