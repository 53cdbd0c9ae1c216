"""What a normalization layer is, read off the module: its norm, spatial axes and constructor arguments."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from flexnorm.engine import NORMS, FlexNorm, Norm, constructor_arguments
from flexnorm.nn import TORCH_LAYERS, LayerNorm, NormPropUnits, RMSNorm, make_norm
from flexnorm.probe import NormBehavior, normalizes, recognize, side_forward, unread_norm, unwrap
from flexnorm.statistics import Frozen, is_frozen

# timm's and torchvision's layers, known by name and shape so that neither has to be imported.
WITH_ACT = ("BatchNormAct2d", "SyncBatchNormAct", "GroupNormAct")
BUFFERS_ONLY = ("FrozenBatchNormAct2d", "FrozenBatchNorm2d")

_HARMLESS = frozenset({"__init__", "__repr__", "extra_repr", "reset_parameters", "reset_running_stats"})
_OF_TORCH = frozenset(vars(nn.Module()))
_SPATIAL = re.compile(r"(?:Conv|NormProp).*([123])d$")


class ThenAct:
    """Mixin: ``act(drop(normalize(x)))``, as timm has it, with both as submodules. Made by :func:`with_act`.

    Such a layer cannot become a sequence of modules: the names of its parameters would change. It pickles and
    deep-copies by its plain base.
    """

    drop: nn.Module
    act: nn.Module
    plain: type[nn.Module]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Normalize ``x``, by whatever else is given too (a mask), then apply ``drop`` and ``act``."""
        y: Tensor = self.act(self.drop(super().forward(x, *args, **kwargs)))  # type: ignore[misc]
        return y

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (self.plain,), self.__dict__


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def with_act(plain: type[nn.Module]) -> type[nn.Module]:
    """The class ``plain`` with ``drop`` and ``act`` behind its forward."""
    if plain not in _classes:
        body = {"plain": plain, "__module__": plain.__module__, "__doc__": plain.__doc__}
        _classes[plain] = type(f"{plain.__name__}Act", (ThenAct, plain), body)
    return _classes[plain]


def _empty(plain: type[nn.Module]) -> nn.Module:
    cls = with_act(plain)
    return cls.__new__(cls)


class RefusedError(Exception):
    """A layer cannot be converted; the text says why, for the report."""


@dataclass(frozen=True)
class Source:
    """A normalization layer, read."""

    module: nn.Module
    norm: Norm  # declares and computes the same: the layer itself if of this package, else one of it on the meta device
    ndim: int | None  # number of spatial axes (1 also stands for none); None if the layer takes any
    config: Mapping[str, Any] = field(default_factory=dict)  # known constructor arguments of the norm's own layer
    frozen: bool = False  # whether the statistics are
    origin: type[nn.Module] | None = None  # class to restore on the way back, for layers of other packages
    tables: Mapping[str, Tensor] = field(default_factory=dict)  # per channel: parameters whose shape changes on the way
    notes: tuple[str, ...] = ()  # what a report should say
    names: Mapping[str, str] = field(default_factory=dict)  # the old layer's for tensors, by the new ones, where other
    template: nn.Module | None = None  # a layer of another package without its tensors, for the way back
    tried: NormBehavior | None = None  # what a layer does that was recognized by trying it
    flat: bool = False  # whether its input has been seen to be (N, C), where all places of the channels are the same

    @property
    def tracks(self) -> bool:
        """Whether the layer has running statistics."""
        return self.buffer("running_mean") is not None

    def buffer(self, name: str) -> Tensor | None:
        """A buffer of the old layer, by its name in the new one."""
        return self.module._buffers.get(self.names.get(name, name))

    def parameter(self, name: str) -> nn.Parameter | None:
        """A parameter of the old layer, by its name in the new one."""
        return self.module._parameters.get(self.names.get(name, name))


def name_of(cls: type[nn.Module]) -> tuple[str, int | None] | None:
    """Norm name and spatial axes (``None`` for any) of a declared layer class or one of torch's."""
    if issubclass(cls, Norm):
        axes = cls.spatial()
        layers = NORMS.get(cls.norm_name, {}).values()
        known = cls in layers or any(cls is layer.placed(-1) for layer in layers)
        return (cls.norm_name, axes[0] if len(axes) == 1 else None) if known else None
    for name, classes in TORCH_LAYERS.items():
        if cls in classes:
            return name, classes.index(cls) + 1 if cls in classes[:3] and len(classes) > 1 else None
    return None


