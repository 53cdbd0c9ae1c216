"""Which layers to watch: by kind, by name, by pattern, or the modules themselves."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable

import torch
from torch import nn

from flexnorm._messages import unknown_name

Layer = str | re.Pattern[str] | nn.Module
Layers = Layer | Callable[[str, nn.Module], bool] | Iterable[Layer]


def unwrap(model: nn.Module) -> nn.Module:
    """The module of ``model`` that a user wrote, without the wrappers of torch.compile, data parallelism and Fabric.

    They share its parameters; hooks on it would be skipped by compiled code, so the side forward calls it directly.
    """
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif type(model).__name__ == "_FabricModule":
            model = model.module  # type: ignore[assignment]
        else:
            return model


def check_watchable(model: nn.Module) -> None:
    """Refuse a ``model`` whose modules cannot be called without a trace.

    Raises:
        ValueError: A lazy module has not seen its first input.
        TypeError: A module is scripted; its attributes are out of reach of Python.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"module {name!r} is scripted (torch.jit) and cannot be watched; watch the module it was made of"
            )
        if any(isinstance(parameter, nn.UninitializedParameter) for parameter in module.parameters(recurse=False)):
            raise ValueError(f"module {name!r} is lazy and has no parameters yet: call the model once, then watch it")


def select_layers(model: nn.Module, layers: Layers) -> dict[str, nn.Module]:
    """The layers that a specification names, in the order of ``model.named_modules()``.

    Args:
        model: The unwrapped model.
        layers: ``"norm"`` for all normalization layers and the markers of absent ones (a layer that is itself called
            ``norm`` is ``"re:norm"``); a layer's name; a glob pattern (``"layer?.*.bn*"``); a regular expression,
            compiled or as ``"re:..."``, matched against the full name; a module; a function of name and module; or a
            list of names, patterns and modules.

    Returns:
        Modules by name. A module reachable under several names has the first; the prefix ``_orig_mod.`` of compiled
        submodules is left out.

    Raises:
        ValueError: Nothing matches, or a module is not part of the model.
        TypeError: The specification is of another kind.
    """
    names = {
        name.replace("_orig_mod.", "").removesuffix("._orig_mod"): module for name, module in model.named_modules()
    }
    if isinstance(layers, (str, re.Pattern, nn.Module)) or not isinstance(layers, Iterable):
        chosen = _match(names, layers)
    else:
        chosen = set().union(*(_match(names, layer) for layer in layers))
        if not chosen:
            raise ValueError("layers is an empty list; name at least one layer")
    return {name: module for name, module in names.items() if name in chosen}


def _match(names: dict[str, nn.Module], layer: object) -> set[str]:
    if isinstance(layer, nn.Module):
        found = {name for name, module in names.items() if module is layer or module is unwrap(layer)}
        if not found:
            raise ValueError(f"the layer {type(layer).__name__} given in layers is not part of the model")
        return found
    if isinstance(layer, re.Pattern):
        return _some({name for name in names if layer.fullmatch(name)}, names, layer.pattern)
    if isinstance(layer, str):
        if layer == "norm":
            from flexnorm.nn import is_norm

            found = {name for name, module in names.items() if is_norm(module)}
            if not found:
                raise ValueError(
                    f"the model has no normalization layer among its {len(names)} modules; name the layers to watch by "
                    "a pattern (layers='*conv*') or by a list of names"
                )
            return found
        if layer in names and layer:
            return {layer}
        if layer.startswith("re:"):
            return _match(names, re.compile(layer[3:]))
        return _some({name for name in names if name and fnmatch.fnmatchcase(name, layer)}, names, layer)
    if callable(layer):
        return _some({name for name, module in names.items() if layer(name, module)}, names, repr(layer))
    raise TypeError(f"layers must hold names, patterns or modules, got {type(layer).__name__}")


def _some(found: set[str], names: dict[str, nn.Module], pattern: str) -> set[str]:
    if not found:
        raise ValueError(unknown_name("layer or pattern", pattern, [name for name in names if name]))
    return found
