"""Convolutional NormProp layers, transposed ones too (Eq. 11): one gamma, bias and Frobenius norm per filter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexnorm.nn.normprop.checks import one_of, positive, sizes
from flexnorm.nn.normprop.elementwise import ActivationLike, ChannelPad, per_channel
from flexnorm.nn.normprop.layer import LayerOptions, NormPropLayer

Size = int | Sequence[int]

_UNSET = {"padding": 0, "output_padding": 0, "dilation": 1, "groups": 1, "padding_mode": "zeros"}


class ConvLayer(NormPropLayer):
    """What convolutions and transposed ones share; ``geometry``: sizes by name, ``unit``: activation and constants."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: str | tuple[int, ...]

    transposed: ClassVar[bool] = False
    plain: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    shared = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")

    def __init__(
        self, inputs: int, outputs: int, groups: int, geometry: dict[str, Size], border: str, *unit: Any, **options: Any
    ) -> None:
        channels, filters = positive("in_channels", inputs), positive("out_channels", outputs)
        if channels % positive("groups", groups) or filters % groups:
            raise ValueError(f"in_channels {channels} and out_channels {filters} must be divisible by groups {groups}")
        checked = {k: sizes(k, v, self.spatial, 0 if k.endswith("padding") else 1) for k, v in geometry.items()}
        outer = (channels, filters // groups) if self.transposed else (filters, channels // groups)
        shape = (*outer, *checked["kernel_size"])
        super().__init__(shape, filters, *unit, groups=groups, **options)
        self.in_channels = channels
        self.border = one_of("border", border, ("paper", "exact"))
        for name, value in checked.items():
            setattr(self, name, value)

    def _check(self, x: Tensor) -> None:
        axis = x.dim() - 1 - self.spatial
        if axis not in (0, 1) or x.shape[axis] != self.in_channels:
            names = ", ".join(("D", "H", "W")[-self.spatial :]) if self.spatial > 1 else "L"
            raise ValueError(
                f"{type(self).__name__} expects {self.in_channels} channels, (N, {self.in_channels}, {names}) or "
                f"({self.in_channels}, {names}), got shape {tuple(x.shape)}"
            )

    def variance(self, unit: Tensor, size: tuple[int, ...]) -> Tensor:
        """Squared norm ``(1, C, *output size)`` of what lies inside an image of that ``size`` of each unit filter."""
        ones = unit.new_ones((1, self.in_channels, *size))
        with torch.autocast(unit.device.type, enabled=False):
            return self._linear(ones, unit.square(), None)

    def _mapped(self, x: Tensor, weight: Tensor, shift: Tensor | None, factor: Tensor) -> Tensor:
        if self.border != "exact":
            return super()._mapped(x, weight, shift, factor)
        variance = self.variance(self.scaled(self.weight, factor), tuple(x.shape[-self.spatial :]))
        # 1 where every tap falls on padding.
        scale = torch.where(variance > 0, variance, 1.0).rsqrt()
        u = self._linear(x, weight, None)
        u = u * (scale if x.dim() == 2 + self.spatial else scale[0]).to(u.dtype)
        return u if shift is None else u + per_channel(shift, self.spatial, u)

    def _folded(self, **changed: Any) -> nn.Module:
        if self.border == "exact":
            raise RuntimeError(
                "a layer with border='exact' does not fold: its correction depends on the size of the input; "
                "build it with border='paper'"
            )
        arguments = {name: getattr(self, name) for name in self.shared} | changed
        options = {"bias": self._has_shift(), "device": self.weight.device, "dtype": self.weight.dtype}
        return self._fold_into(self.plain[self.spatial - 1](**arguments, **options))

    def extra_repr(self) -> str:
        """Arguments that define the layer, defaults left out."""
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        for name, unset in _UNSET.items():
            value = getattr(self, name, unset)
            if value not in (unset, (unset,) * self.spatial, "valid"):
                parts.append(f"{name}={value!r}")
        if getattr(self, "padding_value", None) is not None:
            parts.append("padding_value=...")
        if self.border != "paper":
            parts.append(f"border={self.border!r}")
        return ", ".join([*parts, self._options()])


class NormPropConv(ConvLayer):
    """Convolution with unit filters, activation and standardization; used as ``NormPropConv1d``, ``2d`` and ``3d``.

    ``y = (act(gamma (W * x) / ||W||_F + bias) - mean) / sqrt(var + eps)`` with mean and variance of ``act(gamma z +
    bias)``, z ~ N(0, 1) (Eq. 11 of arXiv 1603.01431 for ``constants="paper"``). The norm is per filter, over its
    input channels (of its group) and kernel positions. Input without a batch axis is accepted.

    Args:
        in_channels: As of ``nn.Conv2d``.
        out_channels: As of ``nn.Conv2d``.
        kernel_size: As of ``nn.Conv2d``.
        stride: As of ``nn.Conv2d``.
        padding: As of ``nn.Conv2d``.
        dilation: As of ``nn.Conv2d``.
        groups: As of ``nn.Conv2d``.
        padding_mode: As of ``nn.Conv2d``.
        activation: As of :class:`NormPropLinear`, like the options.
        constants: As of :class:`NormPropLinear`, like the options.
        border: ``"paper"``: nothing is done about zero padding, which lowers the variance near the border.
            ``"exact"``: each filter's response is divided by the norm of the part of the filter that lies inside the
            image (costs one elementwise pass).
        **options: ``init``, ``unitize``, ``eps``, ``device`` and ``dtype``.

    Raises:
        ValueError: For sizes out of range, channels not divisible by groups, or unknown names.
        TypeError: For an activation or dtype of the wrong kind.

    Examples:
        >>> layer = NormPropConv2d(3, 8, 3, padding=1)
        >>> layer(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 8, 16, 16])
    """

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
        *,
        border: str = "paper",
        **options: Unpack[LayerOptions],
    ) -> None:
        one_of("padding_mode", padding_mode, ("zeros", "reflect", "replicate", "circular"))
        if border == "exact" and padding_mode != "zeros":
            raise ValueError(f"border='exact' corrects zero padding; padding_mode={padding_mode!r} does not need it")
        geometry = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
        geometry |= {"padding": 0 if isinstance(padding, str) else padding}
        super().__init__(in_channels, out_channels, groups, geometry, border, activation, constants, **options)
        if isinstance(padding, str):
            self.padding = one_of("padding", padding, ("same", "valid"))
        if padding == "same" and any(s != 1 for s in self.stride):
            raise ValueError(f"padding='same' needs stride 1, got {stride!r}")
        self.padding_mode = padding_mode
        self.register_buffer("padding_value", None)

    def _explicit_padding(self) -> list[int]:
        """Padding in the order of ``F.pad`` (last axis first, left and right)."""
        pads: list[int] = []
        for axis in reversed(range(self.spatial)):
            total = self.dilation[axis] * (self.kernel_size[axis] - 1) if self.padding == "same" else 0
            side = total // 2 if isinstance(self.padding, str) else self.padding[axis]
            pads += [side, total - side if total else side]
        return pads

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor | None, padding: Any) -> Tensor:
        conv = (F.conv1d, F.conv2d, F.conv3d)[self.spatial - 1]
        return conv(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode == "zeros":
            return self._conv(x, weight, bias, self.padding)
        return self._conv(F.pad(x, self._explicit_padding(), mode=self.padding_mode), weight, bias, 0)

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

    def _mapped(self, x: Tensor, weight: Tensor, shift: Tensor | None, factor: Tensor) -> Tensor:
        if self.padding_value is None:
            return super()._mapped(x, weight, shift, factor)
        # Padding with v is padding x - v with zeros and adding v everywhere; the difference does not depend on x.
        value = self.padding_value.reshape(-1, *(1,) * self.spatial)
        image = value.expand(self.in_channels, *x.shape[-self.spatial :]).unsqueeze(0)
        taps = value.reshape(self.groups, 1, -1, *(1,) * self.spatial)
        everywhere = (weight.reshape(self.groups, -1, *weight.shape[1:]) * taps).flatten(0, 1).flatten(1).sum(1)
        added = everywhere.reshape(-1, *(1,) * self.spatial) - self._linear(image, weight, None)[0]
        u = self._linear(x, weight, None)
        return u + (added if shift is None else added + per_channel(shift, self.spatial, u))

    def _folded(self, **changed: Any) -> nn.Module:
        if self.padding_value is None:
            return super()._folded(**changed)
        folded = super()._folded(**changed, padding=0)
        pad = ChannelPad(self._explicit_padding(), self.spatial, self.weight.dtype, self.padding_value)
        return nn.Sequential(pad, *(folded if isinstance(folded, nn.Sequential) else [folded]))


class NormPropConv1d(NormPropConv, spatial=1):
    """:class:`NormPropConv` of signals, ``(N, C_in, L) -> (N, C_out, L)``."""


class NormPropConv2d(NormPropConv, spatial=2):
    """:class:`NormPropConv` of images, ``(N, C_in, H, W) -> (N, C_out, H, W)``."""


class NormPropConv3d(NormPropConv, spatial=3):
    """:class:`NormPropConv` of volumes, ``(N, C_in, D, H, W) -> (N, C_out, D, H, W)``."""


class NormPropConvTranspose(ConvLayer):
    """Transposed convolution with unit filters; used as ``NormPropConvTranspose1d``, ``2d`` and ``3d``.

    As :class:`NormPropConv`, errors too, with the filter's norm divided by ``sqrt(prod(stride))``, because an output
    position receives only that share of the filter's energy. Input without a batch axis is accepted.

    Args:
        in_channels: As of ``nn.ConvTranspose2d``.
        out_channels: As of ``nn.ConvTranspose2d``.
        kernel_size: As of ``nn.ConvTranspose2d``.
        stride: As of ``nn.ConvTranspose2d``.
        padding: As of ``nn.ConvTranspose2d``.
        output_padding: As of ``nn.ConvTranspose2d``.
        groups: As of ``nn.ConvTranspose2d``.
        dilation: As of ``nn.ConvTranspose2d``.
        activation: As of :class:`NormPropLinear`, like the options.
        constants: As of :class:`NormPropLinear`, like the options.
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
        self.fan_gain = math.sqrt(math.prod(self.stride))

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

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        conv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[self.spatial - 1]
        return conv(x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation)


class NormPropConvTranspose1d(NormPropConvTranspose, spatial=1):
    """:class:`NormPropConvTranspose` of signals, ``(N, C_in, L) -> (N, C_out, L)``."""


class NormPropConvTranspose2d(NormPropConvTranspose, spatial=2):
    """:class:`NormPropConvTranspose` of images, ``(N, C_in, H, W) -> (N, C_out, H, W)``."""


class NormPropConvTranspose3d(NormPropConvTranspose, spatial=3):
    """:class:`NormPropConvTranspose` of volumes, ``(N, C_in, D, H, W) -> (N, C_out, D, H, W)``."""


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
        >>> round(float(border_variance(NormPropConv2d(4, 2, 3, padding=1), (8, 8))[:, 1:-1, 1:-1].mean()), 4)
        1.0
    """
    if not isinstance(layer, ConvLayer) or len(size) != layer.spatial:
        raise ValueError(f"size must have {layer.spatial} axes as the layer has, and at least one, got {tuple(size)}")
    return layer.variance(layer.scaled(layer.weight, layer.fan_gain / layer.filter_norms()), tuple(size))[0]
