"""Mean-only batch normalization, half of it (as in Luo et al. 2019, fig. 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from flexnorm.engine import Moments
from flexnorm.nn._base import BatchStatistics, Pair, Param


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
    positions_matter = False
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
