"""Which layers, or parameters, of a model a user means: one language, for every option that chooses some."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from flexnorm._messages import unknown_name
from flexnorm.probe.recognition import normalizes

Selection: TypeAlias = (
    str | re.Pattern[str] | type[nn.Module] | nn.Module | Callable[[str, nn.Module], bool] | Iterable["Selection"]
)
"""What chooses layers, as :func:`select` says: a name, a pattern, a class, a module, a function, or a list of these."""


@dataclass
class Place:
    """One module and all the slots that hold it (several where it is shared).

    Attributes:
        module: The module.
        slots: (parent, key, full name) of each slot; the parent of the model itself is ``None``.
    """

    module: nn.Module
    slots: list[tuple[nn.Module | None, str, str]]

    @property
    def name(self) -> str:
        """Full name of the first slot; empty for the model itself."""
        return self.slots[0][2]

    @property
    def names(self) -> list[str]:
        """Full names of all slots."""
        return [name for _, _, name in self.slots]

    def put(self, module: nn.Module) -> None:
        """Hang ``module`` into every slot. The model itself has no slot to hang something into."""
        for parent, key, _ in self.slots:
            if parent is not None:
                parent._modules[key] = module


def find_places(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[Place]:
    """All ``wanted`` modules of ``model``, in the order of registration, each once; nothing inside them is looked at.

    Unlike ``named_modules``, this sees every slot of a shared module, so that none of them keeps the old one.
    """
    places: dict[int, Place] = {}
    visited: set[int] = set()

    def visit(module: nn.Module, parent: nn.Module | None, key: str, name: str) -> None:
        if wanted(module):
            places.setdefault(id(module), Place(module, [])).slots.append((parent, key, name))
            return
        if id(module) in visited:
            return
        visited.add(id(module))
        for child_key, child in module._modules.items():
            if child is not None:
                visit(child, module, child_key, f"{name}.{child_key}" if name else child_key)

    visit(model, None, "", "")
    return list(places.values())


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


def select(
    candidates: Mapping[str, nn.Module],
    selection: Selection,
    argument: str = "layers",
    *,
    kind: str = "layer",
    below: bool = False,
    required: bool = False,
) -> dict[str, nn.Module]:
    r"""The candidates that a selection means.

    A selection is one of these, or a list of them:

    * a full name (``"layer1.0.bn1"``); where no candidate has it, all candidates below the module of that name;
    * ``"norm"``: all normalization layers, whatever their class (:func:`flexnorm.probe.normalizes`); a candidate that
      is itself called ``norm`` is ``"re:norm"`` (but where only normalization layers are candidates, the name goes
      first);
    * a glob pattern (``"layer?.*.bn*"``), or a regular expression, compiled or as ``"re:..."``, for the whole name;
    * a class of modules, which may fit nothing;
    * a module; where it is no candidate, all candidates inside it;
    * a function ``(name, module) -> bool``, which may fit nothing.

    Args:
        candidates: What can be chosen, by full name.
        selection: See above. Names hold for compiled submodules with or without their ``_orig_mod.``.
        argument: The option's name, for messages.
        kind: What a candidate is called in messages.
        below: Whether a module stands for all candidates inside it even if it is one itself.
        required: Whether at least one must be chosen.

    Returns:
        The chosen candidates, in their order.

    Raises:
        ValueError: A name, a pattern, a module or ``"norm"`` fits nothing, or anything does where ``required``; or a
            regular expression is none.
        TypeError: The selection is of another kind.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Sequential(nn.ReLU()))
        >>> list(select(dict(model.named_modules()), ["norm", "re:2.*"]))
        ['1', '2', '2.0']
    """

    def named_like(fits: Callable[[str], object]) -> set[str]:
        return {name for name in candidates if fits(name) or fits(_plain(name))}

    def where(fits: Callable[[str, nn.Module], object]) -> set[str]:
        return {name for name, module in candidates.items() if fits(name, module)}

    def by_name(text: str) -> set[str]:
        norms = where(lambda _, module: normalizes(module)) if text == "norm" else set()
        if 0 < len(norms) < len(candidates):
            return norms
        if found := text and named_like(lambda name: name == text):
            return set(found)
        if text.startswith("re:"):
            try:
                return named_like(re.compile(text[3:]).fullmatch) or unknown(text)
            except re.error as error:
                raise ValueError(f"{argument}: {text!r} is not a regular expression: {error}") from None
        # A pattern of everything does not mean the model around its layers.
        found = named_like(
            lambda name: (
                ((name or len(candidates) == 1) and fnmatch.fnmatchcase(name, text)) or name.startswith(f"{text}.")
            )
        )
        if not (found := found or norms) and text == "norm":
            wanted = f"{kind} of a normalization layer" if below else "normalization layer"
            raise ValueError(
                f"{argument}: there is no {wanted} among the {len(candidates)} {kind}s that can be chosen; choose by a "
                f"pattern ({argument}='*conv*') or by a list of names"
            )
        return found or unknown(text)

    def unknown(meant: object) -> set[str]:
        raise ValueError(f"{argument}: {unknown_name(f'{kind} or pattern', meant, filter(None, candidates))}")

    def chosen(part: object) -> set[str]:
        if isinstance(part, str):
            return by_name(part)
        if isinstance(part, re.Pattern):
            return named_like(part.fullmatch) or unknown(part.pattern)
        if isinstance(part, type):
            return where(lambda _, module: isinstance(module, part))
        if isinstance(part, nn.Module):
            found = set() if below else where(lambda _, module: module in (part, unwrap(part)))
            inside = set(part.modules())
            if not (found or (found := where(lambda _, module: module in inside))):
                raise ValueError(
                    f"{argument}: the {type(part).__name__} given is not part of the model, or holds no {kind} that "
                    "could be chosen"
                )
            return found
        if callable(part):
            return where(part)
        if isinstance(part, Iterable):
            return set().union(*map(chosen, part))
        raise TypeError(
            f"{argument} must be or hold names, patterns or modules, or classes or functions of (name, module); got "
            f"{type(part).__name__}"
        )

    found = chosen(selection)
    if required and not found:
        if isinstance(selection, Sized) and not len(selection):
            raise ValueError(f"{argument} is an empty list; name at least one {kind}")
        unknown(selection)
    return {name: module for name, module in candidates.items() if name in found}


def select_places(places: list[Place], include: Selection | None, exclude: Selection | None) -> list[Place]:
    """Those of ``places`` that ``include`` names (all, if ``None``) and ``exclude`` does not; errors as of `select`."""
    candidates = {name: place.module for place in places for name in place.names}
    wanted = candidates if include is None else select(candidates, include, "include")
    dropped = {} if exclude is None else select(candidates, exclude, "exclude")
    return [p for p in places if any(n in wanted for n in p.names) and not any(n in dropped for n in p.names)]


def select_layers(model: nn.Module, layers: Selection) -> dict[str, nn.Module]:
    """Those of all modules of a model that a selection means, in the order of ``model.named_modules()``.

    Args:
        model: The unwrapped model.
        layers: As for :func:`select`; ``"norm"`` is always all normalization layers and markers of absent ones.

    Returns:
        Modules by name. A module reachable under several names has the first; the prefix ``_orig_mod.`` of compiled
        submodules is left out.

    Raises:
        ValueError, TypeError: As of :func:`select`; and nothing matches.
    """
    candidates = {_plain(name): module for name, module in model.named_modules()}
    return select(candidates, layers, required=True)


def select_parameters(
    model: nn.Module, names: Iterable[str], selection: Selection, argument: str, **options: Any
) -> list[str]:
    """Those of some parameters of a model that a selection means, by their own names or by the modules that hold them.

    Args:
        model: The model.
        names: Full names of the parameters that can be chosen.
        selection: As for :func:`select`; a module, or the name of one, stands for all parameters inside it, and a
            function gets a parameter's name and the module that holds it.
        argument: The option's name, for messages.
        **options: ``kind`` and ``required``, as for :func:`select`; a parameter is called one by default.

    Returns:
        Their names, in the order given.

    Raises:
        ValueError, TypeError: As of :func:`select`.
    """
    holders = {name: model.get_submodule(_holder(name)) for name in names}
    return list(select(holders, selection, argument, below=True, **{"kind": "parameter", **options}))


def _holder(parameter: str) -> str:
    """Name of the module that holds a parameter; of a parametrized one, the module that it parametrizes."""
    before, found, _ = f".{parameter}".partition(".parametrizations.")
    return (before if found else before.rpartition(".")[0]).lstrip(".")


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")
