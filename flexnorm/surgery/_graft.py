"""Move everything that a normalization layer carries into the layer that replaces it, and say what that changes."""

from __future__ import annotations

import inspect
import weakref

import torch
from torch import Tensor, nn

from flexnorm.engine import FlexNorm, Norm
from flexnorm.nn import norm_of
from flexnorm.statistics import freeze_layer
from flexnorm.surgery._reading import BUFFERS_ONLY, WITH_ACT, RefusedError, Source, ThenAct, blank, read, with_act
from flexnorm.surgery._targets import of_batches

UNKNOWN = "statistics unknown: recalibrate() before evaluation"

_HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name)
_HALF = (torch.float16, torch.bfloat16)
# What layers of torch, and those that freezing and conversion have made, have besides what the norm's own layer has.
_ALSO_OWN = {"num_channels", "num_groups", "normalized_shape", "elementwise_affine", "plain", "drop", "act"}
_ALSO_OWN |= {"_origin", "_template", "_ndim", "_training_when_thawed"}


def effect(source: Source, new: nn.Module) -> str:
    """``"kept"``, ``"kept in evaluation"`` or ``"changes"``, judged by the norms, their options and parameters.

    ``new`` has the tensors already that it takes over.
    """
    try:
        after = read(new).norm
    except RefusedError:
        return "changes"
    freezes = source.frozen and new._buffers.get("running_mean") is not None
    in_evaluation, same = (source.norm.function(mode) == after.function(mode and not freezes) for mode in (False, True))
    if not in_evaluation or any(_loses(source, new, name, neutral) for name, neutral in (("weight", 1), ("bias", 0))):
        return "changes"
    return "kept" if same else "kept in evaluation"


def _loses(source: Source, new: nn.Module, name: str, neutral: int) -> bool:
    """Whether a weight or bias has an effect and no place in the new layer."""
    held: Tensor | None = source.parameter(name)
    value = source.tables.get(name, source.buffer(name) if held is None else held)
    if value is None or new._parameters.get(name) is not None:
        return False
    return value.is_meta or not bool((value == neutral).all())


def notes(source: Source, new: nn.Module) -> tuple[str, ...]:
    """What a report should say about the step besides its effect."""
    kept = {**new._parameters, **new._buffers}
    own = _own(source)
    known = {old: new for new, old in source.names.items()}
    gone = [n for n, p in source.module._parameters.items() if p is not None and n in own]
    gone = [n for n in gone if kept.get(known.get(n, n)) is None]
    if source.tracks and kept.get("running_mean") is None:
        gone.append("running statistics")
    found = [f"drops {', '.join(gone)}"] if gone else []
    norm = norm_of(new)
    if norm is not None and kept.get("running_mean") is not None and not source.tracks and of_batches(norm):
        found.append(UNKNOWN)
    return tuple(found)


def move_tensors(source: Source, new: nn.Module) -> None:
    """Give ``new`` the parameters and statistics of the old layer.

    Parameters are the very same objects wherever the shapes agree, so that an optimizer built before keeps working.
    """
    old = source.module
    trainable = [p.requires_grad for p in old._parameters.values() if p is not None]
    for name, parameter in new._parameters.items():
        if parameter is None:
            continue
        if name in source.tables:
            with torch.no_grad():
                parameter.copy_(source.tables[name])
            present = source.parameter(name)
            parameter.requires_grad_(present is not None and present.requires_grad)
            continue
        present = source.parameter(name)
        if present is not None and present.shape == parameter.shape:
            new._parameters[name] = present
        elif isinstance(buffer := source.buffer(name), Tensor):
            # Frozen layers of torchvision and timm keep weight and bias in buffers.
            new._parameters[name] = nn.Parameter(buffer, requires_grad=False)
        elif name == "bias" and present is None and source.parameter("weight") is not None:
            new._parameters[name] = None
        elif (trainable or source.buffer("weight") is not None) and not any(trainable):
            # A frozen layer does not become trainable by what is new in it.
            parameter.requires_grad_(False)
    weight = new._parameters.get("weight")
    for name, own in new._buffers.items():
        buffer = source.buffer(name)
        if own is None or buffer is None or buffer.shape != own.shape:
            continue
        if isinstance(new, FlexNorm):
            new._buffers[name] = buffer.float() if buffer.dtype in _HALF else buffer
        else:
            # torch's layers want their statistics in the type of a half-precision weight.
            casts = weight is not None and weight.dtype in _HALF and buffer.is_floating_point()
            new._buffers[name] = buffer.to(weight.dtype) if weight is not None and casts else buffer


