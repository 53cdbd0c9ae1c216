"""Batch renormalization: batch statistics corrected towards the running ones, for small or uneven batches.

Ioffe, "Batch renormalization" (NeurIPS 2017, arXiv 1702.03275). Deviation: the running variance is kept and its root
taken, where the paper keeps a running standard deviation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexnorm.engine import Moments
from flexnorm.engine.module import recomputing
from flexnorm.nn import rules
from flexnorm.nn.batch import _BatchNorm

__all__ = ["BatchRenorm1d", "BatchRenorm2d", "BatchRenorm3d"]


class _BatchRenorm(_BatchNorm):
    """Batch renormalization (Ioffe 2017, alg. 1): in training the output follows the running statistics too.

    Args:
        num_features: Number of channels C of the input.
        eps: Added to the variances.
        momentum: Weight of the new batch in the running statistics; the paper uses 0.01.
        affine: Whether to learn ``weight`` and ``bias``, each (C,).
        r_max: Largest factor by which a batch standard deviation is corrected.
        d_max: Largest shift by which a batch mean is corrected, in running standard deviations.
        warmup: Number of batches as plain batch normalization before the corrections begin (5,000 in the paper).
        ramp: Number of batches over which they then grow: r_max over all of it, d_max over the first 4/7, which with
            the default are the 40,000 and 25,000 steps of the paper.
        **kwargs: ``bias``, ``process_group``, ``device``, ``dtype`` as of :class:`flexnorm.FlexNorm`.

    Raises:
        ValueError: For ``r_max`` below 1, a negative ``d_max``, ``warmup`` or ``ramp``.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup: int = 5000,
        ramp: int = 35000,
        **kwargs: Any,
    ) -> None:
        if r_max < 1 or d_max < 0 or warmup < 0 or ramp < 0:
            raise ValueError(
                f"r_max must be at least 1, d_max, warmup and ramp not negative; got {r_max}, {d_max}, {warmup}, {ramp}"
            )
        super().__init__(num_features, eps, momentum, affine, True, **kwargs)
        self.r_max, self.d_max, self.warmup, self.ramp = r_max, d_max, warmup, ramp
        self._used: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def limits(self) -> tuple[Tensor, Tensor]:
        """Return r_max and d_max at the present step, as scalar tensors."""
        assert self.num_batches_tracked is not None
        since = (self.num_batches_tracked - self.warmup).float()
        grown = (since / max(self.ramp, 1)).clamp(0, 1)
        grown_d = (since / max(self.ramp * 4 / 7, 1)).clamp(0, 1)
        return 1 + (self.r_max - 1) * grown, self.d_max * grown_d

    def rule(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Renormalize in training; standardize with the running statistics in evaluation."""
        assert self.running_mean is not None
        assert self.running_var is not None
        if self.frozen or not self.training:
            return rules.standardize(*self.kept_statistics(), self.weight, self.bias, self.eps)
        if recomputing() and self._used is not None:
            # Activation checkpointing repeats the last forward: by the statistics and limits that it had.
            r_max, d_max, mean, var = self._used
        else:
            r_max, d_max = self.limits()
            # The running statistics of before this batch, as in the paper; they are about to be updated in place.
            mean, var = self.running_mean.clone(), self.running_var.clone()
            if not torch.compiler.is_compiling():
                self._used = (r_max, d_max, mean, var)
        self.track(moments.pool("batch"))
        return rules.renorm(moments, mean, var, self.weight, self.bias, r_max=r_max, d_max=d_max, eps=self.eps)

    def extra_repr(self) -> str:
        """Show the constructor arguments."""
        return f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}, warmup={self.warmup}, ramp={self.ramp}"


class BatchRenorm1d(_BatchRenorm):
    """Batch renormalization of (N, C) or (N, C, L) input."""

    ndims = (2, 3)


class BatchRenorm2d(_BatchRenorm):
    """Batch renormalization of (N, C, H, W) input."""

    ndims = (4,)


class BatchRenorm3d(_BatchRenorm):
    """Batch renormalization of (N, C, D, H, W) input."""

    ndims = (5,)
