"""What zero padding does to the variance, and its correction.

A pre-activation is a sum over the taps of a filter. Taps that fall on padding add nothing, so under an input of unit
variance the variance at position p is the squared norm of the part of the unit filter that lies inside the image,

    v_c(p) = sum over input channels and taps inside the image of W[c, ...]^2 / ||W_c||^2,

which is one in the interior and about 2/3 on an edge, 4/9 in a corner of a 3x3 filter. The map is itself a
convolution: of an image of ones with the squared filters. In a transposed convolution it also shows how unevenly the
taps fall on the positions of the output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from flexnorm.nn.normprop.base import NormPropLayer

BORDERS = ("paper", "exact")
"""Values of ``border=``: leave padding alone as the paper does, or divide by ``sqrt(v_c(p))``."""


def _variance(layer: NormPropLayer, unit: Tensor, size: tuple[int, ...]) -> Tensor:
    ones = unit.new_ones((1, layer.in_channels, *size))
    with torch.autocast(unit.device.type, enabled=False):
        return layer._linear(ones, unit.square(), None)


def inverse_deviation(layer: NormPropLayer, unit: Tensor, size: tuple[int, ...]) -> Tensor:
    """``1 / sqrt(v_c(p))``, ``(1, C, *output size)``, and 1 where every tap falls on padding.

    Args:
        layer: A convolutional layer.
        unit: Its weight with unit filters.
        size: Spatial size of the input.
    """
    variance = _variance(layer, unit, size)
    return torch.where(variance > 0, variance, 1.0).rsqrt()


@torch.no_grad()
def border_variance(layer: NormPropLayer, size: tuple[int, ...]) -> Tensor:
    """Variance of a convolutional layer's normalized pre-activations, position by position, under unit-variance input.

    Its mean over positions is what the layer keeps of the variance: 1 - mean is what zero padding costs, before any
    correction.

    Args:
        layer: A ``NormPropConv`` or ``NormPropConvTranspose``.
        size: Spatial size of the input, such as ``(32, 32)``.

    Returns:
        ``(C, *output size)``.

    Raises:
        ValueError: If ``layer`` has no spatial axes, or ``size`` the wrong length.

    Examples:
        >>> from flexnorm.nn.normprop import NormPropConv2d
        >>> float(border_variance(NormPropConv2d(4, 2, 3, padding=1), (8, 8))[:, 1:-1, 1:-1].mean())
        1.0
    """
    if layer.spatial == 0 or len(size) != layer.spatial:
        raise ValueError(f"size must have {layer.spatial} axes as the layer has, and at least one, got {tuple(size)}")
    return _variance(layer, layer._scaled(layer.weight, layer._fan_gain() / layer.filter_norms()), tuple(size))[0]
