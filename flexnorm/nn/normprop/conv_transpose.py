"""Transposed convolutional NormProp layers: Eq. 11 with the fan-in that an output position really has.

With stride s an output position receives only the taps of its phase, about ``1 / prod(s)`` of the filter's energy.
Dividing by the filter's norm would shrink the variance by that factor, so here it is divided by ``||W|| /
sqrt(prod(s))``: unit variance on average over positions. Where the kernel is no multiple of the stride the phases
differ (the checkerboard); ``border="exact"`` evens them out.
"""

from __future__ import annotations

import math
from typing import Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from flexnorm.nn.normprop.conv import ConvLayer, Size
from flexnorm.nn.normprop.elementwise import ActivationLike
from flexnorm.nn.normprop.layer import LayerOptions


class NormPropConvTranspose(ConvLayer):
    """Transposed convolution with unit filters; used as ``NormPropConvTranspose1d``, ``2d`` and ``3d``.

    As :class:`NormPropConv`, errors too, with the filter's norm divided by ``sqrt(prod(stride))``, because an output
    position receives only that share of the filter's energy. Input without a batch axis is accepted.

    Args:
        in_channels: Channels of the input.
        out_channels: Number of filters.
        kernel_size: As for ``nn.ConvTranspose2d``, like the following sizes.
        stride: Step of the window.
        padding: Cut off both sides of the output.
        output_padding: Added to one side of the output.
        groups: Groups of channels.
        dilation: Spacing of the kernel's taps.
        activation: As of :class:`NormPropLinear`, like ``constants`` and the options.
        constants: ``"exact"`` or ``"paper"``.
        border: ``"paper"``: nothing is done about borders and phases. ``"exact"``: unit variance at every position.
        **options: ``init``, ``unitize``, ``eps``, ``device`` and ``dtype``.
    """

    padding: tuple[int, ...]
    output_padding: tuple[int, ...]

    transposed = True
    plain = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    shared = (*ConvLayer.shared[:-1], "output_padding")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        dilation: Size = 1,
        activation: ActivationLike | None = "relu",
        constants: str = "exact",
        *,
        border: str = "paper",
        **options: Unpack[LayerOptions],
    ) -> None:
        geometry = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
        geometry |= {"output_padding": output_padding, "dilation": dilation}
        super().__init__(in_channels, out_channels, groups, geometry, border, activation, constants, **options)

    def _grouped(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.groups, -1, *weight.shape[1:])

    def filters(self, weight: Tensor) -> Tensor:
        """A ``weight`` as (C, fan-in): one row per unit."""
        return self._grouped(weight).transpose(1, 2).reshape(self.out_channels, -1)

    def scaled(self, weight: Tensor, scale: Tensor) -> Tensor:
        """A ``weight`` with the filter of unit c multiplied by ``scale[c]``."""
        # Output channel c = (group g, j): its filter is weight[inputs of g, j].
        scale = scale.reshape(self.groups, 1, -1, *(1,) * self.spatial)
        return (self._grouped(weight) * scale).reshape(weight.shape)

    @property
    def fan_gain(self) -> float:
        """Root of the product of the strides: what an output position receives is that much less."""
        return math.sqrt(math.prod(self.stride))

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        conv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[self.spatial - 1]
        return conv(x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation)


class NormPropConvTranspose1d(NormPropConvTranspose):
    """:class:`NormPropConvTranspose` of signals, ``(N, C_in, L) -> (N, C_out, L)``."""

    spatial = 1


class NormPropConvTranspose2d(NormPropConvTranspose):
    """:class:`NormPropConvTranspose` of images, ``(N, C_in, H, W) -> (N, C_out, H, W)``."""

    spatial = 2


class NormPropConvTranspose3d(NormPropConvTranspose):
    """:class:`NormPropConvTranspose` of volumes, ``(N, C_in, D, H, W) -> (N, C_out, D, H, W)``."""

    spatial = 3
