"""Plain inference modules that ``fold()`` of a NormProp layer is made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexnorm.nn.normprop.activations import Activation


class _Table(nn.Module):
    """Base: per-channel numbers kept as buffers in the shape in which they broadcast."""

    def _put(self, name: str, table: Tensor | None, spatial: int, dtype: torch.dtype) -> None:
        value = None if table is None else table.detach().to(dtype).reshape(-1, *(1,) * spatial).clone()
        self.register_buffer(name, value)


class ChannelFloor(_Table):
    """``max(x, floor[c])``: a ReLU whose lower limit differs by channel.

    Args:
        floor: ``(C,)``.
        spatial: Number of axes after the channels.
        dtype: Of the stored table.
        inplace: Overwrite the input where no gradient is asked for, as ``nn.ReLU(inplace=True)`` does: behind a linear
            map of one's own.
    """

    floor: Tensor

    def __init__(self, floor: Tensor, spatial: int, dtype: torch.dtype, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace
        self._put("floor", floor, spatial, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``max(x, floor)``, of the shape of ``x``."""
        floor = self.floor.to(x.dtype)
        if self.inplace and not torch.compiler.is_compiling() and not (x.requires_grad and torch.is_grad_enabled()):
            return x.clamp_(min=floor)
        return torch.maximum(x, floor)


class ChannelPReLU(_Table):
    """``x`` where positive, ``slope[c] * x`` elsewhere; unlike ``nn.PReLU`` also for inputs without a batch axis.

    Args:
        slope: ``(C,)``.
        spatial: Number of axes after the channels.
        dtype: Of the stored table.
    """

    slope: Tensor

    def __init__(self, slope: Tensor, spatial: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._put("slope", slope, spatial, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the rectified ``x``."""
        return torch.where(x > 0, x, self.slope.to(x.dtype) * x)


class ChannelAffine(_Table):
    """``scale[c] * x + shift[c]``.

    Args:
        scale: ``(C,)``, or None for 1.
        shift: ``(C,)``.
        spatial: Number of axes after the channels.
        dtype: Of the stored tables.
    """

    scale: Tensor | None
    shift: Tensor

    def __init__(self, scale: Tensor | None, shift: Tensor, spatial: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._put("scale", scale, spatial, dtype)
        self._put("shift", shift, spatial, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the affine map of ``x``."""
        shift = self.shift.to(x.dtype)
        return x + shift if self.scale is None else torch.addcmul(shift, x, self.scale.to(x.dtype))


class ChannelPad(_Table):
    """Pad an image with a constant per channel.

    Args:
        value: ``(C,)``.
        pads: Widths as of :func:`torch.nn.functional.pad`: two per axis, last axis first.
        spatial: Number of axes after the channels.
        dtype: Of the stored table.
    """

    value: Tensor

    def __init__(self, value: Tensor, pads: list[int], spatial: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.pads = list(pads)
        self._put("value", value, spatial, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the padded ``x``."""
        value = self.value.to(x.dtype)
        return F.pad(x - value, self.pads) + value


class Elementwise(nn.Module):
    """An elementwise function as a module.

    Args:
        activation: What is applied.
    """

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Return ``activation(x)``."""
        return self.activation(x)

    def extra_repr(self) -> str:
        """The activation's name."""
        return repr(self.activation.name)


_PLAIN: dict[object, type[nn.Module]] = {
    F.relu: nn.ReLU,
    F.gelu: nn.GELU,
    F.silu: nn.SiLU,
    F.tanh: nn.Tanh,
    F.sigmoid: nn.Sigmoid,
    F.mish: nn.Mish,
    F.elu: nn.ELU,
}


def activation_module(activation: Activation) -> nn.Module:
    """Return torch's own module of ``activation`` where there is one (exporters know it), else Elementwise."""
    kind = _PLAIN.get(activation.function)
    return Elementwise(activation) if kind is None else kind()
