"""Switchable normalization: a learned mixture of instance, layer and batch statistics."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from flexnorm.engine import Moments
from flexnorm.nn._base import BatchStatistics, Pair, Param, standardize


def switch(
    moments: Moments,
    mean: Tensor,
    var: Tensor,
    mean_weight: Tensor,
    var_weight: Tensor,
    weight: Param = None,
    bias: Param = None,
    *,
    eps: float = 1e-5,
) -> Pair:
    """Switchable normalization (Luo et al. 2019, eq. 3-5): learned mixtures of instance, layer and batch statistics.

    ``mean`` and ``var`` are those of the batch, or running ones, (1, C) or (C,). ``mean_weight`` (3,) and
    ``var_weight`` (3,) are logits of the mixtures, in the order instance, layer, batch.
    """
    layered = moments.pool("channels")
    first, second = mean_weight.softmax(0), var_weight.softmax(0)
    mixed_mean = first[0] * moments.mean + first[1] * layered.mean + first[2] * mean
    mixed_var = second[0] * moments.var + second[1] * layered.var + second[2] * var
    return standardize(mixed_mean, mixed_var, weight, bias, eps)


class _SwitchableNorm(BatchStatistics):
    """Switchable normalization (Luo et al. 2019, arXiv 1806.10779): instance, layer and batch statistics, mixed.

    The mixture weights are the softmax of ``mean_weight`` (3,) and ``var_weight`` (3,), equal at the start, in the
    order instance, layer, batch. In evaluation the batch statistics are the running ones (the paper averages over
    batches, which recalibration does).

    Arguments as of :class:`flexnorm.FlexNorm`.
    """

    norm_name = "switchable"
    pools_positions = True
    learned: ClassVar = dict.fromkeys(("mean_weight", "var_weight"), (3, 1.0))
    mean_weight: nn.Parameter
    var_weight: nn.Parameter

    def rule(self, moments: Moments) -> Pair:
        """Standardize with the mixed statistics."""
        mean, var = self.batch_or_running(moments)
        return switch(moments, mean, var, self.mean_weight, self.var_weight, self.weight, self.bias, eps=self.eps)


class SwitchableNorm1d(_SwitchableNorm, ndims=(2, 3)):
    """Switchable normalization of (N, C) or (N, C, L) input."""


class SwitchableNorm2d(_SwitchableNorm, ndims=(4,)):
    """Switchable normalization of (N, C, H, W) input."""


class SwitchableNorm3d(_SwitchableNorm, ndims=(5,)):
    """Switchable normalization of (N, C, D, H, W) input."""
