"""Root mean square normalization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor
from torch.nn import functional

from flexnorm.engine import Moments, Norm, twin_of
from flexnorm.nn._base import LastAxes, Pair, Param, Placed, SampleStatistics


def rms(moments: Moments, weight: Param = None, *, eps: float | None = 1e-5) -> Pair:
    """Root mean square normalization (Zhang & Sennrich 2019) of each sample over (C, *spatial).

    ``eps`` of ``None`` is the machine epsilon of the moments' type, as torch has it.
    """
    square = moments.pool("channels").mean_square
    scale = (square + (torch.finfo(square.dtype).eps if eps is None else eps)).rsqrt()
    scale = scale if weight is None else scale * weight
    return scale, torch.zeros_like(scale)


@twin_of(rms)
def by_rms_norm(x: Tensor, weight: Param = None, *, eps: float | None = 1e-5) -> Tensor | None:
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

    @classmethod
    def placed(cls, channel_axis: int = 1, per_position: bool | None = None) -> type[Norm]:
        """Of single positions it is :class:`RMSNorm`."""
        return RMSNorm if per_position or (channel_axis == -1 and per_position is None) else cls

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


class RMSNorm(LastAxes, _RMSNorm):
    """Root mean square normalization of each position in the form of ``nn.RMSNorm``, whose state dicts load.

    Over the last axes, or with ``channel_axis=1`` over the channels at each position of (N, C, *spatial). No mean is
    subtracted (Zhang & Sennrich 2019). (``RMSNorm1d``, ``2d`` and ``3d`` take channels and positions together.)

    Args:
        normalized_shape: Sizes of the last axes, over which to normalize; one number C for the last axis.
        eps: Added to the mean square; ``None`` for the machine epsilon of the type of the computation, as torch has it:
            that of float64 for float64 input, else that of float32.
        elementwise_affine: Whether to learn a ``weight`` of ``normalized_shape``.
        channel_axis: -1, or 1 to normalize over axis 1; ``normalized_shape`` is then one number.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Attributes:
        normalized_shape: As a tuple.

    Raises:
        ValueError: If ``normalized_shape`` is empty, or more than one number with ``channel_axis=1``.

    Examples:
        >>> x = torch.randn(2, 5, 8)
        >>> RMSNorm(8)(x).allclose(torch.nn.RMSNorm(8)(x), atol=1e-5)
        True
    """

    torch_layer = "rms"

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        channel_axis: int = -1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, False, channel_axis, device, dtype)

    def rule(self, moments: Moments) -> Pair:
        """Divide each position by its root mean square."""
        return rms(moments, self.flat(self.weight), eps=self.eps)
