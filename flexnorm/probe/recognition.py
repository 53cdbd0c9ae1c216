"""Normalization layers recognized by what they do, whatever their class is called.

Every library has LayerNorm and RMSNorm classes of its own. A layer is tried in float64 on random inputs, with random
weights: which entries a change of its weight or bias reaches tells the axis of the channels; where the output, weight
and bias removed, is a fixed multiple of the input (less its mean) tells over what it normalizes; and how that multiple
depends on the variance tells eps. A formula is believed only where it repeats all trials to float accuracy.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from types import FunctionType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from flexnorm.probe.forward import isolated

Over = Literal["position", "sample", "groups", "channel", "batch", "all", "running"]

_MEANS, _VARIANCES = ("running_mean", "moving_mean"), ("running_var", "moving_var", "moving_variance")
_SIZES = ("normalized_shape", "num_features", "num_channels", "hidden_size", "dim")
_NAMED = re.compile(r"norm(?!al)|normali[sz]ation", re.IGNORECASE)
_ACCURACY = 1e-5  # layers that work in float32 inside reach about 1e-7
_SCALES = (1.0, 1e-3, 1e-6)  # of the inputs that eps is read from
_LARGEST = 1 << 16
_OF_TORCH = frozenset(vars(nn.Module()))
_UNSCALED = "it takes no notice of the scale of its input"
_Law = tuple[float | None, bool]  # eps, and whether it is added outside the root


def _images_first(ndim: int) -> int:
    return (4, 3, 5, 2).index(ndim)


class _RefusedError(Exception):
    """A layer does not take an input, or returns something else than as much."""


@dataclass(frozen=True)
class NormBehavior:
    """What a normalization layer computes, found by trying: ``weight * (x - mean) / deviation + bias``.

    Attributes:
        over: Over what mean and variance are taken in training: ``"position"``, the channels of each position (token);
            ``"sample"``, channels and positions of each sample; ``"groups"`` of channels and the positions of each
            sample; ``"channel"``, the positions of each channel of each sample; ``"batch"``, all values of each
            channel; ``"all"``, all values of the input; ``"running"``, nothing: the layer is frozen.
        axes: For each number of axes of the input on which the formula was verified, the axis of the channels: 1 or
            -1; ``None`` where nothing tells. Of (N, C) input it is 1.
        channels: Number of channels C; ``None`` if any will do.
        centers: Whether the mean is subtracted.
        scales: Whether it is divided by the deviation.
        eps: What is added to the variance; ``None`` if the machine epsilon of the input's type is.
        eps_outside: Whether eps is added to the standard deviation instead.
        groups: Number of groups of channels, for ``over="groups"``.
        weight: Name of the weight (C,), or ``None``.
        weight_offset: 1.0 if the scale is ``1 + weight``, else 0.0.
        bias: Name of the bias (C,), or ``None``.
        mean_weight: Name of a factor (C,) of the mean that is subtracted (GraphNorm), or ``None``.
        running: Names of the running mean and variance that normalize in evaluation, or ``None``.
        momentum: Weight of the batch in the running statistics, of unbiased variances, or ``None`` if they are not
            updated so.
        then: Names of submodules that are applied to the normalized activation, such as an activation function.
    """

    over: Over
    axes: tuple[tuple[int, int | None], ...]
    channels: int | None
    centers: bool
    scales: bool
    eps: float | None
    eps_outside: bool = False
    groups: int = 1
    weight: str | None = None
    weight_offset: float = 0.0
    bias: str | None = None
    mean_weight: str | None = None
    running: tuple[str, str] | None = None
    momentum: float | None = None
    then: tuple[str, ...] = ()

    @property
    def norm_name(self) -> str:
        """Name of the norm of this package that computes the same; empty if there is none."""
        if not self.scales or self.eps_outside or self.mean_weight or self.over == "all":
            return ""
        if not self.centers:
            return "rms" if self.over in ("position", "sample") else ""
        return {"position": "layer", "sample": "layer", "groups": "group", "channel": "instance"}.get(
            self.over, "batch"
        )

    @property
    def tensors(self) -> dict[str, str]:
        """Names of the layer's weight, bias and running statistics, by those that torch's layers have for them."""
        names = {"weight": self.weight, "bias": self.bias}
        names |= dict(zip(("running_mean", "running_var"), self.running or (), strict=False))
        return {new: old for new, old in names.items() if old is not None}

    def axis(self, ndim: int) -> int | None:
        """The axis of the channels (1 or -1) of an input with so many axes; ``None`` if it was not verified on such.

        Args:
            ndim: Number of axes.
        """
        return dict(self.axes).get(ndim)

    @property
    def channel_axis(self) -> int | None:
        """The axis of the channels for all inputs; ``None`` if it depends on their number of axes."""
        found = {axis for ndim, axis in self.axes if ndim > 2} or {1 if self.over in ("batch", "running") else -1}
        return found.pop() if len(found) == 1 else None

    def __str__(self) -> str:
        kind = "standardizes" if self.centers else "divides by the root mean square"
        kind = kind if self.scales else "subtracts the mean"
        over = {
            "position": "the channels of each position",
            "sample": "channels and positions of each sample",
            "groups": f"{self.groups} groups of channels of each sample",
            "channel": "each channel of each sample",
            "batch": "each channel of the batch",
            "all": "all values",
            "running": "each channel, by running statistics",
        }[self.over]
        axis = {1: "channels on axis 1", -1: "channels last", None: "any axis of channels"}[self.channel_axis]
        scale = "1 + weight" if self.weight_offset else "weight"
        parts = [f"{kind} over {over}" if self.scales else f"{kind} of {over}", axis]
        parts += ["part of the mean"] if self.mean_weight else []
        parts += [scale] if self.weight else []
        parts += ["bias"] if self.bias else []
        return ", ".join(parts)


def recognize(module: nn.Module) -> NormBehavior | None:
    """Say what a normalization layer computes, by trying it; ``None`` if it is none, or one that cannot be read.

    The trial is made with a stand-in that shares nothing with the module but its class and plain attributes, in
    float64 (float32 where it takes no other) on the CPU, in evaluation and in training. What a class with the same
    attributes did is remembered. The module is not called: neither it nor any random state changes.

    Args:
        module: Any module. Those with submodules that hold parameters or buffers are no norms, whatever they contain.

    Returns:
        What it computes, verified to float accuracy on random inputs of every number of axes from 2 to 5 that it takes.

    Examples:
        >>> class Scaled(nn.Module):
        ...     def __init__(self, dim):
        ...         super().__init__()
        ...         self.gain = nn.Parameter(torch.zeros(dim))
        ...
        ...     def forward(self, x):
        ...         return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + self.gain)
        >>> found = recognize(Scaled(8))
        >>> print(found)
        divides by the root mean square over the channels of each position, channels last, 1 + weight
        >>> found.eps, found.weight, found.norm_name, recognize(nn.Linear(8, 8))
        (1e-06, 'gain', 'rms', None)
    """
    return _look(module)[0]


def unread_norm(module: nn.Module) -> str | None:
    """Why a module that is a normalization, by its behaviour or its name, cannot be read; ``None`` for all others.

    Args:
        module: Any module.

    Examples:
        >>> class UnitNorm(nn.Module):
        ...     def forward(self, x):
        ...         return nn.functional.normalize(x, dim=-1)
        >>> unread_norm(UnitNorm())
        'it takes no notice of the scale of its input, but computes none of the normalizations known here'
        >>> unread_norm(nn.ReLU()), unread_norm(nn.LayerNorm(8))
        (None, None)
    """
    return _look(module)[1]


def normalizes(module: nn.Module) -> bool:
    """Whether a module normalizes: a layer of this package, of torch, recognized by trying, or one that is not read.

    Args:
        module: Any module.
    """
    from flexnorm.nn import is_norm  # here, not above: the layers bring in the compiler

    return is_norm(module) or any(_look(module))


_Answer = tuple[NormBehavior | None, str | None]
_NO_INPUT: _Answer = (None, "it takes no input of 2 to 5 axes alone, with its channels last or on axis 1")
_known: weakref.WeakKeyDictionary[type[nn.Module], dict[Any, _Answer]] = weakref.WeakKeyDictionary()


def _look(module: nn.Module) -> _Answer:
    named = bool(_NAMED.search(type(module).__name__))
    if not _worth_trying(module, named):
        return None, None
    if why := _untriable(module):
        return None, why if named else None
    try:
        key = _configuration(module)
        found = _known.setdefault(type(module), {}).get(key)
    except TypeError:  # an attribute that cannot be compared: tried anew each time
        key = found = None
    if found is None:
        try:
            found = _Trial(module, torch.float64).answer() or _Trial(module, torch.float32).answer() or _NO_INPUT
            if key is not None:
                _known[type(module)][key] = found
        except Exception as error:  # noqa: BLE001 - modules are not ours: whatever they raise, they are not understood
            found = None, f"trying it failed: {type(error).__name__}"
    return found[0], found[1] if named or (found[1] or "").startswith(_UNSCALED) else None


def _worth_trying(module: nn.Module, named: bool) -> bool:
    """Whether the module can be a norm by what it holds; torch's own other layers are none."""
    if any(True for child in module.children() for _ in chain(child.parameters(), child.buffers())):
        return False
    if isinstance(module, torch.jit.ScriptModule) or any(_NAMED.search(type(c).__name__) for c in module.children()):
        return False  # a norm without tensors inside is found by itself
    if type(module).__module__.startswith("torch."):
        return named and type(module).__module__.startswith("torch.nn.modules.")
    return named or bool(_vectors(module))