def blank(name: str, ndim: int | None, features: int, config: Mapping[str, Any], *, frozen: bool = False) -> Norm:
    """A layer of that norm as the constructor leaves it, without memory."""
    with torch.device("meta"):
        layer = make_norm(name, features, ndim, **config)
    return layer.freeze() if frozen and isinstance(layer, FlexNorm) else layer


def is_candidate(module: nn.Module) -> bool:
    """Whether a conversion has something to say about the module."""
    return normalizes(module) or _buffers_only(module)


def _buffers_only(module: nn.Module) -> bool:
    wanted = {"weight", "bias", "running_mean", "running_var"}
    return type(module).__name__ in BUFFERS_ONLY and wanted <= set(module._buffers)


def read(module: nn.Module) -> Source:
    """Read a layer; RefusedError if it cannot be replaced without changing more than the normalization."""
    if isinstance(module, LazyModuleMixin):
        raise RefusedError("lazy: its number of channels is not known yet; run one batch through the model first")
    if parametrize.is_parametrized(module):
        raise RefusedError("parametrized; bake it in with torch.nn.utils.parametrize.remove_parametrizations first")
    if "forward" in module.__dict__:
        raise RefusedError("its forward was replaced on the instance")
    if isinstance(module, NormPropUnits):
        raise RefusedError("Normalization Propagation: linear map and normalization are one layer; see fold()")
    if isinstance(module, nn.LocalResponseNorm):
        raise RefusedError("local response normalization divides by a window of neighbouring channels")
    if computed := {name for name in ("weight", "bias") if isinstance(module.__dict__.get(name), Tensor)}:
        why = f"its {max(computed)} is computed by a hook (weight_norm, spectral_norm or pruning); remove that first"
        raise RefusedError(why)
    frozen = is_frozen(module)
    config: dict[str, Any]
    if _buffers_only(module):
        config = {"eps": module.eps, "affine": True, "track_running_stats": True}
        norm = blank("batch", 2, module.get_buffer("weight").numel(), config, frozen=True)
        return Source(module, norm, 2, config, True, type(module), notes=("statistics frozen",))
    try:
        known, name, ndim, origin = _known_class(type(module))
    except RefusedError as refusal:
        if isinstance(module, Norm):
            raise
        return _read_tried(module, refusal)
    if known in (nn.LayerNorm, nn.RMSNorm):
        return _read_last_axes(module, known, name)
    arguments = constructor_arguments(known) - {"num_features", "num_channels", "normalized_shape", "bias"}
    config = {argument: getattr(module, argument) for argument in arguments if hasattr(module, argument)}
    if "elementwise_affine" in config:
        config["affine"] = config.pop("elementwise_affine")
    if isinstance(module, Norm):
        ndim = module.__dict__.get("_ndim", ndim)
        origin, template = getattr(module, "_origin", None), module.__dict__.get("_template")
        return Source(module, module, ndim, config, frozen, origin, template=template)
    if bool(getattr(module, "track_running_stats", False)) != (module._buffers.get("running_mean") is not None):
        raise RefusedError("track_running_stats was changed after construction and does not agree with the buffers")
    if "process_group" in config and config["process_group"] is None:
        config["process_group"] = "world"
    features: Any = module.num_channels if known is nn.GroupNorm else module.num_features
    norm = blank(name, ndim, features, config, frozen=frozen)
    above = type(module).__mro__[: type(module).__mro__.index(known)]
    own = [c for c in above if not issubclass(c, (Frozen, ThenAct)) and c is not origin and c.__name__ not in WITH_ACT]
    notes = (f"subclass {own[0].__name__} of {known.__name__}",) if own else ()
    return Source(module, norm, ndim, config, frozen, origin, notes=notes)


