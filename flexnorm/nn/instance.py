"""Instance normalization, with torch's arguments, parameters and buffers."""

from __future__ import annotations

from typing import ClassVar, Unpack

import torch
from torch import Tensor

from flexnorm.engine import FlexNorm, Moments
from flexnorm.nn._base import MANY, Pair, Param, Shared, standardize


def instance(moments: Moments, weight: Param = None, bias: Param = None, *, eps: float = 1e-5) -> Pair:
    """Instance normalization (Ulyanov et al. 2016): moments per sample and channel, over positions."""
    return standardize(moments.mean, moments.var, weight, bias, eps)


def _averages(own: Moments) -> Moments:
    """Averages (1, C) of means and unbiased variances over the samples that have values, and how many these are."""
    count, group = own.count, own.process_group
    if isinstance(count, Tensor):
        unbiased: float | Tensor = count / (count - 1).clamp_min(1)
        present: int | Tensor = (count > 0).to(own.mean.dtype)
    else:
        unbiased, present = count / max(count - 1, 1), min(count, 1)
    mean, var = (
        Moments(table, torch.zeros_like(table), present, process_group=group).pool("batch")
        for table in (own.mean, own.var * unbiased)
    )
    return Moments(mean.mean, var.mean, mean.count)


class _InstanceNorm(FlexNorm):
    """Instance normalization (Ulyanov et al. 2016): each channel of each sample by its own moments.

    Args:
        affine: Whether to learn ``weight`` and ``bias``, each (C,). Off by default, as in torch; on in
            :func:`make_norm`.
        track_running_stats: Whether to use running statistics in evaluation. Off by default, as in torch. They average
            the instances' moments, not those of the batch.
        **kwargs: These and the others as of :class:`flexnorm.FlexNorm`.

    Raises:
        ValueError: In training, if there is only one position per channel.
    """

    norm_name = torch_layer = "instance"
    pools_positions = True
    statistics_from = "sample"
    defaults: ClassVar = {"affine": True}

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        **kwargs: Unpack[Shared],
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **kwargs)

    def same_as(self, training: bool) -> str:
        """With running statistics its evaluation is that of batch normalization."""
        return "batch" if not training and self.running_mean is not None else "instance"

    def rule(self, moments: Moments) -> Pair:
        """Standardize each channel of each sample with its own moments."""
        if self.running_mean is not None and self.running_var is not None and (self.frozen or not self.training):
            return standardize(*self.kept_statistics(), self.weight, self.bias, self.eps)
        own = moments.detach() if self.training and self.running_mean is not None else None
        if own is not None and (own.mean.shape[0] or own.process_group is not None):
            self.track(_averages(own))
        return instance(moments, self.weight, self.bias, eps=self.eps)

    @torch.no_grad()
    def track(self, pooled: Moments) -> None:
        """Let averages of the samples' moments enter the running ones; the count is that of the samples."""
        some = pooled.count > 0
        count = torch.where(some, MANY, 0) if isinstance(some, Tensor) else MANY * some
        super().track(Moments(pooled.mean, pooled.var, count))

    def check_input(self, x: Tensor) -> None:
        """Refuse wrong shapes, and inputs whose instances have no statistics."""
        super().check_input(x)
        if self.training and not self.frozen and x.numel() == x.shape[0] * self.num_features > 0:
            raise ValueError(
                f"{type(self).__name__} needs more than 1 position per channel in training, got shape {tuple(x.shape)}"
            )


class InstanceNorm1d(_InstanceNorm, ndims=(3,)):
    """Instance normalization of (N, C, L) input."""


class InstanceNorm2d(_InstanceNorm, ndims=(4,)):
    """Instance normalization of (N, C, H, W) input."""


class InstanceNorm3d(_InstanceNorm, ndims=(5,)):
    """Instance normalization of (N, C, D, H, W) input."""
