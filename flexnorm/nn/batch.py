"""Batch normalization, with torch's arguments, parameters and buffers."""

from __future__ import annotations

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
    positions_matter = False

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
