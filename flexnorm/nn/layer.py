"""Layer normalization over channels and positions."""

from __future__ import annotations

from flexnorm.engine import Moments
from flexnorm.nn._base import Pair, Param, SampleStatistics
from flexnorm.nn.group import group


def layer(moments: Moments, weight: Param = None, bias: Param = None, *, eps: float = 1e-5) -> Pair:
    """Layer normalization over (C, *spatial) (Ba et al. 2016), with one weight and bias per channel."""
    return group(moments, weight, bias, groups=1, eps=eps)


class _LayerNorm(SampleStatistics):
    """Layer normalization over channels and positions (Ba et al. 2016), with one weight and bias per channel.

    The same function as ``nn.GroupNorm`` with one group. (``nn.LayerNorm`` learns one weight per position too.)
    Arguments ``num_features``, ``eps``, ``affine``, ``bias``, ``device``, ``dtype`` as of :class:`flexnorm.FlexNorm`.
    """

    norm_name = torch_layer = "layer"

    def rule(self, moments: Moments) -> Pair:
        """Standardize each sample with its own moments."""
        return layer(moments, self.weight, self.bias, eps=self.eps)


class LayerNorm1d(_LayerNorm, ndims=(2, 3)):
    """Layer normalization over channels and positions of (N, C) or (N, C, L) input."""


class LayerNorm2d(_LayerNorm, ndims=(4,)):
    """Layer normalization over channels and positions of (N, C, H, W) input."""


class LayerNorm3d(_LayerNorm, ndims=(5,)):
    """Layer normalization over channels and positions of (N, C, D, H, W) input."""
