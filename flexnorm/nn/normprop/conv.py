"""Convolutional NormProp layers (Eq. 11): one gamma, bias and Frobenius norm per filter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexnorm._messages import unknown_name
from flexnorm.nn.normprop.base import NormPropLayer
from flexnorm.nn.normprop.border import BORDERS, inverse_deviation
from flexnorm.nn.normprop.checks import positive, sizes
from flexnorm.nn.normprop.constants import ActivationLike
from flexnorm.nn.normprop.folded import ChannelPad
from flexnorm.nn.normprop.units import DEFAULT_EPS

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
Size = int | Sequence[int]


class _NormPropConv(NormPropLayer):
    _conv: ClassVar[Callable[..., Tensor]]
    _plain: ClassVar[type[nn.Module]]
    padding_value: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
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
        if padding_mode not in PADDING_MODES:
            raise ValueError(unknown_name("padding_mode", padding_mode, PADDING_MODES))
        if border not in BORDERS:
            raise ValueError(unknown_name("border", border, BORDERS))
        if border == "exact" and padding_mode != "zeros":
            raise ValueError(f"border='exact' corrects zero padding; padding_mode={padding_mode!r} does not need it")
        if isinstance(padding, str) and padding not in ("same", "valid"):
            raise ValueError(unknown_name("padding", padding, ("same", "valid")))
        kernel = sizes("kernel_size", kernel_size, self.spatial, 1)
        strides = sizes("stride", stride, self.spatial, 1)
        if padding == "same" and any(s != 1 for s in strides):
            raise ValueError(f"padding='same' needs stride 1, got {stride!r}")
        super().__init__(
            (filters, channels // group, *kernel),
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
        self.stride = strides
        self.padding: str | tuple[int, ...] = (
            padding if isinstance(padding, str) else sizes("padding", padding, self.spatial)
        )
        self.dilation = sizes("dilation", dilation, self.spatial, 1)
        self.padding_mode = padding_mode
        self.border = border
        self.register_buffer("padding_value", None)

    def _check(self, x: Tensor) -> None:
        axis = x.dim() - 1 - self.spatial
        if axis not in (0, 1) or x.shape[axis] != self.in_channels:
            names = ", ".join(("D", "H", "W")[-self.spatial :]) if self.spatial > 1 else "L"
            raise ValueError(
                f"{type(self).__name__} expects input (N, {self.in_channels}, {names}) or "
                f"({self.in_channels}, {names}), got shape {tuple(x.shape)}"
            )

    def _explicit_padding(self) -> list[int]:
        """Padding in the order of ``F.pad`` (last axis first, left and right)."""
        pads: list[int] = []
        for axis in reversed(range(self.spatial)):
            total = self.dilation[axis] * (self.kernel_size[axis] - 1)
            if self.padding == "same":
                pads += [total // 2, total - total // 2]
            else:
                side = 0 if isinstance(self.padding, str) else self.padding[axis]
                pads += [side, side]
        return pads

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        conv = type(self)._conv
        if self.padding_mode == "zeros":
            return conv(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        x = F.pad(x, self._explicit_padding(), mode=self.padding_mode)
        return conv(x, weight, bias, self.stride, 0, self.dilation, self.groups)

    @torch.no_grad()
    def pad_with_(self, value: Tensor | None) -> None:
        """State what zero padding is to put around the image instead of zeros: a constant per input channel.

        A converted network needs it: the zeros around the original's feature maps are not the zeros of the
        standardized ones. It costs one more pass over the output, and a convolution of a single image.

        Args:
            value: ``(in_channels,)``, or None for zeros.

        Raises:
            ValueError: For another shape, or a layer that does not pad with zeros.
        """
        if value is not None and value.shape != (self.in_channels,):
            raise ValueError(f"the padding needs {self.in_channels} values, got shape {tuple(value.shape)}")
        if value is not None and (self.padding_mode != "zeros" or self.border == "exact"):
            raise ValueError("only a layer with padding_mode='zeros' and border='paper' can pad with other values")
        self.padding_value = None if value is None else value.to(self.weight)

    def _padding_shift(self, x: Tensor, weight: Tensor) -> Tensor | None:
        if self.padding_value is None:
            return None
        # Padding with v is padding x - v with zeros and adding v everywhere; the difference does not depend on x.
        value = self.padding_value.reshape(-1, *(1,) * self.spatial)
        image = value.expand(self.in_channels, *x.shape[-self.spatial :]).unsqueeze(0)
        taps = value.reshape(self.groups, 1, -1, *(1,) * self.spatial)
        everywhere = (weight.reshape(self.groups, -1, *weight.shape[1:]) * taps).flatten(0, 1).flatten(1).sum(1)
        inside: Tensor = type(self)._conv(image, weight, None, self.stride, self.padding, self.dilation, self.groups)
        return everywhere.reshape(-1, *(1,) * self.spatial) - inside[0]

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
        padded = self.padding_value is not None
        plain = type(self)._plain(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            stride=self.stride,
            padding=0 if padded else self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=self._has_shift(),
            padding_mode=self.padding_mode,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        folded = self._fold_into(plain)
        if self.padding_value is None:
            return folded
        pad = ChannelPad(self.padding_value, self._explicit_padding(), self.spatial, self.weight.dtype)
        return nn.Sequential(pad, *(folded if isinstance(folded, nn.Sequential) else [folded]))

    def extra_repr(self) -> str:
        """Arguments that define the layer, defaults left out."""
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        if self.padding not in ((0,) * self.spatial, "valid"):
            parts.append(f"padding={self.padding!r}")
        if any(d != 1 for d in self.dilation):
            parts.append(f"dilation={self.dilation}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        if self.padding_mode != "zeros":
            parts.append(f"padding_mode={self.padding_mode!r}")
        if self.border != "paper":
            parts.append(f"border={self.border!r}")
        if self.padding_value is not None:
            parts.append("padding_value=...")
        return ", ".join([*parts, self._options()])


_DOC = """{axes} convolution with unit filters, activation and standardization, ``(N, C_in, {shape}) -> (N, C_out,
{shape})``.

    ``y = (act(gamma (W * x) / ||W||_F + bias) - mean) / sqrt(var + eps)`` with mean and variance of ``act(gamma z +
    bias)``, z ~ N(0, 1) (Eq. 11 of arXiv 1603.01431 for ``constants="paper"``). The norm is per filter, over its
    input channels (of its group) and kernel positions. Input without a batch axis is accepted.

    Args:
        in_channels: Channels of the input.
        out_channels: Number of filters.
        kernel_size: As for ``nn.Conv{n}d``, like ``stride``, ``padding`` (with ``"same"`` and ``"valid"``),
            ``dilation``, ``groups`` and ``padding_mode``.
        stride: Step of the window.
        padding: Zeros (or what ``padding_mode`` says) on both sides of every axis.
        dilation: Spacing of the kernel's taps.
        groups: Groups of channels; ``in_channels`` for a depthwise convolution.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        activation: Name, module, elementwise function or :class:`Activation`; None for a last layer: the affine map
            ``gamma (W * x) / ||W|| + bias``, not standardized. ``"identity"``: ``W * x / ||W||`` with no other
            parameter (for a shortcut that changes shape).
        constants: ``"exact"``: mean and variance follow gamma and bias. ``"paper"``: those of gamma = 1, bias = 0.
        init: ``"stable"`` (gamma 1, bias 0.5 for ReLU; see :mod:`flexnorm.nn.normprop.initialization`) or ``"paper"``
            (gamma 1/1.21, bias 0). None: the one that goes with ``constants``.
        unitize: Divide each sample by its root mean square over channels and positions first.
        border: ``"paper"``: nothing is done about zero padding, which lowers the variance near the border.
            ``"exact"``: each filter's response is divided by the norm of the part of the filter that lies inside the
            image (costs one elementwise pass).
        eps: Added to the exact variance.
        device: As for ``nn.Conv{n}d``.
        dtype: As for ``nn.Conv{n}d``.

    Raises:
        ValueError: For sizes out of range, channels not divisible by groups, or unknown names.
        TypeError: For an activation or dtype of the wrong kind.

    Examples:
        >>> layer = NormPropConv{n}d(3, 8, 3, padding=1)
        >>> layer(torch.randn(2, 3, {example})).shape
        torch.Size([2, 8, {example}])
    """


class NormPropConv1d(_NormPropConv):  # noqa: D101
    spatial = 1
    _conv = staticmethod(F.conv1d)
    _plain = nn.Conv1d
    __doc__ = _DOC.format(axes="1-D", shape="L", n=1, example="16")


class NormPropConv2d(_NormPropConv):  # noqa: D101
    spatial = 2
    _conv = staticmethod(F.conv2d)
    _plain = nn.Conv2d
    __doc__ = _DOC.format(axes="2-D", shape="H, W", n=2, example="16, 16")


class NormPropConv3d(_NormPropConv):  # noqa: D101
    spatial = 3
    _conv = staticmethod(F.conv3d)
    _plain = nn.Conv3d
    __doc__ = _DOC.format(axes="3-D", shape="D, H, W", n=3, example="4, 8, 8")