def final_class(source: Source, new: nn.Module, *, restore: bool) -> type[nn.Module]:
    """The class that ``new`` has in the end: with the activation of the old layer, or (``restore``) its first class."""
    origin, plain = source.origin, type(new)
    if restore and origin is not None:
        if origin.__name__ in BUFFERS_ONLY and source.frozen and plain is nn.BatchNorm2d:
            return origin
        if origin.__name__ in WITH_ACT and issubclass(origin, plain):
            return origin
    return with_act(plain) if _has_act(source) else plain


def _has_act(source: Source) -> bool:
    knows = source.origin is not None or source.tried is not None or isinstance(source.module, ThenAct)
    return "act" in source.module._modules and knows


def graft(source: Source, new: nn.Module, ndim: int | None, *, restore: bool = False) -> nn.Module:
    """Give ``new``, which has the tensors already, the flags, hooks, extras and the final class of the old layer.

    A layer for any number of spatial axes remembers ``ndim``, that of the layer it replaces, for the way back.
    """
    old, own = source.module, _own(source)
    training = old.__dict__.get("_training_when_thawed", old.training)
    cls = final_class(source, new, restore=restore)
    if cls is source.origin and cls.__name__ in BUFFERS_ONLY:
        new = _buffers_only(cls, new)
    elif cls is not type(new):
        new.__class__ = cls
    if _has_act(source):
        new._modules["drop"] = old._modules.get("drop") or nn.Identity()
        new._modules["act"] = old._modules["act"]
    if source.origin is not None and isinstance(new, FlexNorm):
        new.__dict__["_origin"] = source.origin
    if source.template is not None and isinstance(new, FlexNorm):
        new.__dict__["_template"] = source.template
    if ndim is not None and isinstance(new, Norm) and len(new.spatial()) > 1:
        new.__dict__["_ndim"] = ndim
    # What somebody has added to this one module: attributes, buffers, parameters and submodules.
    for kind in ("__dict__", "_parameters", "_buffers", "_modules"):
        mine, theirs = getattr(new, kind), getattr(old, kind)
        mine.update({name: value for name, value in theirs.items() if name not in own and name not in mine})
    new._non_persistent_buffers_set.update(old._non_persistent_buffers_set & set(new._buffers))
    graft_hooks(old, new)
    new.training = training
    if source.frozen and isinstance(new._buffers.get("running_mean"), Tensor) and "weight" not in new._buffers:
        freeze_layer(new)
    return new


def graft_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let ``new`` take over all hooks of ``old``; handles that a user holds still remove them."""
    for name in _HOOKS:
        # The dictionaries themselves: handles refer to them.
        new.__dict__[name] = old.__dict__[name]
    for hook in new._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(new)  # type: ignore[attr-defined]


def _own(source: Source) -> set[str]:
    """Names of attributes and tensors that belong to the layer's kind, and were not added to it by somebody."""
    norm, features = source.norm, int(source.norm.num_features)  # type: ignore[arg-type]
    fresh = blank(norm.norm_name, source.ndim, features, source.config)
    annotated = {name for base in type(norm).__mro__ for name in inspect.get_annotations(base)}
    # Of a layer that was tried nobody knows what else belongs to its kind: all of it.
    tried = {*source.module.__dict__, *source.module._parameters, *source.module._buffers} if source.tried else set()
    return {*tried, *fresh.__dict__, *fresh._parameters, *fresh._buffers, *annotated, *_ALSO_OWN}


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