def _known_class(cls: type[nn.Module]) -> tuple[type[nn.Module], str, int | None, type[nn.Module] | None]:
    """The class that ``cls`` is or only decorates, its norm and axes, and a class to restore on the way back."""
    origin = cls if cls.__name__ in WITH_ACT and not issubclass(cls, (ThenAct, FlexNorm)) else None
    for base in cls.__mro__:
        if issubclass(base, nn.Module) and (found := name_of(base)):
            return base, *found, origin
        if issubclass(base, (Frozen, ThenAct)) or base.__name__ in WITH_ACT:
            continue
        overridden = sorted(
            name
            for name, value in base.__dict__.items()
            if callable(value) and name not in _HARMLESS and name[:2] != "__"
        )
        if overridden and (issubclass(cls, Norm) or any(map(name_of, cls.__mro__[:-1]))):
            raise RefusedError(f"{base.__name__} is a subclass with its own {', '.join(overridden)}")
        if base is nn.Module:
            break
    raise RefusedError(f"{cls.__name__} is no layer that convert() knows; pass a function (module) -> module as `to`")


def _read_tried(module: nn.Module, refusal: RefusedError) -> Source:
    """A layer of whatever class that computes what one of this package does, found by trying it."""
    found = recognize(module)
    if found is None:
        why = unread_norm(module)
        raise RefusedError(f"{why}; pass a function (module) -> module as `to`" if why else str(refusal)) from None
    if not found.norm_name or found.then not in ((), ("drop", "act")) or (found.over == "channel" and found.running):
        raise RefusedError(f"recognized by trying, but no layer here {found}") from None
    if further := list(inspect.signature(type(module).forward).parameters)[2:]:
        raise RefusedError(f"its forward takes more than the input ({', '.join(further)}), the layers here do not")
    if found.channels is None:
        raise RefusedError("takes any number of channels, the layers here one; pass a function as `to`") from None
    held = {**module._buffers, **module._parameters}
    tables = {}
    for new, old in found.tensors.items():
        tensor, offset = held[old], found.weight_offset if new == "weight" else 0.0
        if tensor is not None and (offset or tensor.dim() != 1):
            tables[new] = tensor.detach().flatten() + offset
    config: dict[str, Any] = {"eps": found.eps, "affine": bool(found.weight or found.bias)}
    frozen = found.over == "running"
    if found.norm_name == "batch":
        config |= {"track_running_stats": bool(found.running), "momentum": found.momentum or 0.1}
    elif found.norm_name == "group":
        config["num_groups"] = found.groups
    if found.eps is None and found.norm_name != "rms":
        config["eps"] = torch.finfo(torch.float32).eps
    axis = found.channel_axis or 1
    place: dict[str, Any] = {} if axis == 1 else {"channel_axis": -1}
    if found.norm_name in ("layer", "rms"):
        place["per_position"] = found.over == "position"
    spatial = {max(ndim - 2, 1) for ndim, _ in found.axes}
    ndim = spatial.pop() if len(spatial) == 1 else None
    norm = blank(found.norm_name, ndim, found.channels, {**config, **place}, frozen=frozen)
    told = [f"recognized by trying: {found}", *(["statistics frozen"] if frozen else [])]
    told += ["the weight becomes 1 + weight"] if found.weight_offset else []
    told += [f"{old} becomes {new}" for new, old in found.tensors.items() if new != old]
    if found.running and found.momentum is None and not frozen:
        told.append("updates its running statistics in a way of its own, from now on with momentum 0.1")
    return Source(
        module,
        norm,
        ndim,
        {**config, **place},
        frozen,
        tables=tables,
        notes=tuple(told),
        names=found.tensors,
        template=_template(module),
        tried=found,
    )


def _template(module: nn.Module) -> nn.Module:
    """A layer of the same class and attributes without values and hooks."""
    template: nn.Module = object.__new__(type(module))
    template.__dict__ |= {**vars(nn.Module()), **{k: v for k, v in module.__dict__.items() if k not in _OF_TORCH}}
    for kind in ("_parameters", "_buffers"):
        tensors = {
            name: None if t is None else torch.empty_like(t, device="meta") for name, t in getattr(module, kind).items()
        }
        if kind == "_parameters":
            tensors = {name: None if t is None else nn.Parameter(t) for name, t in tensors.items()}
        template.__dict__[kind] = tensors
    template.__dict__["_modules"] = dict(module._modules)
    return template


