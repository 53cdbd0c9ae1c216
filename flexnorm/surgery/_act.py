"""Normalization with an activation inside, as timm has it: any layer plus its ``drop`` and ``act``, names kept.

Such a layer cannot become a sequence of two modules, because the names of its parameters would change. So a subclass is
made that appends the two to the forward of the layer; it pickles and deep-copies by its plain base.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class ThenAct:
    """Mixin: ``act(drop(normalize(x)))``, with both as submodules. Made by :func:`with_act`."""

    drop: nn.Module
    act: nn.Module
    plain: type[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x``, then apply ``drop`` and ``act``."""
        y: Tensor = self.act(self.drop(super().forward(x)))  # type: ignore[misc]
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
