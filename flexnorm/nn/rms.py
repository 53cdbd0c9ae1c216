"""Root mean square normalization."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor
from torch.nn import functional

from flexnorm.engine import Moments, twin_of
from flexnorm.nn._base import Pair, Param, Placed, SampleStatistics


def rms(moments: Moments, weight: Param = None, *, eps: float = 1e-5) -> Pair:
    """Root mean square normalization (Zhang & Sennrich 2019) of each sample over (C, *spatial)."""
    scale = (moments.pool("channels").mean_square + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    return scale, torch.zeros_like(scale)


@twin_of(rms)
def by_rms_norm(x: Tensor, weight: Param = None, *, eps: float = 1e-5) -> Tensor | None:
    """Root mean square normalization of tokens by torch's function."""
    return functional.rms_norm(x, x.shape[1:], weight, eps) if x.dim() == 2 else None


class _RMSNorm(SampleStatistics):
    """Root mean square normalization (Zhang & Sennrich 2019) over channels and positions, no mean subtracted.

    Arguments ``num_features``, ``eps``, ``affine`` (there is no bias), ``device``, ``dtype`` as of
    :class:`flexnorm.FlexNorm`.
    """

    norm_name = "rms"

    def __init__(self, num_features: int, eps: float = 1e-5, affine: bool = True, **kwargs: Unpack[Placed]) -> None:
        super().__init__(num_features, eps, affine, bias=False, **kwargs)

    def twin(self, x: Tensor) -> Tensor | None:
        """Normalize tokens by torch's function."""
        same = self.weight is None or self.weight.dtype == x.dtype
        return by_rms_norm(x, self.weight, eps=self.eps) if same else None

    def rule(self, moments: Moments) -> Pair:
        """Divide each sample by its root mean square."""
        return rms(moments, self.weight, eps=self.eps)


class RMSNorm1d(_RMSNorm, ndims=(2, 3)):
    """Root mean square normalization of (N, C) or (N, C, L) input."""


class RMSNorm2d(_RMSNorm, ndims=(4,)):
    """Root mean square normalization of (N, C, H, W) input."""


class RMSNorm3d(_RMSNorm, ndims=(5,)):
    """Root mean square normalization of (N, C, D, H, W) input."""