def restored(source: Source) -> nn.Module | None:
    """The layer of another package that this one was made of, with its tensors of now; ``None`` if it cannot be."""
    if source.template is None or (found := recognize(source.template)) is None:
        return None
    norm, axes = source.norm, (found.channel_axis, found.over == "position")
    eps = getattr(norm, "eps", None)
    where = getattr(norm, "channel_axis", 1), getattr(norm, "per_position", False)
    same = norm.norm_name == found.norm_name and eps == found.eps and found.channels == norm.num_features
    if not same or (norm.norm_name in ("layer", "rms") and axes != where):
        return None
    new = _template(source.template)
    now, held = {**source.module._buffers, **source.module._parameters}, {**new._buffers, **new._parameters}
    kept = {name for name in ("weight", "bias", "running_mean", "running_var") if now.get(name) is not None}
    empty = {name for name, t in held.items() if t is not None and t.numel() > 1 and name not in found.tensors.values()}
    if kept != found.tensors.keys() or empty:
        return None
    for name, old in found.tensors.items():
        value, shape = now[name], held[old].shape  # type: ignore[union-attr]
        assert value is not None
        offset = found.weight_offset if name == "weight" else 0.0
        if offset or value.shape != shape:
            grad = value.requires_grad
            value = nn.Parameter((value.detach() - offset).view(shape), requires_grad=grad)
        if old in new._buffers:
            new._buffers[old] = value.detach()
        else:
            new._parameters[old] = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
    return new


def _read_last_axes(module: nn.Module, known: type[nn.Module], name: str) -> Source:
    """``nn.LayerNorm`` and ``nn.RMSNorm``: of the last axis, tokens; of several, channels and positions if they can."""
    shape: tuple[int, ...] = tuple(module.normalized_shape)  # type: ignore[arg-type]
    config = {"eps": module.eps, "affine": bool(module.elementwise_affine)}
    values = {key: value for key in ("weight", "bias") if (value := module._parameters.get(key)) is not None}
    tables: dict[str, Tensor] = {}
    of_channels = 1 < len(shape) < 5
    for key, value in values.items() if of_channels else ():
        table = value.detach().flatten(1)
        of_channels = of_channels and torch.equal(table, table[:, :1].expand_as(table))
        tables[key] = table[:, 0].clone()
    if not of_channels:
        cls = LayerNorm if known is nn.LayerNorm else RMSNorm
        with torch.device("meta"):
            norm = cls(shape, eps=module.eps, elementwise_affine=config["affine"])  # type: ignore[arg-type]
        return Source(module, norm, None, {**config, "channel_axis": -1})
    config["eps"] = module.eps if module.eps is not None else torch.finfo(torch.float32).eps
    notes = (f"parameters {shape} become ({shape[0]},)",) if tables else ()
    ndim = len(shape) - 1
    return Source(module, blank(name, ndim, shape[0], config), ndim, config, tables=tables, notes=notes)


def axes_of(model: nn.Module, modules: Iterable[nn.Module], example_input: Any) -> dict[int, set[int]]:
    """Numbers of axes of the inputs that reach each module (by ``id``) in evaluation; the model is not changed."""
    seen: dict[int, set[int]] = {}

    def look(_: str, module: nn.Module, inputs: tuple[Any, ...], __: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            seen.setdefault(id(module), set()).add(inputs[0].dim())

    layers = {str(number): module for number, module in enumerate(modules)}
    side_forward(unwrap(model), example_input, layers, look, mode="eval")
    return seen


def common_ndim(model: nn.Module) -> int | None:
    """The number of spatial axes on which all convolutions of the model agree; 1 for linear maps without any."""
    found = {
        int(match[1])
        for module in model.modules()
        if type(module).__module__.startswith(("torch.nn", "flexnorm"))
        if (match := _SPATIAL.match(type(module).__name__))
    }
    if not found and any(isinstance(module, nn.Linear) for module in model.modules()):
        return 1
    return found.pop() if len(found) == 1 else None
