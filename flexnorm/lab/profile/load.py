"""A model from what a person writes: a name of this package, ``timm:NAME`` or ``package.module:factory``."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import pickle
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexnorm._messages import optional, unknown_name
from flexnorm.lab import models

_WRAPPERS = ("state_dict", "model_state_dict", "model", "weights")
_PREFIXES = ("module.", "_orig_mod.", "model.", "_forward_module.")


def load_model(
    spec: str,
    *,
    norm: str | None = None,
    in_channels: int = 3,
    num_classes: int = 10,
    checkpoint: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Build a model from a specification, and load its weights.

    Args:
        spec: One of

            * a network of this package (:data:`flexnorm.lab.models.MODELS`), built with ``norm``;
            * ``"timm:NAME"``: a model of timm with random weights (needs ``flexnorm[timm]``);
            * ``"package.module:factory"``: a function or class that returns a module, looked for in the working
              directory too. Of ``in_channels`` (or ``in_chans``), ``num_classes`` and ``norm`` it gets those that its
              signature names.
        norm: Normalization, for what takes one; by default ``"batch"``.
        in_channels: Channels of the images.
        num_classes: Number of outputs.
        checkpoint: File of weights: ``.safetensors``, or anything that ``torch.load(weights_only=True)`` reads. A
            state dictionary may lie under ``"state_dict"``, ``"model_state_dict"``, ``"model"`` or ``"weights"``, and
            its names may begin with ``"module."``, ``"model."``, ``"_forward_module."`` or ``"_orig_mod."``.

    Raises:
        ValueError: An unknown name, a factory that does not return a module, ``norm`` for a model that takes none, or a
            checkpoint that does not fit or is not safe to read.
        ImportError: A package is not installed, or a module cannot be imported.
        FileNotFoundError: There is no checkpoint at the path.

    Examples:
        >>> type(load_model("convnet", norm="unitized", in_channels=1)).__name__
        'Sequential'
    """
    source, colon, name = spec.partition(":")
    if not colon:
        if spec not in models.MODELS:
            raise ValueError(
                f"{unknown_name('model', spec, models.MODELS)}; or give timm:NAME or package.module:factory"
            )
        model = models.build(spec, norm or "batch", in_channels, num_classes)
    elif source == "timm":
        model = _timm(name, norm, in_channels, num_classes)
    else:
        wanted = {"in_channels": in_channels, "in_chans": in_channels, "num_classes": num_classes}
        model = _factory(source, name, wanted, norm)
    if checkpoint is not None:
        load_weights(model, Path(checkpoint).expanduser())
    return model


def _timm(name: str, norm: str | None, in_channels: int, num_classes: int) -> nn.Module:
    if norm is not None:
        raise ValueError(
            f"norm={norm!r} is for networks of this package; a timm model has its own (flexnorm.convert changes it)"
        )
    timm = optional("timm", f"timm:{name}", "timm")
    if not timm.is_model(name):
        # A handful of names, for timm has more than a thousand.
        known = timm.list_models()
        raise ValueError(unknown_name("timm model", name, difflib.get_close_matches(name, known, 8, 0.3) or known[:8]))
    model: nn.Module = timm.create_model(name, pretrained=False, in_chans=in_channels, num_classes=num_classes)
    return model


def _factory(module: str, name: str, wanted: Mapping[str, Any], norm: str | None) -> nn.Module:
    if not name or not module:
        raise ValueError(f"model must be a name, timm:NAME or package.module:factory, not {module + ':' + name!r}")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"cannot import {module} ({error}); it is looked for in {here} and among the installed"
        ) from error
    except Exception as error:
        raise ImportError(f"importing {module} raises {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)
    for part in name.split("."):
        if not hasattr(found, part):
            public = [key for key in vars(found) if not key.startswith("_")]
            raise ValueError(f"{module}: {unknown_name('factory', name, public)}")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise ValueError(f"{module}:{name} is {type(found).__name__}, neither a module nor a function that makes one")
    parameters = inspect.signature(found).parameters
    given = {key: value for key, value in wanted.items() if key in parameters}
    if norm is not None:
        if "norm" not in parameters:
            raise ValueError(f"norm={norm!r} is given, but {module}:{name} takes no argument named norm")
        given["norm"] = norm
    try:
        model = found(**given)
    except Exception as error:
        # Whatever code that is not ours raises.
        raise ValueError(
            f"{module}:{name} called with {', '.join(f'{k}={v!r}' for k, v in given.items()) or 'no argument'} raises "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{module}:{name} returned {type(model).__name__}, not a torch module")
    return model


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a file of weights into a model, changed in place; see :func:`load_model`."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    state = _read(path)
    if isinstance(state, Mapping):
        state = next((state[key] for key in _WRAPPERS if isinstance(state.get(key), Mapping)), state)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dictionary (tensors by name)")
    own = model.state_dict()
    state = _renamed(dict(state), set(own))
    shapes = [
        f"{name} is {tuple(state[name].shape)} there and {tuple(own[name].shape)} here"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    faults = ((sorted({*own} - {*state}), "lacks {}"), (sorted({*state} - {*own}), "has {} too much"), (shapes, "{}"))
    complaints = [words.format(_some(found)) for found, words in faults if found]
    if complaints:
        raise ValueError(f"{path} does not fit the model: it {'; '.join(complaints)}. Are model and norm the same?")
    model.load_state_dict(state)


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        library = optional("safetensors.torch", str(path), "lab")
        try:
            return library.load_file(path)
        except optional("safetensors", str(path), "lab").SafetensorError as error:
            raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
    try:
        with warnings.catch_warnings():
            # What follows from an unusual pickle protocol is said below.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, numbers and strings, or is damaged. It was not loaded, since that "
            f"could run code of its author; save model.state_dict() alone, or a .safetensors file"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is damaged, or no checkpoint of torch: {error}") from error


def _renamed(state: dict[str, Tensor], own: set[str]) -> dict[str, Tensor]:
    """Without the prefixes of wrappers that all names share, as far as that makes more names fit."""
    best, current = state, state
    while prefix := next((p for p in _PREFIXES if current and all(name.startswith(p) for name in current)), None):
        current = {name.removeprefix(prefix): value for name, value in current.items()}
        if len(own & set(current)) > len(own & set(best)):
            best = current
    return best


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
