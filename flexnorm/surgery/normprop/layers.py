"""Scale and shift by which a value of the converted network stands for one of the original, and the layers for that.

A converted layer hands on standardized values x', where the original had x = scale x' + shift. Some operations do not
mind: what they make of x' stands for what they made of x in the same way, or with tables that follow from it.

A linear map: W x + b = (W scale) x' + (W shift + b). Let the rows of W scale have norms n, and W x + b mean m and
standard deviation d. Then z = (W scale / n) x' is what unit filters yield, and (z - center) / spread with center = (m -
b - W shift) / n and spread = d / n is standardized: W x + b is d times that, plus m.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from flexnorm.nn import normprop
from flexnorm.nn.normprop import Activation, NormPropActivation, NormPropAdd, NormPropConv, NormPropLayer, NormPropUnits
from flexnorm.surgery._reading import RefusedError


class ScaleShift(NamedTuple):
    """``x[n, c] = scale[c] * x'[n, c] + shift[c]``, channels on axis 1; both (C,) in float64, ``scale`` never 0."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def identity(cls, channels: int) -> ScaleShift:
        """Of values that stand for themselves."""
        return cls(torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64))


def joined(parts: Sequence[ScaleShift | None], channels: Sequence[int]) -> ScaleShift | None:
    """Of a concatenation along the channels; ``None`` stands for the original's values."""
    if all(part is None for part in parts):
        return None
    known = [part or ScaleShift.identity(count) for part, count in zip(parts, channels, strict=True)]
    return ScaleShift(torch.cat([p.scale for p in known]), torch.cat([p.shift for p in known]))


# -- what other operations make of standardized values

_NEUTRAL: set[type[nn.Module]] = {nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d}
_NEUTRAL |= {nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d}
_ADAPTIVE_MAXIMUM = {nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d}
_MAXIMUM, _AVERAGE = {nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d}, {nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d}
HANDS_ON = _NEUTRAL | _MAXIMUM | _AVERAGE
"""Modules that hand on standardized values, as a rule."""

_ADAPTIVE_FUNCTIONS = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
_MAX_FUNCTIONS = (F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d)
_AVG_FUNCTIONS = (F.avg_pool2d, F.avg_pool3d, torch.avg_pool1d)


def passed(
    node: fx.Node, module: nn.Module | None, scaling: ScaleShift, before: torch.Size, after: torch.Size | None
) -> ScaleShift | None:
    """What the output of an operation on one value stands for; None if the operation needs the original values.

    ``module`` is the one that ``node`` calls, if any; ``scaling`` and ``before`` (a shape) are those of the input.
    """
    if after is None:
        return None
    kind: Any = node.target if module is None else type(module)
    name = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
    increasing = bool((scaling.scale > 0).all())
    if kind in _NEUTRAL or kind is nn.Upsample or kind in _ADAPTIVE_FUNCTIONS:
        return scaling
    if kind in _MAXIMUM | _ADAPTIVE_MAXIMUM and module is not None:
        return scaling if increasing and not module.return_indices else None
    if kind in _AVERAGE and module is not None:
        padded = any(_tuple(module.padding)) and bool(module.count_include_pad)
        # Averages over windows that reach over the border in ceil mode are divided by the number of values in them.
        return scaling if not padded or not bool(scaling.shift.any()) else None
    if kind in _MAX_FUNCTIONS:
        return scaling if increasing and not node.kwargs.get("return_indices") and len(node.args) < 7 else None
    if kind in _AVG_FUNCTIONS:
        padding = node.args[3] if len(node.args) > 3 else node.kwargs.get("padding", 0)
        return None if any(_tuple(padding)) else scaling
    if kind is nn.Flatten or (module is None and name in ("flatten", "view", "reshape")):
        return _flattened(scaling, before, after)
    if module is None and name == "mean" and len(after) >= 2 and after[:2] == before[:2]:
        return scaling if _over_positions(node, len(before)) else None
    return scaling if module is None and name == "contiguous" else None


def _flattened(scaling: ScaleShift, before: torch.Size, after: torch.Size) -> ScaleShift | None:
    if before == after:
        return scaling
    if len(after) != 2 or after[0] != before[0] or after[1] != math.prod(before[1:]):
        return None
    # The positions of a channel stand side by side.
    repeats = math.prod(before[2:])
    return ScaleShift(scaling.scale.repeat_interleave(repeats), scaling.shift.repeat_interleave(repeats))


