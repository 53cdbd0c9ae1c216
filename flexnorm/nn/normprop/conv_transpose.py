"""Transposed convolutional NormProp layers: Eq. 11 with the fan-in that an output position really has.

With stride s an output position receives only the taps of its phase, about ``1 / prod(s)`` of the filter's energy.
Dividing by the filter's norm would shrink the variance by that factor, so here it is divided by ``||W|| /
sqrt(prod(s))``: unit variance on average over positions. Where the kernel is no multiple of the stride the phases
differ (the checkerboard); ``border="exact"`` evens them out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexnorm._messages import unknown_name
from flexnorm.nn.normprop.base import NormPropLayer
from flexnorm.nn.normprop.border import BORDERS, inverse_deviation
from flexnorm.nn.normprop.checks import positive, sizes
from flexnorm.nn.normprop.constants import ActivationLike
from flexnorm.nn.normprop.conv import Size
from flexnorm.nn.normprop.units import DEFAULT_EPS


class _NormPropConvTranspose(NormPropLayer):
    _conv: ClassVar[Callable[..., Tensor]]
    _plain: ClassVar[type[nn.Module]]

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
        init: str | None = None,
        unitize: bool = False,
        *,
        border: str = "paper",
        eps: float = DEFAULT_EPS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        channels, filters = positive("in_channels", in_channels), positive("out_channels", out_channels)
        group = positive("groups", groups)
        if channels % group or filters % group:
            raise ValueError(f"in_channels {channels} and out_channels {filters} must be divisible by groups {group}")
        if border not in BORDERS:
            raise ValueError(unknown_name("border", border, BORDERS))
        kernel = sizes("kernel_size", kernel_size, self.spatial, 1)
        super().__init__(
            (channels, filters // group, *kernel),
            filters,
            activation=activation,
            constants=constants,
            init=init,
            unitize=unitize,
            eps=eps,
            groups=group,
            device=device,
            dtype=dtype,
        )
        self.in_channels = channels
        self.kernel_size = kernel
        self.stride = sizes("stride", stride, self.spatial, 1)
        self.padding = sizes("padding", padding, self.spatial)
        self.output_padding = sizes("output_padding", output_padding, self.spatial)
        self.dilation = sizes("dilation", dilation, self.spatial, 1)
        self.border = border

    def _rows(self, weight: Tensor) -> Tensor:
        grouped = weight.reshape(self.groups, weight.shape[0] // self.groups, *weight.shape[1:])
        return grouped.transpose(1, 2).reshape(self.out_channels, -1)

    def _scaled(self, weight: Tensor, scale: Tensor) -> Tensor:
        # Output channel c = (group g, j): its filter is weight[inputs of g, j].
        grouped = weight.reshape(self.groups, weight.shape[0] // self.groups, *weight.shape[1:])
        return (grouped * scale.reshape(self.groups, 1, -1, *(1,) * self.spatial)).reshape(weight.shape)

    def _fan_gain(self) -> float:
        return math.sqrt(math.prod(self.stride))

    def _check(self, x: Tensor) -> None:
        axis = x.dim() - 1 - self.spatial
        if axis not in (0, 1) or x.shape[axis] != self.in_channels:
            raise ValueError(
                f"{type(self).__name__} expects {self.in_channels} channels before {self.spatial} spatial axes, "
                f"got shape {tuple(x.shape)}"
            )

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        conv = type(self)._conv
        return conv(x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation)

    def _border_scale(self, x: Tensor, unit: Tensor) -> Tensor | None:
        if self.border != "exact":
            return None
        scale = inverse_deviation(self, unit, tuple(x.shape[-self.spatial :]))
        return scale if x.dim() == 2 + self.spatial else scale[0]

    @torch.no_grad()
    def fold(self) -> nn.Module:
        """Return plain modules that compute the same function; see :meth:`NormPropLayer.fold`."""
        if self.border == "exact":
            raise RuntimeError(
                "a layer with border='exact' does not fold: its correction depends on the size of the input; "
                "build it with border='paper'"
            )
        plain = type(self)._plain(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            output_padding=self.output_padding,
            groups=self.groups,
            bias=self._has_shift(),
            dilation=self.dilation,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        return self._fold_into(plain)

    def extra_repr(self) -> str:
        """Arguments that define the layer."""
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        parts += [f"{name}={getattr(self, name)}" for name in ("padding", "output_padding") if any(getattr(self, name))]
        if any(d != 1 for d in self.dilation):
            parts.append(f"dilation={self.dilation}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        if self.border != "paper":
            parts.append(f"border={self.border!r}")
        return ", ".join([*parts, self._options()])


_DOC = """Transposed {n}-D convolution with unit filters, activation and standardization.

    As ``NormPropConv{n}d``, with the filter's norm divided by ``sqrt(prod(stride))``, because an output position
    receives only that share of the filter's energy.

    Args:
        in_channels: Channels of the input.
        out_channels: Number of filters.
        kernel_size: As for ``nn.ConvTranspose{n}d``, like the following sizes.
        stride: Step of the window.
        padding: Cut off both sides of the output.
        output_padding: Added to one side of the output.
        groups: Groups of channels.
        dilation: Spacing of the kernel's taps.
        activation: As for ``NormPropConv{n}d``, like the following.
        constants: ``"exact"`` or ``"paper"``.
        init: ``"stable"``, ``"paper"``, or None for the one that goes with ``constants``.
        unitize: Divide each sample by its root mean square first.
        border: ``"paper"``: nothing is done about borders and phases. ``"exact"``: unit variance at every position.
        eps: Added to the exact variance.
        device: As for ``nn.ConvTranspose{n}d``.
        dtype: As for ``nn.ConvTranspose{n}d``.

    Raises:
        ValueError: For sizes out of range, channels not divisible by groups, or unknown names.
        TypeError: For an activation or dtype of the wrong kind.

    Shape:
        ``(N, C_in, {shape}) -> (N, C_out, {shape})``, also without the batch axis.
    """


class NormPropConvTranspose1d(_NormPropConvTranspose):  # noqa: D101
    spatial = 1
    _conv = staticmethod(F.conv_transpose1d)
    _plain = nn.ConvTranspose1d
    __doc__ = _DOC.format(n=1, shape="L")


class NormPropConvTranspose2d(_NormPropConvTranspose):  # noqa: D101
    spatial = 2
    _conv = staticmethod(F.conv_transpose2d)
    _plain = nn.ConvTranspose2d
    __doc__ = _DOC.format(n=2, shape="H, W")


class NormPropConvTranspose3d(_NormPropConvTranspose):  # noqa: D101
    spatial = 3
    _conv = staticmethod(F.conv_transpose3d)
    _plain = nn.ConvTranspose3d
    __doc__ = _DOC.format(n=3, shape="D, H, W")
