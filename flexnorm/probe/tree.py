"""Where modules hang in a model: every slot of every module, and which of them a user means."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from torch import nn

from flexnorm._messages import unknown_name

__all__ = ["Place", "Selector", "find", "select"]

Selector: TypeAlias = (
    str | re.Pattern[str] | type[nn.Module] | nn.Module | Callable[[str, nn.Module], bool] | Iterable["Selector"]
)


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


def find(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[Place]:
    """All wanted modules, in the order of registration, each once; nothing inside them is looked at.

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


def select(places: list[Place], include: Selector | None, exclude: Selector | None) -> list[Place]:
    """The places that ``include`` names (all, if ``None``) and ``exclude`` does not.

    Raises:
        ValueError: A name or pattern fits none of the places.
        TypeError: A selector is of another kind.
    """
    chosen = places if include is None else _matching(places, include, "include")
    dropped = [] if exclude is None else _matching(places, exclude, "exclude")
    return [place for place in chosen if all(place is not other for other in dropped)]


def _matching(places: list[Place], selector: Selector, argument: str) -> list[Place]:
    if isinstance(selector, str):
        # A name stands for everything below it, too.
        found = [
            p for p in places if any(fnmatch.fnmatchcase(n, selector) or n.startswith(f"{selector}.") for n in p.names)
        ]
        if not found:
            raise ValueError(f"{argument}: " + unknown_name("layer", selector, [n for p in places for n in p.names]))
        return found
    if isinstance(selector, re.Pattern):
        found = [p for p in places if any(selector.fullmatch(n) for n in p.names)]
        if not found:
            raise ValueError(f"{argument}: no normalization layer's name matches the pattern {selector.pattern!r}")
        return found
    if isinstance(selector, type):
        return [p for p in places if isinstance(p.module, selector)]
    if isinstance(selector, nn.Module):
        found = [p for p in places if p.module is selector]
        if not found:
            raise ValueError(f"{argument}: the {type(selector).__name__} given is no normalization layer of the model")
        return found
    if callable(selector):
        return [p for p in places if any(selector(n, p.module) for n in p.names)]
    if isinstance(selector, Iterable):
        parts = [_matching(places, part, argument) for part in selector]
        return [p for p in places if any(p is q for part in parts for q in part)]
    raise TypeError(
        f"{argument} must be a name, a pattern, a class, a module, a function of (name, module), or a list of these; "
        f"got {type(selector).__name__}"
    )
