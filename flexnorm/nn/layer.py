"""Layer normalization over channels and positions."""

from __future__ import annotations

from torch import Tensor

from flexnorm.engine import Moments
from flexnorm.nn._base import SampleStatistics
from flexnorm.nn.group import group

__all__ = ["LayerNorm1d", "LayerNorm2d", "LayerNorm3d", "layer"]


def layer(
    moments: Moments, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Layer normalization over (C, *spatial) (Ba et al. 2016), with one weight and bias per channel."""
    return group(moments, weight, bias, groups=1, eps=eps)


class _LayerNorm(SampleStatistics):
    """Layer normalization over channels and positions (Ba et al. 2016), with one weight and bias per channel.

    The same function as ``nn.GroupNorm`` with one group. (``nn.LayerNorm`` learns one weight per position too.)

    Args:
        num_features: Number of channels C of the input (N, C) or (N, C, *spatial).
        eps: Added to the variance.
        affine: Whether to learn ``weight`` and ``bias``, each (C,).
        bias: ``False`` leaves out the bias only.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    norm_name = torch_layer = "layer"

    def rule(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Standardize each sample with its own moments."""
        return layer(moments, self.weight, self.bias, eps=self.eps)


class LayerNorm1d(_LayerNorm, ndims=(2, 3)):
    """Layer normalization over channels and positions of (N, C) or (N, C, L) input."""


class LayerNorm2d(_LayerNorm, ndims=(4,)):
    """Layer normalization over channels and positions of (N, C, H, W) input."""


class LayerNorm3d(_LayerNorm, ndims=(5,)):
    """Layer normalization over channels and positions of (N, C, D, H, W) input."""
