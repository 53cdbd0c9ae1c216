"""What to convert to: a norm by name, one of torch's layers, a class, or a function of the old layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn

from flexnorm._messages import unknown_name
from flexnorm.engine import NORMS, Norm, constructor_arguments
from flexnorm.nn import TORCH_LAYERS, GroupNorm, RMSNorm, norm_class
from flexnorm.surgery._reading import RefusedError, Source, name_of

To: TypeAlias = str | type[nn.Module] | Callable[[nn.Module], nn.Module | None]

# By the number of spatial axes from 1.
_TORCH: dict[str, tuple[type[nn.Module], ...]] = {
    "batch": TORCH_LAYERS["batch"][:3],
    "sync": (nn.SyncBatchNorm,) * 3,
    "group": (nn.GroupNorm,) * 3,
    "layer": (nn.GroupNorm,) * 3,  # one group: nn.LayerNorm has to know the sizes of the input
    "instance": TORCH_LAYERS["instance"],
    "rms": (nn.RMSNorm,) * 3,
}
_OF_TOKENS: dict[str, type[nn.Module]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
_ALWAYS = frozenset({"eps", "momentum", "affine", "process_group"})


@dataclass(frozen=True)
class Target:
    """Where a conversion goes."""

    label: str  # how a report calls it
    name: str = ""  # of the norm, or of a layer of torch; empty where it depends on the old layer
    of_torch: bool = False  # whether torch's layer is meant
    cls: type[nn.Module] | None = None  # the class, if the user named one
    function: Callable[[nn.Module], nn.Module | None] | None = None  # the user's, of the old layer
    kwargs: Mapping[str, Any] = field(default_factory=dict)  # constructor arguments that win over the old layer's

    @property
    def restores(self) -> bool:
        """Whether the way back is meant, to whatever class the layer once had."""
        return self.of_torch and not self.name and self.cls is None

    @property
    def ndim(self) -> int | None:
        """Number of spatial axes of the class that the user named, if it has a fixed one."""
        if self.cls is None:
            return None
        if issubclass(self.cls, Norm):
            axes = self.cls.spatial()
            return axes[0] if len(axes) == 1 else None
        return (name_of(self.cls) or ("", None))[1]

    def needs_axes(self, source: Source) -> bool:
        """Whether the number of spatial axes decides which class is built."""
        if self.where(source)[0] == -1:
            return False
        known = NORMS.get(self.name, {}) if self.cls is None and not self.of_torch else (1, 2, 3)
        return len({self.class_for(source, ndim) for ndim in known}) > 1

    def class_for(self, source: Source, ndim: int) -> type[nn.Module]:
        """The class that this layer would become, for inputs with ``ndim`` spatial axes."""
        cls = self.cls or (self._torch_class(source, ndim) if self.of_torch else norm_class(self.name, ndim))
        if self.cls is None and issubclass(cls, Norm):
            cls = cls.placed(*self.where(source))
        shape = getattr(source.norm, "normalized_shape", ())
        if len(shape) > 1 and "normalized_shape" not in constructor_arguments(cls):
            raise RefusedError(
                f"normalizes the last {len(shape)} axes with parameters of shape {shape}, {cls.__name__} has one per "
                "channel"
            )
        return cls

    def where(self, source: Source) -> tuple[int, bool | None]:
        """Where the new layer has its channels, and whether each position is a sample, ``None`` for the default.

        As the old layer and the arguments of the conversion say.
        """
        axis = self.kwargs.get("channel_axis", getattr(source.norm, "channel_axis", 1))
        own = getattr(source.norm, "per_position", False)
        usual = getattr(source.norm, "channel_axis", 1) == -1 and not source.norm.pools_positions
        kept = None if own == usual or "channel_axis" in self.kwargs else own
        return axis, self.kwargs.get("per_position", kept)

    def _torch_class(self, source: Source, ndim: int) -> type[nn.Module]:
        name, (axis, apart) = self._torch_name(source), self.where(source)
        tokens = apart or (apart is None and axis == -1)
        if tokens and axis == -1 and name in _OF_TOKENS:
            return _OF_TOKENS[name]
        matters = name not in NORMS or norm_class(name).positions_matter
        if name == "rms" or (axis == -1 and not source.flat) or (axis == 1 and apart and matters):
            place = "the last axis" if axis == -1 else "each position of axis 1" if apart else "channels and positions"
            raise RefusedError(f"torch's {name} layer has no form for {place}")
        return _TORCH[name][ndim - 1]

    def _torch_name(self, source: Source) -> str:
        name = self.name or source.norm.placed(*self.where(source)).torch_layer
        if not name:
            raise RefusedError(f"torch has no {source.norm.norm_name} layer; name another, such as to='torch.batch'")
        synchronized = source.config.get("process_group") is not None
        return "sync" if name == "batch" and not self.name and synchronized else name

    def build(self, source: Source, ndim: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Build the new layer with the arguments of the old one; tensors are not moved yet."""
        cls = self.class_for(source, ndim)
        names, features = constructor_arguments(cls), int(source.norm.num_features)  # type: ignore[arg-type]
        if "normalized_shape" in names:
            features = getattr(source.norm, "normalized_shape", features)
        if "elementwise_affine" in names:
            names |= {"affine"}
        settings = {n: v for n, v in source.config.items() if n in names and _carries(n, source.norm, cls)}
        axis, apart = self.where(source)
        if "channel_axis" in names:
            settings["channel_axis"] = axis
        if "per_position" in names and apart is not None and not (issubclass(cls, Norm) and cls.pools_positions):
            settings["per_position"] = apart
        if settings.get("eps", 0) is None and not issubclass(cls, (RMSNorm, nn.RMSNorm)):
            settings["eps"] = torch.finfo(torch.float32).eps
        if self.of_torch and settings.get("process_group") == "world":
            settings["process_group"] = None
        if self.of_torch and cls is nn.GroupNorm and self._torch_name(source) == "layer":
            settings["num_groups"] = 1
        settings.update(self.kwargs)
        if "elementwise_affine" in names and "affine" in settings:
            settings["elementwise_affine"] = settings.pop("affine")
        settings.update({n: v for n, v in (("device", device), ("dtype", dtype)) if n in names})
        if self.cls is None and issubclass(cls, Norm):
            return cls.build(features, **settings)
        if "num_groups" in names:
            settings.setdefault("num_groups", GroupNorm.default_groups(features))
        for channels in ("num_channels", "num_features"):
            if channels in names:
                return cls(**{channels: features}, **settings)
        return cls(features, **settings)