def _untriable(module: nn.Module) -> str | None:
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    foreign = not type(module).__module__.startswith(("torch.", "flexnorm."))
    pools = "sync" in type(module).__name__.lower() or "process_group" in module.__dict__
    if foreign and pools and torch.distributed.is_available() and torch.distributed.is_initialized():
        return "trying it might wait for other processes"
    if computed := [name for name, value in module.__dict__.items() if isinstance(value, Tensor)]:
        return f"its {computed[0]} is computed by a hook or kept outside of parameters and buffers"
    tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    if any(isinstance(t, (nn.UninitializedParameter, nn.UninitializedBuffer)) for t in tensors):
        return "lazy: its number of channels is not known yet; run one batch through the model first"
    sizes = {t.numel(): t for t in tensors if t.is_floating_point() and t.numel() > 1}
    if any(size != max(t.shape) for size, t in sizes.items()):
        return "it holds a tensor that is no vector of channels"
    if len(sizes) > 1:
        return "it holds vectors of several sizes"
    return f"it has more than {_LARGEST} channels" if any(size > _LARGEST for size in sizes) else None


def _vectors(module: nn.Module) -> dict[str, Tensor]:
    """The module's own floating-point tensors of more than one value, parameters and buffers alike, by name."""
    own = {**module._parameters, **module._buffers}
    return {name: t for name, t in own.items() if t is not None and t.is_floating_point() and t.numel() > 1}


