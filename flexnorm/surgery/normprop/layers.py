"""NormProp layers that compute what trained layers computed, out of their weights and the moments of their outputs.

With x = scale x' + shift the input of a linear map, W x + b = (W scale) x' + (W shift + b). Let the rows of W scale
have norms n, and W x + b mean m and standard deviation d. Then z = (W scale / n) x' is what unit filters yield, and
(z - center) / spread with center = (m - b - W shift) / n and spread = d / n is standardized: W x + b is d times that,
plus m.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flexnorm.nn.normprop import (
    Activation,
    NormPropActivation,
    NormPropAdd,
    NormPropConv1d,
    NormPropConv2d,
    NormPropConv3d,
    NormPropConvTranspose1d,
    NormPropConvTranspose2d,
    NormPropConvTranspose3d,
    NormPropLayer,
    NormPropLinear,
    NormPropUnits,
    safe_norm,
)
from flexnorm.surgery._reading import RefusedError
from flexnorm.surgery.normprop.carry import Carry

__all__ = ["Moments", "activation_layer", "add_layer", "linear_layer", "plain_linear", "through"]

_CONVS: dict[type[nn.Module], type[NormPropLayer]] = {
    nn.Conv1d: NormPropConv1d,
    nn.Conv2d: NormPropConv2d,
    nn.Conv3d: NormPropConv3d,
    nn.ConvTranspose1d: NormPropConvTranspose1d,
    nn.ConvTranspose2d: NormPropConvTranspose2d,
    nn.ConvTranspose3d: NormPropConvTranspose3d,
}


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation (C,) of a value of the original network, float64."""

    mean: Tensor
    std: Tensor

    def floored(self) -> Moments:
        """With a standard deviation that can be divided by: a unit that never changes has none."""
        floor = max(float(self.std.mean()) * 1e-5, 1e-12)
        return Moments(self.mean, self.std.clamp_min(floor))


@dataclass(frozen=True)
class _Map:
    """``W x + b`` in terms of standardized values: ``weight x' + bias``, padding with ``pad``."""

    weight: Tensor
    bias: Tensor
    pad: Tensor | None


def _groups(module: nn.Module) -> int:
    return 1 if isinstance(module, nn.Linear) else int(module.groups)  # type: ignore[arg-type]


def _transposed(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvTransposeNd)


def _by_input(module: nn.Module, table: Tensor) -> Tensor:
    """A table of the input's channels in the shape in which it multiplies the weight."""
    weight = module.get_parameter("weight")
    ones = (1,) * (weight.dim() - 2)
    if _transposed(module):
        return table.view(-1, 1, *ones)
    groups = _groups(module)
    filters = weight.shape[0] // groups
    return table.view(groups, -1).repeat_interleave(filters, 0).view(weight.shape[0], -1, *ones)


def through(module: nn.Module, carry: Carry | None, shape: torch.Size, *, keep_padding: bool) -> _Map:
    """A linear map of values that stand for others.

    Args:
        module: A convolution, transposed convolution or linear map.
        carry: Of its input; None if that is the original's.
        shape: Of its input.
        keep_padding: Pad with the values that stand for zero, instead of with zeros.

    Raises:
        RefusedError: If that is no linear map plus a constant per channel.
    """
    weight = module.get_parameter("weight").detach().double().cpu()
    own = module._parameters.get("bias")
    out = int(module.out_features if isinstance(module, nn.Linear) else module.out_channels)  # type: ignore[arg-type]
    bias = torch.zeros(out, dtype=torch.float64) if own is None else own.detach().double().cpu()
    if carry is None:
        return _Map(weight, bias, None)
    scaled = weight * _by_input(module, carry.scale)
    if not bool(carry.shift.any()):
        return _Map(scaled, bias, None)
    if _transposed(module):
        return _Map(scaled, bias + _constant(module, carry, shape), None)
    moved = bias + (weight * _by_input(module, carry.shift)).flatten(1).sum(1)
    padded = not isinstance(module, nn.Linear) and module.padding_mode == "zeros" and _padding(module)
    return _Map(scaled, moved, -carry.shift / carry.scale if padded and keep_padding else None)


def _padding(module: nn.Module) -> bool:
    padding = module.padding
    if isinstance(padding, str):
        return padding == "same" and any(k > 1 for k in module.kernel_size)  # type: ignore[union-attr]
    return any(padding)  # type: ignore[arg-type]


def _constant(module: nn.Module, carry: Carry, shape: torch.Size) -> Tensor:
    """What a transposed convolution makes of the shift, if that is the same at every position."""
    with torch.no_grad():
        image = carry.shift.view(1, -1, *(1,) * (len(shape) - 2)).expand(1, -1, *shape[2:])
        exact: Any = type(module).__new__(type(module))
        exact.__dict__.update(module.__dict__)
        exact._parameters = {"weight": nn.Parameter(module.get_parameter("weight").double().cpu()), "bias": None}
        out: Tensor = exact(image)
        made = out[0].flatten(1)
    if float((made - made[:, :1]).abs().max()) > 1e-9 * max(1.0, float(made.abs().max())):
        raise RefusedError("the mean of its input adds another constant at every position")
    constant: Tensor = made[:, 0]
    return constant


def plain_linear(module: nn.Module, linear: _Map) -> nn.Module:
    """The same kind of layer for standardized input, its output the original's: for a head.

    Raises:
        RefusedError: If it would have to pad with other values than zero.
    """
    if linear.pad is not None:
        raise RefusedError("pads with zeros, which are no zeros of its standardized input")
    own = module.get_parameter("weight")
    new = type(module).__new__(type(module))
    new.__dict__.update(module.__dict__)
    new._parameters = dict(module._parameters)
    new.weight = nn.Parameter(linear.weight.to(own), requires_grad=own.requires_grad)
    new.bias = nn.Parameter(linear.bias.to(own), requires_grad=own.requires_grad)
    return new


