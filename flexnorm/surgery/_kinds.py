"""What a normalization layer is, read off the module: family, channels, spatial axes, constructor arguments.

The families are the names of :func:`flexnorm.nn.make_norm`; a layer that is added there is known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from flexnorm.engine import FlexNorm, Norm, constructor_arguments
from flexnorm.nn import NORMS, TORCH_LAYERS, NormPropUnits, is_norm
from flexnorm.statistics import Frozen, is_frozen
from flexnorm.surgery._act import ThenAct

__all__ = ["RefusedError", "Source", "family_of", "is_candidate", "read"]

# timm's and torchvision's layers, known by name and shape so that neither has to be imported.
_WITH_ACT = ("BatchNormAct2d", "SyncBatchNormAct", "GroupNormAct")
_BUFFERS_ONLY = ("FrozenBatchNormAct2d", "FrozenBatchNorm2d")

_HARMLESS = frozenset({"__init__", "__repr__", "extra_repr", "reset_parameters", "reset_running_stats"})


class RefusedError(Exception):
    """A layer cannot be converted; the text says why, for the report."""


@dataclass(frozen=True)
class Source:
    """A normalization layer, read.

    Attributes:
        module: The layer.
        family: Name of :func:`flexnorm.nn.make_norm`.
        features: Number of channels.
        ndim: Number of spatial axes (1 also stands for none), or ``None`` if the layer takes any.
        config: Constructor arguments of the family's own layer, as far as they are known.
        native: Whether the layer is torch's (or derived from torch's).
        frozen: Whether the statistics are frozen.
        origin: Class to restore on the way back, for layers of other packages.
        tables: Parameters whose shape changes on the way: their values per channel.
        notes: What a report should say about the layer.
    """

    module: nn.Module
    family: str
    features: int
    ndim: int | None
    config: Mapping[str, Any] = field(default_factory=dict)
    native: bool = True
    frozen: bool = False
    origin: type[nn.Module] | None = None
    tables: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def tracks(self) -> bool:
        """Whether the layer has running statistics."""
        return self.module._buffers.get("running_mean") is not None


def family_of(cls: type[nn.Module]) -> tuple[str, int | None] | None:
    """Norm name and spatial axes (``None`` for any) of a declared class, or of one of torch's."""
    if issubclass(cls, Norm):
        if cls not in NORMS.get(cls.norm_name, {}).values():
            return None
        spatial = cls.spatial()
        return cls.norm_name, spatial[0] if len(spatial) == 1 else None
    for name, classes in TORCH_LAYERS.items():
        if cls in classes:
            return name, classes.index(cls) + 1 if len(classes) > 1 and cls is not nn.SyncBatchNorm else None
    return None


def is_candidate(module: nn.Module) -> bool:
    """Whether a conversion has something to say about the module."""
    return is_norm(module) or _buffers_only(module)


def _buffers_only(module: nn.Module) -> bool:
    wanted = {"weight", "bias", "running_mean", "running_var"}
    return type(module).__name__ in _BUFFERS_ONLY and wanted <= set(module._buffers)


def read(module: nn.Module) -> Source:
    """Read a normalization layer.

    Raises:
        RefusedError: If it cannot be replaced without changing more than the normalization; the text says why.
    """
    _refuse_what_is_more(module)
    if _buffers_only(module):
        config = {"eps": module.eps, "affine": True, "track_running_stats": True}
        features = module.get_buffer("weight").numel()
        return Source(module, "batch", features, 2, config, True, True, type(module), notes=("statistics frozen",))
    known, origin = _known_class(type(module))
    family, ndim = family_of(known) or ("", None)
    if not issubclass(known, Norm):
        return _read_torch(module, known, family, ndim, origin)
    features = int(module.num_features)  # type: ignore[arg-type]
    config = {
        name: getattr(module, name)
        for name in constructor_arguments(known) - {"num_features", "num_channels"}
        if hasattr(module, name) and name != "bias"
    }
    origin = getattr(module, "_origin", None)
    return Source(module, family, features, ndim, config, False, is_frozen(module), origin)


