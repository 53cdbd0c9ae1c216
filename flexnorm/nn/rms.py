"""Root mean square normalization."""

from __future__ import annotations

import torch
from torch import Tensor

from flexnorm.engine import Moments
from flexnorm.nn._base import SampleStatistics

__all__ = ["RMSNorm1d", "RMSNorm2d", "RMSNorm3d", "rms"]


def rms(moments: Moments, weight: Tensor | None = None, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Root mean square normalization (Zhang & Sennrich 2019) of each sample over (C, *spatial)."""
    scale = (moments.pool("channels").mean_square + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    return scale, torch.zeros_like(scale)


class _RMSNorm(SampleStatistics):
    """Root mean square normalization (Zhang & Sennrich 2019) over channels and positions, no mean subtracted.

    Args:
        num_features: Number of channels C of the input.
        eps: Added to the mean square.
        affine: Whether to learn ``weight`` (C,). There is no bias.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    norm_name = "rms"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine, bias=False, device=device, dtype=dtype)

    def rule(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Divide each sample by its root mean square."""
        return rms(moments, self.weight, eps=self.eps)


class RMSNorm1d(_RMSNorm, ndims=(2, 3)):
    """Root mean square normalization of (N, C) or (N, C, L) input."""


class RMSNorm2d(_RMSNorm, ndims=(4,)):
    """Root mean square normalization of (N, C, H, W) input."""


class RMSNorm3d(_RMSNorm, ndims=(5,)):
    """Root mean square normalization of (N, C, D, H, W) input."""