def linear_layer(
    module: nn.Module,
    linear: _Map,
    moments: Moments | None,
    activation: Activation | None,
    affine: tuple[Tensor, Tensor],
    slope: Tensor | None,
    options: Mapping[str, Any],
) -> tuple[NormPropLayer, Carry]:
    """A NormProp layer for ``act(scale * (W x + b) + shift)``, and what its output stands for.

    Args:
        module: The linear map.
        linear: The same, of standardized input.
        moments: Mean and standard deviation of ``W x + b``; None: those that unit filters yield.
        activation: None for none: the layer then standardizes ``W x + b``.
        affine: Scale and shift.
        slope: Trained slopes of PReLU.
        options: Constructor arguments of the layer.
    """
    new = _blank(module, activation, options)
    weight = linear.weight
    with torch.no_grad():
        norms = safe_norm(new.filters(weight)) / new.fan_gain
        known = Moments(linear.bias, norms) if moments is None else moments.floored()
        center, spread = (known.mean - linear.bias) / norms, known.std / norms
        gamma, bias = affine[0] * known.std, affine[0] * known.mean + affine[1]
        carry = Carry(torch.ones_like(gamma), bias)
        if activation is None:
            # Identity layers have no gamma: a negative one turns the filter around, and of none is left a constant.
            sign = gamma.sign()
            weight, center = new.scaled(weight, sign), torch.where(sign == 0, 0.0, center * sign)
            spread = torch.where(sign == 0, 1.0, spread)
            carry = Carry(torch.where(sign == 0, 1.0, gamma.abs()), bias)
        new.weight.copy_(weight)
        new.unit_norm_()
        if moments is not None:
            new.calibrate_(center, spread)
        if linear.pad is not None and isinstance(new, NormPropConv1d | NormPropConv2d | NormPropConv3d):
            new.pad_with_(linear.pad)
        if activation is not None:
            carry = _fill(new, gamma, bias, slope)
    return new, carry


def _blank(module: nn.Module, activation: Activation | None, options: Mapping[str, Any]) -> NormPropLayer:
    own = module.get_parameter("weight")
    common: dict[str, Any] = {
        **options,
        "activation": activation or "identity",
        "device": own.device,
        "dtype": own.dtype,
    }
    if isinstance(module, nn.Linear):
        common.pop("border", None)
        return NormPropLinear(module.in_features, module.out_features, **common)
    kind = next(kind for kind in _CONVS if isinstance(module, kind))
    names: tuple[str, ...] = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    names += ("output_padding",) if _transposed(module) else ("padding_mode",)
    return _CONVS[kind](**{name: getattr(module, name) for name in names}, **common)


def _fill(new: NormPropUnits, gamma: Tensor, bias: Tensor, slope: Tensor | None) -> Carry:
    """Set gamma, bias and slope; what the output then stands for, with the parameters as they are stored."""
    if new.gamma is None or new.bias is None:
        raise RefusedError("its activation does nothing")
    new.gamma.copy_(gamma)
    new.bias.copy_(bias)
    if new.slope is not None and slope is not None:
        new.slope.copy_(slope)
    mean, var = new.standardization()
    return Carry(var.double().sqrt().cpu(), mean.double().cpu())


def activation_layer(
    carry: Carry,
    moments: Moments | None,
    activation: Activation,
    slope: Tensor | None,
    spatial: int,
    like: Tensor,
    options: Mapping[str, Any],
) -> tuple[NormPropActivation, Carry]:
    """A NormProp layer without linear map for ``act(x)``, and what its output stands for.

    Args:
        carry: What the input stands for.
        moments: Of x; None: those of standardized input.
        activation: The activation.
        slope: Trained slopes of PReLU.
        spatial: Number of axes after the channels.
        like: Device and dtype of the parameters.
        options: Constructor arguments of the layer.
    """
    taken = {name: value for name, value in options.items() if name in ("constants", "eps")}
    new = NormPropActivation(
        carry.scale.numel(), activation, spatial=spatial, device=like.device, dtype=like.dtype, **taken
    )
    known = Moments(carry.shift, carry.scale.abs()) if moments is None else moments.floored()
    with torch.no_grad():
        if moments is not None:
            new.calibrate_((known.mean - carry.shift) / carry.scale, known.std / carry.scale.abs())
        return new, _fill(new, carry.scale.sign() * known.std, known.mean, slope)


def add_layer(
    first: Carry, second: Carry, moments: Moments | None, spatial: int, like: Tensor
) -> tuple[NormPropAdd, Carry]:
    """A sum of standardized values that stands for the sum of the originals.

    Args:
        first: What the first summand stands for.
        second: What the second stands for.
        moments: Of the sum; None: those of independent summands.
        spatial: Number of axes after the channels.
        like: Device and dtype of the weights.
    """
    a, b = first.scale, second.scale
    new = NormPropAdd(a.numel(), spatial=spatial, device=like.device, dtype=like.dtype)
    with torch.no_grad():
        new.a.copy_(a)
        new.b.copy_(b)
        if moments is not None:
            product = 2 * a * b
            new.correlation.copy_(((moments.std.square() - a.square() - b.square()) / product).clamp(-0.95, 0.95))
        scale = new.variance().double().cpu().sqrt()
    return new, Carry(scale, first.shift + second.shift)
