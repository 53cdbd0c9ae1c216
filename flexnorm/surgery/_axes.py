"""How many spatial axes the input of a layer has: seen in a forward pass, or read off its neighbours."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from flexnorm.probe import call, isolated, unwrap

__all__ = ["guess", "observe"]

_SPATIAL = re.compile(r"(Conv|ConvTranspose|Pool|Norm|Propagation).*([123])d$")


def observe(model: nn.Module, modules: Iterable[nn.Module], example_input: Any) -> dict[int, set[int]]:
    """Numbers of axes of the inputs that reach each module (by ``id``) in evaluation; the model is not changed."""
    seen: dict[int, set[int]] = {}

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            seen.setdefault(id(module), set()).add(inputs[0].dim())

    inner = unwrap(model)
    handles = [module.register_forward_pre_hook(look) for module in modules]
    try:
        with isolated(inner, 0):
            inner.eval()
            call(inner, example_input)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def guess(model: nn.Module) -> int | None:
    """The number of spatial axes on which all convolutions, poolings and normalizations of the model agree."""
    found = {
        int(match[2])
        for module in model.modules()
        if type(module).__module__.startswith(("torch.nn", "flexnorm"))
        if (match := _SPATIAL.match(type(module).__name__))
    }
    if not found and any(isinstance(module, nn.Linear) for module in model.modules()):
        return 1
    return found.pop() if len(found) == 1 else None
