"""What to convert to: a family by name, one of torch's layers, a class, or a function of the old layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn

from flexnorm._messages import unknown_name
from flexnorm.engine import FlexNorm, constructor_arguments
from flexnorm.nn import NORMS, make_norm, norm_class
from flexnorm.surgery._kinds import RefusedError, Source, family_of

__all__ = ["Target", "To", "resolve"]

To: TypeAlias = str | type[nn.Module] | Callable[[nn.Module], nn.Module | None]

_TORCH_NAMES = ("batch", "sync", "group", "layer", "instance")
_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_ALWAYS = frozenset({"eps", "momentum", "affine", "process_group"})


@dataclass(frozen=True)
class Target:
    """Where a conversion goes.

    Attributes:
        label: How a report calls it.
        family: Name of the family, or ``None`` where it depends on the old layer.
        native: Whether torch's layer is meant.
        cls: The class, if the user named one.
        ndim: Spatial axes of that class, if it has a fixed number.
        function: The user's function of the old layer.
        kwargs: The user's constructor arguments, which win over those of the old layer.
    """

    label: str
    family: str | None = None
    native: bool = False
    cls: type[nn.Module] | None = None
    ndim: int | None = None
    function: Callable[[nn.Module], nn.Module | None] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def restores(self) -> bool:
        """Whether the way back is meant, to whatever class the layer once had."""
        return self.native and self.family is None and self.cls is None

    def family_for(self, source: Source) -> str:
        """The family that this layer would become."""
        if self.family is not None:
            return self.family
        if not self.native:
            return f"class {self.label}"
        family = norm_class(source.family).torch_layer
        if not family:
            raise RefusedError(f"torch has no {source.family} layer; name another, such as to='torch.batch'")
        return "sync" if family == "batch" and source.config.get("process_group") is not None else family

    def needs_axes(self, source: Source) -> bool:
        """Whether the number of spatial axes decides which class is built."""
        return (
            self.cls is None
            and self.family_for(source) not in ("group", "none", "sync")
            and not (self.native and self.family_for(source) == "layer")
        )

    def class_for(self, source: Source, ndim: int) -> type[nn.Module]:
        """The class that this layer would become, for inputs with ``ndim`` spatial axes."""
        if self.cls is not None:
            return self.cls
        family = self.family_for(source)
        if not self.native:
            return norm_class(family, ndim)
        if family in ("batch", "instance"):
            return (_BATCH if family == "batch" else _INSTANCE)[max(ndim, 1) - 1]
        return nn.SyncBatchNorm if family == "sync" else nn.GroupNorm

    def build(self, source: Source, ndim: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Build the new layer with the arguments of the old one; tensors are not moved yet.

        Raises:
            RefusedError: If there is no such layer.
            ValueError: If the layer does not take an argument's value.
        """
        family, cls = self.family_for(source), self.class_for(source, ndim)
        names = constructor_arguments(cls)
        settings = {n: v for n, v in source.config.items() if n in names and _carries(n, source.family, family)}
        if self.native and family == "sync" and settings.get("process_group") == "world":
            settings["process_group"] = None
        if self.native and family == "layer":
            settings["num_groups"] = 1
        settings.update(self.kwargs)
        settings.update({n: v for n, v in (("device", device), ("dtype", dtype)) if n in names})
        if self.family is not None and not self.native and self.cls is None:
            return make_norm(self.family, source.features, max(ndim, 1), **settings)
        if "num_groups" in names and "num_groups" not in settings:
            settings["num_groups"] = make_norm("group", source.features, device="meta").num_groups
        if "num_channels" in names:
            return cls(num_channels=source.features, **settings)
        return (
            cls(num_features=source.features, **settings)
            if "num_features" in names
            else cls(source.features, **settings)
        )


def batch_like(family: str) -> bool:
    """Whether the running statistics of a norm are those of batches, so that they pass from one to the other."""
    return family == "sync" or (
        family in NORMS and next(iter(NORMS[family].values())).statistics_from in ("batch", "population")
    )


def _carries(name: str, old: str, new: str) -> bool:
    if name == "track_running_stats":
        return old == new or (batch_like(old) and batch_like(new))
    return name in _ALWAYS or old == new


def resolve(to: To, kwargs: Mapping[str, Any]) -> Target:
    """Understand the argument ``to`` of a conversion.

    Raises:
        ValueError: For an unknown name.
        TypeError: For another kind of argument, or for keyword arguments that the layer does not take.
    """
    target = _resolve(to, kwargs)
    valid: frozenset[str] | None = None
    if target.function is not None:
        valid = frozenset()
    elif target.cls is not None:
        valid = constructor_arguments(target.cls)
    elif target.family is not None:
        valid = constructor_arguments(target.class_for(Source(nn.Identity(), target.family, 4, 2), 2))
    else:
        valid = constructor_arguments(nn.BatchNorm2d) | constructor_arguments(nn.GroupNorm)
    for name in kwargs:
        if name not in valid:
            raise TypeError(
                unknown_name(f"argument for {target.label}", name, valid - {"num_features", "num_channels"})
            )
    return target


def _resolve(to: To, kwargs: Mapping[str, Any]) -> Target:
    if isinstance(to, str):
        if to == "torch":
            return Target("torch", native=True, kwargs=kwargs)
        if to.startswith("torch.") and to[6:] in _TORCH_NAMES:
            return Target(to, to[6:], native=True, kwargs=kwargs)
        if to not in NORMS:
            raise ValueError(unknown_name("norm", to, [*NORMS, "torch", *(f"torch.{name}" for name in _TORCH_NAMES)]))
        return Target(to, to, kwargs=kwargs)
    if isinstance(to, type) and issubclass(to, nn.Module):
        if to in (nn.LayerNorm, nn.RMSNorm):
            raise ValueError(
                f"nn.{to.__name__} normalizes the last axes and wants their sizes, which a conversion does not know; "
                "to='torch.layer' gives nn.GroupNorm with one group, which normalizes channels and positions"
            )
        known = family_of(to)
        family, ndim = known or (None, None)
        if to is nn.SyncBatchNorm:
            family = "sync"
        if known is None and issubclass(to, FlexNorm):
            axes = {max(axes - 2, 1) for axes in to.ndims}
            ndim = axes.pop() if len(axes) == 1 else None
        native = to.__module__.startswith("torch.nn.")
        return Target(to.__name__, family, native, to, ndim, kwargs=kwargs)
    if callable(to) and not isinstance(to, type):
        return Target(getattr(to, "__name__", type(to).__name__), function=to, kwargs=kwargs)
    raise TypeError(
        f"to must be a name such as 'unitized' or 'torch', a module class, or a function (module) -> module; got {to!r}"
    )
