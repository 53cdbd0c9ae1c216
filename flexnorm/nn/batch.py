"""Batch normalization, with torch's arguments, parameters and buffers."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from flexnorm.engine import Moments, recomputing, standardize_at_once, twin_of
from flexnorm.kernels.layout import best_by_torch
from flexnorm.kernels.tables import standardize as standardize_in_c
from flexnorm.nn._base import BatchStatistics, Pair, Param, standardize

# Up to so many values torch's function of features is as fast as one node of ours (measured: 0.9 to 1.1 of its time).
_MANY_FEATURES = 1 << 20


def batch(moments: Moments, weight: Param = None, bias: Param = None, *, eps: float = 1e-5) -> Pair:
    """Batch normalization (Ioffe & Szegedy 2015): moments per channel, over samples and positions."""
    pooled = moments.pool("batch")
    return standardize(pooled.mean, pooled.var, weight, bias, eps)


@twin_of(batch)
def by_batch_norm(x: Tensor, weight: Param = None, bias: Param = None, *, eps: float = 1e-5) -> Tensor | None:
    """Batch normalization by torch's function of the batch's own statistics; it refuses one value per channel."""
    if x.numel() == x.shape[1]:
        return None
    return functional.batch_norm(x, None, None, weight, bias, True, 0.0, eps)


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

    twin_at_any_size = True

    @torch.no_grad()
    def _keep(self, values: int, batch: Pair) -> tuple[Pair, Pair]:
        """Let a batch of so many values enter the running statistics; return its own, and their scale and shift."""
        self.track(Moments(*batch, values // self.num_features, backend="c"))
        return batch, standardize_in_c(batch, self.weight, self.bias, self.eps)

    def twin(self, x: Tensor) -> Tensor | None:
        """Normalize and keep running statistics as torch does, but for a batch that is not finite."""
        mean, var, tracked, weight = self.running_mean, self.running_var, self.num_batches_tracked, self.weight
        if (weight is not None and weight.dtype != x.dtype) or self.group() is not None:
            return None
        if not (best_by_torch(x, _MANY_FEATURES) if x.dim() == 2 else best_by_torch(x)):
            if self.frozen or not self.training or self.running_mean is None:
                return None
            return standardize_at_once(x, weight, self.bias, self.eps, partial(self._keep, x.numel()))
        if mean is None or var is None or tracked is None:
            return by_batch_norm(x, weight, self.bias, eps=self.eps)
        if mean.dtype != x.dtype:
            return None
        if self.frozen or not self.training:
            return functional.batch_norm(x, *self.kept_statistics(), weight, self.bias, False, 0.0, self.eps)
        new_mean, new_var = mean.clone(), var.clone()
        if recomputing():  # activation checkpointing: the batch has been counted
            return functional.batch_norm(x, new_mean, new_var, weight, self.bias, True, 0.0, self.eps)
        if "track" in vars(self) or type(self).track is not BatchStatistics.track:  # somebody else keeps them
            y = functional.batch_norm(x, new_mean.zero_(), new_var.zero_(), weight, self.bias, True, 1.0, self.eps)
            count = x.numel() // self.num_features
            self.track(Moments(new_mean[None], new_var[None] * ((count - 1) / count), count))
            return y
        rate = self.momentum if self.momentum is not None else 1.0 / (int(tracked) + 1)
        y = torch.batch_norm(x, weight, self.bias, new_mean, new_var, True, rate, self.eps, False)
        # A batch with a channel that is not finite is left out whole. (A product of finite numbers may overflow.)
        finite = math.isfinite(float(torch.dot(new_mean, new_var)))
        if finite or bool(new_mean.isfinite().all() & new_var.isfinite().all()):
            mean.copy_(new_mean)
            var.copy_(new_var)
            tracked.add_(1)
        return y


class BatchNorm1d(_BatchNorm, ndims=(2, 3)):
    """Batch normalization of (N, C) or (N, C, L) input."""


class BatchNorm2d(_BatchNorm, ndims=(4,)):
    """Batch normalization of (N, C, H, W) input."""


class BatchNorm3d(_BatchNorm, ndims=(5,)):
    """Batch normalization of (N, C, D, H, W) input."""