def _refuse_what_is_more(module: nn.Module) -> None:
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
    for name in ("weight", "bias"):
        if name in module.__dict__:
            raise RefusedError(
                f"its {name} is computed by a hook (weight_norm, spectral_norm or pruning); remove that first"
            )


def _known_class(cls: type[nn.Module]) -> tuple[type[nn.Module], type[nn.Module] | None]:
    """The class of the tables that ``cls`` is or only decorates, and a class to restore on the way back."""
    origin = cls if cls.__name__ in _WITH_ACT and not issubclass(cls, (ThenAct, FlexNorm)) else None
    for base in cls.__mro__:
        if issubclass(base, nn.Module) and family_of(base):
            return base, origin
        if issubclass(base, (Frozen, ThenAct)) or base.__name__ in _WITH_ACT or base in (Frozen, ThenAct):
            continue
        overridden = sorted(
            name
            for name, value in base.__dict__.items()
            if callable(value) and name not in _HARMLESS and name[:2] != "__"
        )
        if overridden:
            raise RefusedError(f"{base.__name__} is a subclass with its own {', '.join(overridden)}")
        if base is nn.Module:
            break
    raise RefusedError(f"{cls.__name__} is no layer that convert() knows; pass a function (module) -> module as `to`")


def _read_torch(
    module: nn.Module, known: type[nn.Module], family: str, ndim: int | None, origin: type[nn.Module] | None
) -> Source:
    frozen = is_frozen(module)
    if known in (nn.LayerNorm, nn.RMSNorm):
        return _read_last_axes(module, family)
    if known is nn.GroupNorm:
        config = {n: getattr(module, n) for n in ("num_groups", "eps", "affine")}
        features = int(module.num_channels)  # type: ignore[arg-type]
    else:
        config = {n: getattr(module, n) for n in ("eps", "momentum", "affine", "track_running_stats")}
        features = int(module.num_features)  # type: ignore[arg-type]
        if bool(module.track_running_stats) != (module._buffers.get("running_mean") is not None):
            raise RefusedError("track_running_stats was changed after construction and does not agree with the buffers")
    if known is nn.SyncBatchNorm:
        config["process_group"] = "world" if module.process_group is None else module.process_group
    subclass = type(module).__mro__
    plain = [c for c in subclass[: subclass.index(known)] if not issubclass(c, (Frozen, ThenAct)) and c is not origin]
    plain = [c for c in plain if c.__name__ not in _WITH_ACT and c not in (Frozen, ThenAct)]
    notes = (f"subclass {plain[0].__name__} of {known.__name__}",) if plain else ()
    return Source(module, family, features, ndim, config, True, frozen, origin, notes=notes)


def _read_last_axes(module: nn.Module, family: str) -> Source:
    """``nn.LayerNorm`` and ``nn.RMSNorm``, which normalize the last axes, where these are channels and positions."""
    shape: tuple[int, ...] = tuple(module.normalized_shape)  # type: ignore[arg-type]
    if len(shape) > 4:
        raise RefusedError(f"normalizes {len(shape)} axes; the layers here take channels and up to 3 spatial axes")
    if family not in NORMS:
        raise RefusedError(f"there is no {family} layer to convert {type(module).__name__} to")
    eps = module.eps if module.eps is not None else torch.finfo(torch.float32).eps
    tables: dict[str, Tensor] = {}
    for name in ("weight", "bias"):
        value = module._parameters.get(name)
        if value is None or len(shape) == 1:
            continue
        table = value.detach().flatten(1)
        if not torch.equal(table, table[:, :1].expand_as(table)):
            raise RefusedError(f"its {name} differs from position to position, the layers here have one per channel")
        tables[name] = table[:, 0].clone()
    notes = (f"parameters {shape} become ({shape[0]},)",) if tables else ()
    # (C,) on the last axis is (N, C) only where the input has two axes; ndim 0 says so to the conversion.
    config = {"eps": eps, "affine": bool(module.elementwise_affine)}
    return Source(module, family, shape[0], len(shape) - 1, config, True, tables=tables, notes=notes)
