"""Learned mixtures of statistics: switchable and batch-instance normalization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flexnorm.engine import Moments
from flexnorm.nn import rules
from flexnorm.nn.batch import _BatchNorm

__all__ = [
    "BatchInstanceNorm1d",
    "BatchInstanceNorm2d",
    "BatchInstanceNorm3d",
    "SwitchableNorm1d",
    "SwitchableNorm2d",
    "SwitchableNorm3d",
]


class _SwitchableNorm(_BatchNorm):
    """Switchable normalization (Luo et al. 2019, arXiv 1806.10779): instance, layer and batch statistics, mixed.

    The mixture weights are the softmax of ``mean_weight`` (3,) and ``var_weight`` (3,), equal at the start, in the
    order instance, layer, batch. In evaluation the batch statistics are the running ones (the paper averages over
    batches, which recalibration does).

    Args:
        num_features: Number of channels C of the input.
        eps: Added to the variance.
        momentum: Weight of the new batch in the running statistics; ``None`` for the cumulative average.
        affine: Whether to learn ``weight`` and ``bias``, each (C,).
        track_running_stats: Whether to keep running statistics for evaluation.
        **kwargs: ``bias``, ``process_group``, ``device``, ``dtype`` as of :class:`flexnorm.FlexNorm`.
    """

    mean_weight: nn.Parameter
    var_weight: nn.Parameter

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **kwargs)
        placed = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        self.mean_weight = nn.Parameter(torch.ones(3, **placed))
        self.var_weight = nn.Parameter(torch.ones(3, **placed))

    def reset_parameters(self) -> None:
        """Set weight to 1, bias to 0, equal mixture weights, and reset the running statistics."""
        super().reset_parameters()
        if "mean_weight" in self._parameters:
            nn.init.ones_(self.mean_weight)
            nn.init.ones_(self.var_weight)

    def rule(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Standardize with the mixed statistics."""
        mean, var = self.statistics(moments)
        return rules.switch(moments, mean, var, self.mean_weight, self.var_weight, self.weight, self.bias, eps=self.eps)


class SwitchableNorm1d(_SwitchableNorm):
    """Switchable normalization of (N, C) or (N, C, L) input."""

    ndims = (2, 3)


class SwitchableNorm2d(_SwitchableNorm):
    """Switchable normalization of (N, C, H, W) input."""

    ndims = (4,)


class SwitchableNorm3d(_SwitchableNorm):
    """Switchable normalization of (N, C, D, H, W) input."""

    ndims = (5,)


class _BatchInstanceNorm(_BatchNorm):
    """Batch-instance normalization (Nam & Kim 2018, arXiv 1805.07925): a learned gate per channel between the two.

    ``gate`` (C,) starts at 1, which is batch normalization, and is clipped to [0, 1] in the forward.

    Args:
        num_features: Number of channels C of the input.
        eps: Added to the variances.
        momentum: Weight of the new batch in the running statistics; ``None`` for the cumulative average.
        affine: Whether to learn ``weight`` and ``bias``, each (C,).
        track_running_stats: Whether to keep running statistics for evaluation.
        **kwargs: ``bias``, ``process_group``, ``device``, ``dtype`` as of :class:`flexnorm.FlexNorm`.
    """

    gate: nn.Parameter

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **kwargs)
        self.gate = nn.Parameter(torch.ones(num_features, device=kwargs.get("device"), dtype=kwargs.get("dtype")))

    def reset_parameters(self) -> None:
        """Set weight and gate to 1, bias to 0, and reset the running statistics."""
        super().reset_parameters()
        if "gate" in self._parameters:
            nn.init.ones_(self.gate)

    def rule(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Standardize with the batch and with each instance, and mix by the gate."""
        mean, var = self.statistics(moments)
        return rules.batch_instance(moments, mean, var, self.gate, self.weight, self.bias, eps=self.eps)


class BatchInstanceNorm1d(_BatchInstanceNorm):
    """Batch-instance normalization of (N, C, L) input."""

    ndims = (3,)


class BatchInstanceNorm2d(_BatchInstanceNorm):
    """Batch-instance normalization of (N, C, H, W) input."""

    ndims = (4,)


class BatchInstanceNorm3d(_BatchInstanceNorm):
    """Batch-instance normalization of (N, C, D, H, W) input."""

    ndims = (5,)
