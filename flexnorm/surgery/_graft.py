"""Move everything that a normalization layer carries into the layer that replaces it."""

from __future__ import annotations

import functools
import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from flexnorm.engine import FlexNorm
from flexnorm.nn import make_norm
from flexnorm.statistics import freeze_layer
from flexnorm.surgery._act import ThenAct, with_act
from flexnorm.surgery._kinds import _BUFFERS_ONLY, _WITH_ACT, Source

__all__ = ["dropped", "final_class", "graft", "graft_hooks"]

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)

_KNOWN = frozenset(
    {"weight", "bias", "running_mean", "running_var", "num_batches_tracked", "training", "plain", "process_group"}
    | {"num_features", "num_channels", "num_groups", "normalized_shape", "elementwise_affine", "eps", "momentum"}
    | {"affine", "track_running_stats", "frozen", "_origin", "_training_when_thawed", "drop", "act"}
)


def graft(source: Source, new: nn.Module, *, restore: bool = False) -> nn.Module:
    """Give ``new`` the parameters, statistics, flags, hooks and extras of the layer read as ``source``.

    Parameters are the very same objects wherever the shapes agree, so that an optimizer built before keeps working.

    Args:
        source: The layer, read.
        new: The layer that was built for it.
        restore: Go back to the class of another package that the layer once had.

    Returns:
        ``new``, or a layer of another class in its place where the layer has an activation inside.
    """
    old = source.module
    training = old.__dict__.get("_training_when_thawed", old.training)
    _move_parameters(source, new)
    _move_buffers(old, new)
    new = _restore_shape(source, new, final_class(source, new, restore=restore))
    _move_extras(source, new)
    graft_hooks(old, new)
    new.training = training
    if source.frozen and isinstance(new._buffers.get("running_mean"), Tensor) and "weight" not in new._buffers:
        freeze_layer(new)
    return new


def dropped(source: Source, new: nn.Module) -> list[str]:
    """Names of the parameters and statistics of the old layer that the new one has no place for."""
    old = source.module
    kept = {**new._parameters, **new._buffers}
    gone = [n for n, p in old._parameters.items() if p is not None and kept.get(n) is None and _own(source, n)]
    if source.tracks and new._buffers.get("running_mean") is None:
        gone.append("running statistics")
    return gone


def graft_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let ``new`` take over all hooks of ``old``; handles that a user holds still remove them."""
    for name in _HOOKS:
        # The dictionaries themselves: handles refer to them.
        new.__dict__[name] = old.__dict__[name]
    for hook in new._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(new)  # type: ignore[attr-defined]


def _own(source: Source, name: str) -> bool:
    """Whether a tensor of that name belongs to the layer's kind, and was not added to it by somebody."""
    if name in _KNOWN:
        return True
    if not isinstance(source.module, FlexNorm):
        return False
    return name in _blank(source.family).__dict__ or any(
        name in inspect.get_annotations(base) for base in type(source.module).__mro__
    )


@functools.cache
def _blank(family: str) -> nn.Module:
    return make_norm(family, 4, device="meta")


def _move_parameters(source: Source, new: nn.Module) -> None:
    old = source.module
    trainable = [p.requires_grad for p in old._parameters.values() if p is not None]
    for name, parameter in new._parameters.items():
        if parameter is None:
            continue
        if name in source.tables:
            with torch.no_grad():
                parameter.copy_(source.tables[name])
            parameter.requires_grad_(old.get_parameter(name).requires_grad)
            continue
        present = old._parameters.get(name)
        if present is not None and present.shape == parameter.shape:
            new._parameters[name] = present
        elif isinstance(buffer := old._buffers.get(name), Tensor):
            # Frozen layers of torchvision and timm keep weight and bias in buffers.
            new._parameters[name] = nn.Parameter(buffer, requires_grad=False)
        elif name == "bias" and present is None and old._parameters.get("weight") is not None:
            new._parameters[name] = None
        elif (trainable or "weight" in old._buffers) and not any(trainable):
            # A frozen layer does not become trainable by what is new in it.
            parameter.requires_grad_(False)


def _move_buffers(old: nn.Module, new: nn.Module) -> None:
    half = (torch.float16, torch.bfloat16)
    weight = new._parameters.get("weight")
    for name, own in new._buffers.items():
        buffer = old._buffers.get(name)
        if own is None or buffer is None or buffer.shape != own.shape:
            continue
        if isinstance(new, FlexNorm) and buffer.dtype in half:
            buffer = buffer.float()
        elif (
            not isinstance(new, FlexNorm) and weight is not None and weight.dtype in half and buffer.is_floating_point()
        ):
            # torch's layers want their statistics in the type of a half-precision weight.
            buffer = buffer.to(weight.dtype)
        new._buffers[name] = buffer


def final_class(source: Source, new: nn.Module, *, restore: bool) -> type[nn.Module]:
    """The class that ``new`` has in the end: with the activation of the old layer, or of another package."""
    origin, plain = source.origin, type(new)
    if restore and origin is not None:
        if origin.__name__ in _BUFFERS_ONLY and source.frozen and plain is nn.BatchNorm2d:
            return origin
        if origin.__name__ in _WITH_ACT and issubclass(origin, plain):
            return origin
    return with_act(plain) if _has_act(source) else plain


def _has_act(source: Source) -> bool:
    return "act" in source.module._modules and (source.origin is not None or isinstance(source.module, ThenAct))


def _restore_shape(source: Source, new: nn.Module, cls: type[nn.Module]) -> nn.Module:
    if cls is source.origin and cls.__name__ in _BUFFERS_ONLY:
        new = _buffers_only(cls, new)
    elif cls is not type(new):
        new.__class__ = cls
    if _has_act(source):
        new._modules["drop"] = source.module._modules.get("drop") or nn.Identity()
        new._modules["act"] = source.module._modules["act"]
    if source.origin is not None and isinstance(new, FlexNorm):
        new.__dict__["_origin"] = source.origin
    return new


def _buffers_only(origin: type[nn.Module], new: nn.Module) -> nn.Module:
    frozen = origin.__new__(origin)
    nn.Module.__init__(frozen)
    frozen.eps = new.eps
    for name in ("weight", "bias"):
        value = new._parameters[name]
        frozen.register_buffer(name, None if value is None else value.detach())
    for name in ("running_mean", "running_var"):
        frozen.register_buffer(name, new._buffers[name])
    return frozen


def _move_extras(source: Source, new: nn.Module) -> None:
    """What somebody has added to this one module: attributes, buffers, parameters and submodules."""
    old = source.module
    for kind in ("_parameters", "_buffers", "_modules"):
        extras: dict[str, Any] = getattr(old, kind)
        getattr(new, kind).update(
            {n: v for n, v in extras.items() if not _own(source, n) and n not in getattr(new, kind)}
        )
    new._non_persistent_buffers_set.update(old._non_persistent_buffers_set & set(new._buffers))
    for name, value in old.__dict__.items():
        if name not in new.__dict__ and not _own(source, name):
            new.__dict__[name] = value
