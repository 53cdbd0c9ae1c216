"""Layer normalization over channels and positions."""

from __future__ import annotations

from torch import Tensor

from flexnorm.engine import Moments, twin_of
from flexnorm.nn._base import Pair, Param, SampleStatistics
from flexnorm.nn.group import by_group_norm, group


def layer(moments: Moments, weight: Param = None, bias: Param = None, *, eps: float = 1e-5) -> Pair:
    """Layer normalization over (C, *spatial) (Ba et al. 2016), with one weight and bias per channel."""
    return group(moments, weight, bias, groups=1, eps=eps)


@twin_of(layer)
def by_layer_norm(x: Tensor, weight: Param = None, bias: Param = None, *, eps: float = 1e-5) -> Tensor:
    """Layer normalization by torch's function."""
    return by_group_norm(x, weight, bias, groups=1, eps=eps)


class _LayerNorm(SampleStatistics):
    """Layer normalization over channels and positions (Ba et al. 2016), with one weight and bias per channel.

    The same function as ``nn.GroupNorm`` with one group. (``nn.LayerNorm`` learns one weight per position too.)
    Arguments ``num_features``, ``eps``, ``affine``, ``bias``, ``device``, ``dtype`` as of :class:`flexnorm.FlexNorm`.
    """

    norm_name = torch_layer = "layer"

    def twin(self, x: Tensor) -> Tensor | None:
        """Normalize by torch's function."""
        if self.weight is not None and self.weight.dtype != x.dtype:
            return None
        return by_layer_norm(x, self.weight, self.bias, eps=self.eps)

    def rule(self, moments: Moments) -> Pair:
        """Standardize each sample with its own moments."""
        return layer(moments, self.weight, self.bias, eps=self.eps)


class LayerNorm1d(_LayerNorm, ndims=(2, 3)):
    """Layer normalization over channels and positions of (N, C) or (N, C, L) input."""


class LayerNorm2d(_LayerNorm, ndims=(4,)):
    """Layer normalization over channels and positions of (N, C, H, W) input."""


class LayerNorm3d(_LayerNorm, ndims=(5,)):
    """Layer normalization over channels and positions of (N, C, D, H, W) input."""
