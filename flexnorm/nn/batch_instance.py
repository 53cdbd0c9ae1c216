"""Batch-instance normalization: a learned gate per channel between the two."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from flexnorm.engine import Moments
from flexnorm.nn._base import BatchStatistics, Pair, Param, all_equal, standardize


def batch_instance(
    moments: Moments,
    mean: Tensor,
    var: Tensor,
    gate: Tensor,
    weight: Param = None,
    bias: Param = None,
    *,
    eps: float = 1e-5,
) -> Pair:
    """Batch-instance normalization (Nam & Kim 2018, eq. 4): a gate per channel between batch and instance.

    ``y = weight * (gate * x_batch + (1 - gate) * x_instance) + bias`` with the gate (C,) clipped to [0, 1].
    ``mean`` and ``var`` are those of the batch, or running ones, (1, C) or (C,).
    """
    share = gate.clamp(0, 1)
    batch_scale, batch_shift = standardize(mean, var, eps=eps)
    own_scale, own_shift = standardize(moments.mean, moments.var, eps=eps)
    scale = share * batch_scale + (1 - share) * own_scale
    shift = share * batch_shift + (1 - share) * own_shift
    if weight is not None:
        scale, shift = scale * weight, shift * weight
    return scale, shift if bias is None else shift + bias


class _BatchInstanceNorm(BatchStatistics):
    """Batch-instance normalization (Nam & Kim 2018, arXiv 1805.07925): a learned gate per channel between the two.

    ``gate`` (C,) starts at 1, which is batch normalization, and is clipped to [0, 1] in the forward.

    Arguments as of :class:`flexnorm.FlexNorm`.
    """

    norm_name = "batch_instance"
    pools_positions = True
    torch_layer = "batch"
    learned: ClassVar = {"gate": (None, 1.0)}
    gate: nn.Parameter

    def same_as(self, training: bool) -> str:  # noqa: ARG002
        """With a gate of 1 it is batch normalization."""
        return "batch" if all_equal(self.gate, 1) else "batch_instance"

    def rule(self, moments: Moments) -> Pair:
        """Standardize with the batch and with each instance, and mix by the gate."""
        mean, var = self.batch_or_running(moments)
        return batch_instance(moments, mean, var, self.gate, self.weight, self.bias, eps=self.eps)


class BatchInstanceNorm1d(_BatchInstanceNorm, ndims=(3,)):
    """Batch-instance normalization of (N, C, L) input."""


class BatchInstanceNorm2d(_BatchInstanceNorm, ndims=(4,)):
    """Batch-instance normalization of (N, C, H, W) input."""


class BatchInstanceNorm3d(_BatchInstanceNorm, ndims=(5,)):
    """Batch-instance normalization of (N, C, D, H, W) input."""
