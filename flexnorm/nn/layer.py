"""Layer normalization over channels and positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexnorm.engine import Moments, Norm, twin_of
from flexnorm.kernels.layout import best_by_torch
from flexnorm.nn._base import LastAxes, Pair, Param, SampleStatistics
from flexnorm.nn.group import by_group_norm, group


def layer(moments: Moments, weight: Param = None, bias: Param = None, *, eps: float = 1e-5) -> Pair:
    """Layer normalization over (C, *spatial) (Ba et al. 2016), with one weight and bias per channel."""
    return group(moments, weight, bias, groups=1, eps=eps)


@twin_of(layer, at_any_size=True)
def by_layer_norm(x: Tensor, weight: Param = None, bias: Param = None, *, eps: float = 1e-5) -> Tensor | None:
    """Layer normalization by torch's function: of tokens whatever their number, for which no rule is as fast."""
    if x.dim() > 2 and not best_by_torch(x):
        return None
    return by_group_norm(x, weight, bias, groups=1, eps=eps)


class _LayerNorm(SampleStatistics):
    """Layer normalization over channels and positions (Ba et al. 2016), with one weight and bias per channel.

    The same function as ``nn.GroupNorm`` with one group. (``nn.LayerNorm`` learns one weight per position too.)
    Arguments ``num_features``, ``eps``, ``affine``, ``bias``, ``device``, ``dtype`` as of :class:`flexnorm.FlexNorm`.
    """

    norm_name = torch_layer = "layer"
    twin_at_any_size = True

    @classmethod
    def placed(cls, channel_axis: int = 1, per_position: bool | None = None) -> type[Norm]:
        """Of single positions it is :class:`LayerNorm`."""
        return LayerNorm if per_position or (channel_axis == -1 and per_position is None) else cls

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


class LayerNorm(LastAxes, _LayerNorm):
    """Layer normalization of each position (Ba et al. 2016) in the form of ``nn.LayerNorm``, whose state dicts load.

    Over the last axes: tokens (B, T, C), images channels last, features. With ``channel_axis=1`` over the channels at
    each position of (N, C, *spatial), as in ConvNeXt. (``LayerNorm1d``, ``2d`` and ``3d`` normalize channels and
    positions of a sample together.)

    Args:
        normalized_shape: Sizes of the last axes, over which to normalize; one number C for the last axis.
        eps: Added to the variance.
        elementwise_affine: Whether to learn a ``weight`` and a ``bias`` of ``normalized_shape``.
        bias: ``False`` leaves out the bias only.
        channel_axis: -1, or 1 to normalize over axis 1; ``normalized_shape`` is then one number.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Attributes:
        normalized_shape: As a tuple.

    Raises:
        ValueError: If ``normalized_shape`` is empty, or more than one number with ``channel_axis=1``.

    Examples:
        >>> x = torch.randn(2, 5, 8)
        >>> ours, theirs = LayerNorm(8), torch.nn.LayerNorm(8)
        >>> _ = ours.load_state_dict(theirs.state_dict())
        >>> ours(x).allclose(theirs(x), atol=1e-5)
        True
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        channel_axis: int = -1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, channel_axis, device, dtype)

    def rule(self, moments: Moments) -> Pair:
        """Standardize each position with its own moments."""
        return layer(moments, self.flat(self.weight), self.flat(self.bias), eps=self.eps or 0.0)