def _configuration(module: nn.Module) -> Any:
    """What decides the behaviour, as a key; TypeError where that cannot be said."""

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value), tuple(map(plain, value))
        if value is None or isinstance(value, (bool, int, float, str, torch.dtype, type, FunctionType)):
            return type(value), value
        raise TypeError

    own = {**module._parameters, **module._buffers}
    tensors = tuple((name, None if t is None else (t.shape, t.is_floating_point())) for name, t in own.items())
    scalars = tuple(float(t) for t in own.values() if t is not None and t.numel() == 1 and t.is_floating_point())
    attributes = tuple((name, plain(value)) for name, value in module.__dict__.items() if name not in _OF_TORCH)
    children = tuple((name, type(child)) for name, child in module.named_children())
    return type(module).forward, tensors, scalars, attributes, children


def _stand_in(module: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A module of the same class and attributes with other tensors, without hooks, and with nothing for submodules."""

    def tensor(name: str, old: Tensor | None) -> Tensor | None:
        if old is None or name in values:
            return None if old is None else values[name].clone()
        kind = torch.float64 if old.is_floating_point() else old.dtype
        return torch.zeros_like(old, device="cpu") if old.is_meta else old.detach().to("cpu", kind, copy=True)

    twin: nn.Module = object.__new__(type(module))
    parameters = {name: tensor(name, p) for name, p in module._parameters.items()}
    twin.__dict__ |= {
        **vars(nn.Module()),
        **{name: value for name, value in module.__dict__.items() if name not in _OF_TORCH},
        "_parameters": {n: None if t is None else nn.Parameter(t, requires_grad=False) for n, t in parameters.items()},
        "_buffers": {name: tensor(name, b) for name, b in module._buffers.items()},
        "_modules": {name: None if child is None else nn.Identity() for name, child in module._modules.items()},
    }
    return twin


@dataclass(frozen=True)
class _Pool:
    """What is averaged: axes, or groups of channels with all positions of a sample."""

    over: frozenset[Over]
    dims: tuple[int, ...]
    channel: int
    groups: int = 1

    def mean(self, x: Tensor) -> Tensor:
        """Means, of the shape of ``x``."""
        if self.groups == 1:
            return x.mean(self.dims, keepdim=True).expand_as(x)
        first = x.movedim(self.channel, 1)
        grouped = first.reshape(first.shape[0], self.groups, -1)
        return grouped.mean(2, keepdim=True).expand_as(grouped).reshape(first.shape).movedim(1, self.channel)


def _pools(x: Tensor, axis: int) -> Iterator[_Pool]:
    every, channel = set(range(x.ndim)), axis % x.ndim
    wanted: dict[Over, set[int]] = {
        "position": {channel},
        "sample": every - {0},
        "channel": every - {0, channel},
        "batch": every - {channel},
        "all": every,
    }
    # Without positions some are the same.
    for dims in {frozenset(dims): None for dims in wanted.values() if dims}:
        yield _Pool(frozenset(over for over, same in wanted.items() if same == dims), tuple(dims), channel)
    for groups in range(2, x.shape[axis]):
        if x.shape[axis] % groups == 0:
            yield _Pool(frozenset({"groups"}), (), channel, groups)


@dataclass(frozen=True)
class _Fit:
    """How a layer normalizes inputs of one shape."""

    over: frozenset[Over]
    axis: int
    centers: bool
    scales: bool
    law: _Law
    groups: int = 1
    running: bool = False
    momentum: float | None = None

    def agrees(self, other: _Fit) -> bool:
        """Whether both can be one formula, on inputs of different numbers of axes."""
        same = ("centers", "scales", "law", "groups", "running", "momentum")
        return bool(self.over & other.over) and all(getattr(self, key) == getattr(other, key) for key in same)


class _Trial:
    """One layer, tried."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.module, self.dtype = module, dtype
        self.generator = torch.Generator("cpu").manual_seed(0)
        self.shapes = {name: t.shape for name, t in _vectors(module).items()}
        declared = self._declared()
        self.channels = next((shape.numel() for shape in self.shapes.values()), declared or 12)
        self.free = not self.shapes and declared is None
        means, variances = ([name for name in names if name in self.shapes] for names in (_MEANS, _VARIANCES))
        self.running = (means[0], variances[0]) if means and variances else None
        self.roles: dict[str, str] = {}  # names of vectors by what they do: weight, bias, mean
        self.offset = 0.0
        self.taken: list[Tensor] = []  # inputs that the layer takes

    def answer(self) -> _Answer | None:
        """What the layer does, or why that is not known; ``None`` if it took no input of this type."""
        self.twin = _stand_in(self.module, self._draw()).to(self.dtype)
        with isolated(self.twin, 0), torch.autocast("cpu", enabled=False):
            if found := self._behavior():
                return found, None
            return (None, self._why()) if self.taken else None

    def _declared(self) -> int | None:
        for name in _SIZES:
            size = self.module.__dict__.get(name)
            size = size[0] if isinstance(size, (tuple, list)) and len(size) == 1 else size
            if isinstance(size, int) and not isinstance(size, bool) and 1 < size <= _LARGEST:
                return size
        return None

    # Trying it: inputs, tensors, outputs.

    def _random(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device="cpu", dtype=torch.float32).double()

    def _draw(self) -> dict[str, Tensor]:
        return {name: self._random(*shape) + 0.5 for name, shape in self.shapes.items()}

    def _bare(self) -> dict[str, Tensor]:
        """Random values, but for a scale of 1 and a bias of 0."""
        neutral = {"weight": 1.0 - self.offset, "bias": 0.0}
        fixed = {name: neutral[role] for role, name in self.roles.items() if role in neutral}
        return {n: torch.full_like(v, fixed[n]) if n in fixed else v for n, v in self._draw().items()}

    def _inputs(self) -> Iterator[tuple[int, Tensor]]:
        """Inputs with the channels last and on axis 1; no other axis has as many entries."""
        c = self.channels
        a, b, d = [size for size in (2, 3, 4, 5) if size != c][:3]
        # Without positions least can be told, so that comes last.
        for axis, shapes in (
            (-1, [(a, b, d, c), (a, d, c)]),
            (1, [(a, c, b, d), (a, c, d), (a, c, b, d, a)]),
            (-1, [(d, c)]),
        ):
            for shape in shapes:
                x = torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu")
                for dim, size in enumerate(shape):  # of every sample, channel and position another mean and spread
                    view = [size if k == dim else 1 for k in range(len(shape))]
                    x = x * (self._random(size).view(view) + 0.5) + self._random(size).view(view)
                yield axis, x.float().double()  # exact in both types

    def _call(self, x: Tensor, values: Mapping[str, Tensor], *, training: bool = False) -> Tensor:
        """The output, in float64; _RefusedError where the layer takes no such input or returns something else."""
        for name, value in values.items():
            held = self.twin._parameters.get(name, self.twin._buffers.get(name))
            assert held is not None  # it was there when the stand-in was made
            held.data = value.to(self.dtype, copy=True)
        self.twin.train(training)
        try:
            y = self.twin(x.to(self.dtype, copy=True))
        except Exception as error:
            raise _RefusedError from error
        if isinstance(y, Tensor) and y.shape == x.shape and y.is_floating_point() and bool(y.isfinite().all()):
            return y.double()
        raise _RefusedError

    # What it does.

    def _behavior(self) -> NormBehavior | None:
        fits: dict[int, _Fit] = {}
        for axis, x in self._inputs():
            with suppress(_RefusedError):
                if x.ndim not in fits and (fit := self._fit(x, axis)):
                    fits[x.ndim] = fit
        if not fits:
            return None
        # One formula for as many numbers of axes as possible, images before sequences before features.
        groups = [{n: fit for n, fit in fits.items() if fit.agrees(fits[m])} for m in sorted(fits, key=_images_first)]
        kept = max(groups, key=len)
        over = frozenset.intersection(*(fit.over for fit in kept.values()))
        fit = next(iter(kept.values()))
        told = bool(self.shapes) or fit.axis == 1 or not over & {"sample", "all"}
        found = NormBehavior(
            over=next(name for name in get_args(Over) if name in over),
            axes=tuple((ndim, 1 if ndim == 2 else kept[ndim].axis if told else None) for ndim in sorted(kept)),
            channels=None if self.free else self.channels,
            centers=fit.centers,
            scales=fit.scales,
            eps=fit.law[0],
            eps_outside=fit.law[1],
            groups=fit.groups,
            weight=self.roles.get("weight"),
            weight_offset=self.offset,
            bias=self.roles.get("bias"),
            mean_weight=self.roles.get("mean"),
            running=self.running if fit.running else None,
            momentum=fit.momentum,
            then=tuple(name for name, child in self.module._modules.items() if child is not None),
        )
        return found if self._then(next(x for x in self.taken if x.ndim in kept)) else None

    def _fit(self, x: Tensor, axis: int) -> _Fit | None:
        self._call(x, self._draw())
        self.taken.append(x)
        found = self._find_roles(x, axis)
        if found is None or (self.roles and found != (self.roles, self.offset)):
            return None
        self.roles, self.offset = found
        law = self._running_law(x, axis, training=False)
        if law is not None and self._running_law(x, axis, training=True) == law:
            return _Fit(frozenset({"running"}), axis, True, True, law, running=True)
        fit = self._batch_fit(x, axis, training=True)
        if fit is None:
            return None
        if law is None:
            return fit if self._batch_fit(x, axis, training=False) == fit else None
        return replace(fit, running=True, momentum=self._momentum(x, axis)) if law == fit.law else None

    def _find_roles(self, x: Tensor, axis: int) -> tuple[dict[str, str], float] | None:
        """Which vector is the weight, which the bias, and whether the scale is 1 + weight."""
        values = self._draw()
        y = self._call(x, values)
        roles: dict[str, str] = {}
        slope = torch.zeros_like(y)
        for name, value in values.items():
            if name in (self.running or ()):
                continue
            change = self._random(*value.shape) + 0.5
            first, second = (self._call(x, {**values, name: value + k * change}) - y for k in (1, 2))
            along = _along(change, x, axis)
            if _close(first, along.expand_as(x)):
                role = "bias"
            elif float(first.abs().max()) <= _ACCURACY * float(y.abs().max()):
                continue  # it does nothing
            elif _close(second, 2 * first):
                role, slope = "weight", first / along
            else:
                role = "mean"
            if role in roles:
                return None
            roles[role] = name
        if "weight" not in roles:
            return roles, 0.0
        rest = y - _along(values[roles["bias"]], x, axis) if "bias" in roles else y
        weight = _along(values[roles["weight"]], x, axis)
        offset = next((offset for offset in (0.0, 1.0) if _close((weight + offset) * slope, rest)), None)
        return None if offset is None else (roles, offset)

    def _batch_fit(self, x: Tensor, axis: int, *, training: bool) -> _Fit | None:
        """Over what the layer normalizes such an input, and with which eps."""
        values = self._bare()
        z = self._call(x, values, training=training)
        for pool in _pools(x, axis):
            for centers in (True, False):
                part = self._centered(x, pool, values, axis) if centers else x
                if centers and _close(z, part):
                    return _Fit(pool.over, axis, True, False, (0.0, False), pool.groups)
                if _close(z * (pool.mean(part.square()) / pool.mean(z.square()).clamp_min(1e-30)).sqrt(), part):
                    pairs = []
                    for scale in _SCALES:
                        part = self._centered(x * scale, pool, values, axis) if centers else x * scale
                        square = pool.mean(part.square())
                        z = self._call(x * scale, values, training=training)
                        pairs.append((square, (square / pool.mean(z.square())).sqrt()))
                    law = self._law(pairs)
                    return None if law is None else _Fit(pool.over, axis, centers, True, law, pool.groups)
        return None

    def _centered(self, x: Tensor, pool: _Pool, values: Mapping[str, Tensor], axis: int) -> Tensor:
        factor = _along(values[self.roles["mean"]], x, axis) if "mean" in self.roles else 1.0
        return x - pool.mean(x) * factor

    def _running_law(self, x: Tensor, axis: int, *, training: bool) -> _Law | None:
        """The law by which running statistics normalize, if they do."""
        if self.running is None:
            return None
        pairs, dims = [], [k for k in range(x.ndim) if k != axis % x.ndim]
        for scale in _SCALES:
            values = self._bare()
            values[self.running[1]] *= scale**2
            z = self._call(x, values, training=training)
            mean, square = (_along(values[name], x, axis) for name in self.running)
            part = x - mean
            deviation = (part.square().sum(dims, keepdim=True) / z.square().sum(dims, keepdim=True)).sqrt()
            if not _close(z * deviation, part):
                return None
            pairs.append((square, deviation))
        return self._law(pairs)

    def _law(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> _Law | None:
        """Eps, and whether it lies outside the root, from variances and the deviations that were divided by."""
        square, deviation = pairs[-1]
        for outside, estimates in ((False, deviation.square() - square), (True, deviation - square.sqrt())):
            estimate = max(float(estimates.median()), 0.0)
            eps = self._snapped(estimate)
            used = estimate if eps is None else eps
            predicted = [v.sqrt() + used if outside else (v + used).sqrt() for v, _ in pairs]
            if all(_close(found / d, torch.ones_like(d)) for found, (_, d) in zip(predicted, pairs, strict=True)):
                return eps, outside
        return None

    def _snapped(self, estimate: float) -> float | None:
        """The attribute that an estimate of eps means, else the round number next to it."""
        for name, value in self.module.__dict__.items():
            if value is None and "eps" in name and estimate < 1e-6:
                return None
            if isinstance(value, float) and abs(value - estimate) <= 1e-3 * max(estimate, 1e-14):
                return value
        rounded = float(f"{estimate:.2g}")
        return 0.0 if estimate < 1e-15 else rounded if abs(rounded - estimate) <= 1e-3 * estimate else estimate

    def _momentum(self, x: Tensor, axis: int) -> float | None:
        """Weight of the batch in the running statistics; ``None`` if they are not updated as torch does."""
        values = self._draw()
        self._call(x, values, training=True)
        var, mean = torch.var_mean(x, [k for k in range(x.ndim) if k != axis % x.ndim])
        steps = [
            ((held.detach().double() - values[name]).flatten() / (target - values[name].flatten()))
            for name, target in zip(self.running or (), (mean, var), strict=True)
            if (held := self.twin._buffers.get(name)) is not None
        ]
        momentum = float(steps[0].median()) if len(steps) == 2 else 0.0
        right = 0 < momentum <= 1 and all(float((step - momentum).abs().max()) <= 1e-4 for step in steps)
        return round(momentum, 6) if right else None

    def _then(self, x: Tensor) -> bool:
        """Whether the submodules are applied to the normalized activation, one after the other."""
        children = {name: child for name, child in self.module._modules.items() if child is not None}
        values = self._draw()
        expected = self._call(x, values)
        for name, child in children.items():
            self.twin._modules[name] = _stand_in(child, {}).eval()
        for name in children:
            expected = self.twin._modules[name](expected)  # type: ignore[misc]
        return _close(self._call(x, values), expected)

    def _why(self) -> str:
        """Why nothing was found, for a module that is or seems to be a normalization."""
        for x in self.taken:
            values = self._draw()
            with suppress(_RefusedError):
                once, twice, other = (self._call(part, values) for part in (10 * x, 20 * x, 10 * x.flip(0)))
                if _close(twice, once, 1e-3) and not _close(other, once, 1e-3):
                    return f"{_UNSCALED}, but computes none of the normalizations known here"
        return "it computes none of the normalizations known here"


def _along(vector: Tensor, x: Tensor, axis: int) -> Tensor:
    return vector.reshape([-1 if k == axis % x.ndim else 1 for k in range(x.ndim)])


def _close(found: Tensor, wanted: Tensor, accuracy: float = _ACCURACY) -> bool:
    """Whether tensors agree to float accuracy of the largest value."""
    return float((found - wanted).abs().max()) <= accuracy * max(float(wanted.abs().max()), 1e-30)
