"""What models take and return, however it is packed: tuples, lists, mappings, dataclasses, anything torch can open."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


def tensors(nested: Any) -> list[Tensor]:
    """All tensors inside ``nested`` tuples, lists, mappings, dataclasses and types registered with torch's pytree."""
    if isinstance(nested, Tensor):
        return [nested]
    found: list[Tensor] = []
    for leaf in tree_leaves(nested):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif (inside := _contents(leaf)) is not None:
            found += tensors(inside)
    return found


def first_tensor(nested: Any) -> Tensor | None:
    """The first floating-point tensor inside ``nested``, as :func:`tensors` finds it; ``None`` if there is none."""
    return next((tensor for tensor in tensors(nested) if tensor.is_floating_point()), None)


def map_tensors(function: Callable[[Tensor], Any], nested: Any, *, plain: bool = False) -> Any:
    """The same nesting with another value for every tensor.

    Args:
        function: From a tensor to what takes its place.
        nested: As for :func:`tensors`. It is not changed.
        plain: Whether containers become plain tuples, lists and dictionaries, which ``torch.load`` reads with
            ``weights_only=True``. Otherwise they keep their types, but for mappings that torch's pytree does not know:
            they become dictionaries.
    """

    def mapped(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        inside = _contents(leaf)
        if inside is None:
            return leaf
        inside = map_tensors(function, inside, plain=plain)
        if isinstance(leaf, Mapping):
            return inside
        if isinstance(inside, dict):
            changed = copy.copy(leaf)
            for name, value in inside.items():
                object.__setattr__(changed, name, value)
            return changed
        return inside if plain else type(leaf)(inside)

    def unlike(value: Any) -> bool:
        return type(value) not in (tuple, list, dict) and _contents(value) is not None

    return tree_map(mapped, nested, is_leaf=unlike if plain else None)


def detached(nested: Any) -> Any:
    """A copy of ``nested`` whose tensors later changes of the original do not reach, and without gradients."""
    return map_tensors(lambda tensor: tensor.detach().clone(), nested)


def arguments(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with: a mapping ``example_input`` by keywords, a tuple or list by position, else alone."""
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    return (tuple(example_input), {}) if isinstance(example_input, (tuple, list)) else ((example_input,), {})


def call(model: nn.Module, example_input: Any) -> Any:
    """Call a ``model`` with an ``example_input`` as :func:`arguments` reads it."""
    args, kwargs = arguments(example_input)
    return model(*args, **kwargs)


def batch_inputs(batch: Any) -> Any:
    """What a model takes of a ``batch`` of a data loader: the first of a tuple or list (targets follow), else all."""
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def _contents(value: Any) -> dict[Any, Any] | list[Any] | tuple[Any, ...] | None:
    """What a container holds that pytree took for a leaf: by plain means, or ``None`` for what is no container."""
    if isinstance(value, Mapping):
        return dict(value.items())
    if isinstance(value, (tuple, list)):
        return tuple(value) if isinstance(value, tuple) else list(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: getattr(value, entry.name) for entry in fields(value)}
    return None