def _over_positions(node: fx.Node, dims: int) -> bool:
    """Whether a mean goes over positions only."""
    axes = _tuple(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim"))
    return all(isinstance(a, int) for a in axes) and not {a % dims for a in axes} & {0, 1}


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


# -- layers


class Moments(NamedTuple):
    """Mean and standard deviation (C,) of a value of the original network, float64."""

    mean: Tensor
    std: Tensor

    def positive(self) -> Moments:
        """With a standard deviation that can be divided by: a unit that never changes has none."""
        return Moments(self.mean, self.std.clamp_min(max(float(self.std.mean()) * 1e-5, 1e-12)))


@dataclass
class Tail:
    """What follows a linear map and is taken into its layer: a normalization, an activation, or both."""

    scale: Tensor  # (C,) of the normalization, like shift
    shift: Tensor
    nodes: list[fx.Node] = field(default_factory=list)  # the operations
    activation: Activation | None = None  # without one the layer standardizes W x + b
    slope: Tensor | None = None  # trained slopes of PReLU


class LinearMap(NamedTuple):
    """``W x + b`` in terms of standardized values: ``weight x' + bias``, padding with ``pad``."""

    weight: Tensor
    bias: Tensor
    pad: Tensor | None = None


def _transposed(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvTransposeNd)


def _by_input(module: Any, table: Tensor) -> Tensor:
    """A table of the input's channels, shaped to multiply the weight."""
    ones = (1,) * (module.weight.dim() - 2)
    if _transposed(module):
        return table.view(-1, 1, *ones)
    groups, outputs = getattr(module, "groups", 1), module.weight.shape[0]
    return table.view(groups, -1).repeat_interleave(outputs // groups, 0).view(outputs, -1, *ones)


def _with(module: nn.Module, **parameters: nn.Parameter | None) -> Any:
    """A layer with the same settings and other parameters."""
    new = type(module).__new__(type(module))
    new.__dict__.update(module.__dict__)
    new._parameters = {**module._parameters, **parameters}
    return new


def through(module: Any, scaling: ScaleShift | None, shape: torch.Size, *, keep_padding: bool) -> LinearMap:
    """A linear map of values that stand for others as ``scaling`` says (None: for themselves), of that ``shape``.

    ``keep_padding``: pad with the values that stand for zero, instead of with zeros. RefusedError if that is no linear
    map plus a constant per channel.
    """
    weight = module.weight.detach().double().cpu()
    outputs = module.out_features if isinstance(module, nn.Linear) else module.out_channels
    own = module.bias
    bias = torch.zeros(outputs, dtype=torch.float64) if own is None else own.detach().double().cpu()
    if scaling is None:
        return LinearMap(weight, bias)
    scaled = weight * _by_input(module, scaling.scale)
    if not bool(scaling.shift.any()):
        return LinearMap(scaled, bias)
    if _transposed(module):
        return LinearMap(scaled, bias + _constant(module, scaling, shape))
    moved = bias + (weight * _by_input(module, scaling.shift)).flatten(1).sum(1)
    padded = not isinstance(module, nn.Linear) and module.padding_mode == "zeros" and _pads(module)
    return LinearMap(scaled, moved, -scaling.shift / scaling.scale if padded and keep_padding else None)


def _pads(module: Any) -> bool:
    if isinstance(module.padding, str):
        return module.padding == "same" and any(k > 1 for k in module.kernel_size)
    return any(module.padding)


@torch.no_grad()
def _constant(module: Any, scaling: ScaleShift, shape: torch.Size) -> Tensor:
    """What a transposed convolution makes of the shift, if that is the same at every position."""
    image = scaling.shift.view(1, -1, *(1,) * (len(shape) - 2)).expand(1, -1, *shape[2:])
    exact = _with(module, weight=nn.Parameter(module.weight.double().cpu()), bias=None)
    made: Tensor = exact(image)[0].flatten(1)
    if float((made - made[:, :1]).abs().max()) > 1e-9 * max(1.0, float(made.abs().max())):
        raise RefusedError("the mean of its input adds another constant at every position")
    return made[:, 0]


def plain_linear(module: Any, linear: LinearMap) -> nn.Module:
    """The same kind of layer for standardized input, its output the original's; RefusedError if it pads otherwise."""
    if linear.pad is not None:
        raise RefusedError("pads with zeros, which are no zeros of its standardized input")
    trained = {"requires_grad": module.weight.requires_grad}
    new: nn.Module = _with(
        module,
        weight=nn.Parameter(linear.weight.to(module.weight), **trained),
        bias=nn.Parameter(linear.bias.to(module.weight), **trained),
    )
    return new


@torch.no_grad()
def linear_layer(
    module: Any, linear: LinearMap, moments: Moments | None, tail: Tail, options: Mapping[str, Any]
) -> tuple[NormPropLayer, ScaleShift]:
    """A NormProp layer for ``act(scale * (W x + b) + shift)``, and what its output stands for.

    ``linear`` is ``module`` in terms of standardized input, ``moments`` are those of ``W x + b`` (None: those that unit
    filters yield), ``options`` the constructor arguments of the layer.
    """
    new = _blank(module, tail.activation, options)
    weight = linear.weight
    norms = normprop.length_or_one(new.filters(weight)) / new.fan_gain
    known = Moments(linear.bias, norms) if moments is None else moments.positive()
    center, spread = (known.mean - linear.bias) / norms, known.std / norms
    gamma, bias = tail.scale * known.std, tail.scale * known.mean + tail.shift
    if tail.activation is None:
        # Identity layers have no gamma: a negative one turns the filter around, and of none is left a constant.
        sign = gamma.sign()
        weight, center = new.scaled(weight, sign), torch.where(sign == 0, 0.0, center * sign)
        spread = torch.where(sign == 0, 1.0, spread)
    new.weight.copy_(weight)
    new.unit_norm_()
    if moments is not None:
        new.calibrate_(center, spread)
    if linear.pad is not None and isinstance(new, NormPropConv):
        new.pad_with_(linear.pad)
    if tail.activation is None:
        return new, ScaleShift(torch.where(sign == 0, 1.0, gamma.abs()), bias)
    return new, _fill(new, gamma, bias, tail.slope)


def _blank(module: Any, activation: Activation | None, options: Mapping[str, Any]) -> NormPropLayer:
    # The layers are named after torch's.
    kind: Any = getattr(normprop, f"NormProp{type(module).__name__}")
    common = {name: value for name, value in options.items() if name != "border" or not isinstance(module, nn.Linear)}
    common |= {"activation": activation or "identity", "device": module.weight.device, "dtype": module.weight.dtype}
    new: NormPropLayer = kind(**{name: getattr(module, name) for name in kind.shared}, **common)
    return new


def _fill(new: NormPropUnits, gamma: Tensor, bias: Tensor, slope: Tensor | None) -> ScaleShift:
    """Set gamma, bias and slope; what the output then stands for, with the parameters as they are stored."""
    if new.gamma is None or new.bias is None:
        raise RefusedError("its activation does nothing")
    new.gamma.copy_(gamma)
    new.bias.copy_(bias)
    if new.slope is not None and slope is not None:
        new.slope.copy_(slope)
    mean, var = new.standardization()
    return ScaleShift(var.double().sqrt().cpu(), mean.double().cpu())


@torch.no_grad()
def activation_layer(
    scaling: ScaleShift,
    moments: Moments | None,
    activation: tuple[Activation, Tensor | None],
    spatial: int,
    like: Tensor,
    options: Mapping[str, Any],
) -> tuple[NormPropActivation, ScaleShift]:
    """A NormProp layer without linear map for ``act(x)``, and what its output stands for.

    The input stands for x as ``scaling`` says; ``moments`` are those of x (None: those of standardized input); the
    activation comes with trained slopes of PReLU; the parameters get device and dtype of ``like``.
    """
    taken: Any = {name: value for name, value in options.items() if name in ("constants", "eps")}
    taken |= {"device": like.device, "dtype": like.dtype}
    new = NormPropActivation(scaling.scale.numel(), activation[0], spatial=spatial, **taken)
    known = Moments(scaling.shift, scaling.scale.abs()) if moments is None else moments.positive()
    if moments is not None:
        new.calibrate_((known.mean - scaling.shift) / scaling.scale, known.std / scaling.scale.abs())
    return new, _fill(new, scaling.scale.sign() * known.std, known.mean, activation[1])


@torch.no_grad()
def add_layer(
    first: ScaleShift, second: ScaleShift, moments: Moments | None, spatial: int, like: Tensor
) -> tuple[NormPropAdd, ScaleShift]:
    """A sum of standardized values that stands for the sum of the originals, and how.

    ``moments`` are those of the sum; None: those of independent summands.
    """
    a, b = first.scale, second.scale
    new = NormPropAdd(a.numel(), spatial=spatial, device=like.device, dtype=like.dtype)
    new.a.copy_(a)
    new.b.copy_(b)
    if moments is not None:
        new.correlation.copy_(((moments.std.square() - a.square() - b.square()) / (2 * a * b)).clamp(-0.95, 0.95))
    return new, ScaleShift(new.variance().double().cpu().sqrt(), first.shift + second.shift)