def of_batches(norm: Norm | type[Norm]) -> bool:
    """Whether running statistics of a norm are those of batches, so that they pass from one such norm to another."""
    return norm.statistics_from in ("batch", "population")


def _carries(argument: str, old: Norm, cls: type[nn.Module]) -> bool:
    """Whether a layer of the class gets the argument of the old one."""
    name = (name_of(cls) or ("",))[0]
    if argument in _ALWAYS or old.norm_name == name:
        return True
    return argument == "track_running_stats" and bool(name) and of_batches(norm_class(name)) and of_batches(old)


def resolve(to: To, kwargs: Mapping[str, Any]) -> Target:
    """Understand the argument ``to`` of a conversion, and refuse arguments that no such layer takes."""
    target = _resolve(to, kwargs)
    classes: tuple[type[nn.Module], ...] = ()
    if target.of_torch and target.cls is None:
        classes = _TORCH[target.name][1:2] if target.name else (nn.BatchNorm2d, nn.GroupNorm)
    elif target.function is None:
        classes = (target.cls or norm_class(target.name),)
    valid = {name for cls in classes for name in constructor_arguments(cls)}
    for name in kwargs:
        if name not in valid:
            known = valid - {"num_features", "num_channels"}
            hint = "; see recalibrate(), and batches= of convert_to_normprop()" if name == "calibrate" else ""
            raise TypeError(unknown_name(f"argument for {target.label}", name, known) + hint)
    return target


def _resolve(to: To, kwargs: Mapping[str, Any]) -> Target:
    if isinstance(to, str):
        if to == "normprop":
            raise ValueError(
                "Normalization Propagation replaces linear maps, normalizations and activations together: use "
                "flexnorm.surgery.convert_to_normprop(model, example_input=...)"
            )
        if to == "torch" or (to.startswith("torch.") and to[6:] in _TORCH):
            return Target(to, to[6:], of_torch=True, kwargs=kwargs)
        if to not in NORMS:
            raise ValueError(unknown_name("norm", to, [*NORMS, "torch", *(f"torch.{name}" for name in _TORCH)]))
        return Target(to, to, kwargs=kwargs)
    if isinstance(to, type) and issubclass(to, nn.Module):
        if to in (nn.LayerNorm, nn.RMSNorm):
            raise ValueError(
                f"nn.{to.__name__} normalizes the last axes and wants their sizes, which a conversion does not know; "
                "to='torch.layer' gives it for the last axis, else nn.GroupNorm with one group, which normalizes "
                "channels and positions"
            )
        found = name_of(to)
        name = "sync" if to is nn.SyncBatchNorm else found[0] if found else ""
        return Target(to.__name__, name, to.__module__.startswith("torch.nn."), to, kwargs=kwargs)
    if callable(to) and not isinstance(to, type):
        return Target(getattr(to, "__name__", type(to).__name__), function=to, kwargs=kwargs)
    raise TypeError(
        f"to must be a name such as 'unitized' or 'torch', a module class, or a function (module) -> module; got {to!r}"
    )
