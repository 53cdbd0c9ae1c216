"""Root mean square normalization."""

from __future__ import annotations

from typing import Unpack

import torch

from flexnorm.engine import Moments
from flexnorm.nn._base import Pair, Param, Placed, SampleStatistics


def rms(moments: Moments, weight: Param = None, *, eps: float = 1e-5) -> Pair:
    """Root mean square normalization (Zhang & Sennrich 2019) of each sample over (C, *spatial)."""
    scale = (moments.pool("channels").mean_square + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    return scale, torch.zeros_like(scale)


class _RMSNorm(SampleStatistics):
    """Root mean square normalization (Zhang & Sennrich 2019) over channels and positions, no mean subtracted.

    Arguments ``num_features``, ``eps``, ``affine`` (there is no bias), ``device``, ``dtype`` as of
    :class:`flexnorm.FlexNorm`.
    """

    norm_name = "rms"

    def __init__(self, num_features: int, eps: float = 1e-5, affine: bool = True, **kwargs: Unpack[Placed]) -> None:
        super().__init__(num_features, eps, affine, bias=False, **kwargs)

    def rule(self, moments: Moments) -> Pair:
        """Divide each sample by its root mean square."""
        return rms(moments, self.weight, eps=self.eps)


class RMSNorm1d(_RMSNorm, ndims=(2, 3)):
    """Root mean square normalization of (N, C) or (N, C, L) input."""


class RMSNorm2d(_RMSNorm, ndims=(4,)):
    """Root mean square normalization of (N, C, H, W) input."""


class RMSNorm3d(_RMSNorm, ndims=(5,)):
    """Root mean square normalization of (N, C, D, H, W) input."""
