"""What counts in a layer's activation where batches hold padding: a mask found in the batch, fitted to the layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from flexnorm.probe.select import select

Source: TypeAlias = str | Tensor | Callable[[Any], Tensor | None] | None
"""Where a mask is: a name of the batch's entries (or attributes), a function of the batch, a tensor; ``None``: none."""

Mask: TypeAlias = Source | Mapping[Any, Source]
"""A source for all layers, or sources by layers (names, patterns, classes: see :func:`select`)."""


class Masks:
    """The masks of some layers.

    Args:
        layers: The layers, by name.
        mask: Where the mask is: the name of an entry of the batch (``"attention_mask"``: of a mapping, the first
            element of a tuple or list if that is one, or an attribute of another object), a function of the batch that
            returns the mask or ``None``, or a tensor. Or a mapping from layers, in the language of :func:`select`, to
            these; layers that it does not name, or maps to ``None``, count every value.

    Raises:
        ValueError: If a key of the mapping fits no layer.
        TypeError: If ``mask`` is of another kind.

    Examples:
        >>> layers = {"encoder.norm": nn.LayerNorm(4), "head.norm": nn.BatchNorm1d(4)}
        >>> masks = Masks(layers, {"encoder.*": "attention_mask"})
        >>> import torch
        >>> batch = {"x": torch.zeros(2, 3, 4), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
        >>> masks.of("encoder.norm", batch, (2, 3)).shape
        torch.Size([2, 3])
        >>> masks.of("head.norm", batch, (2,)) is None
        True
    """

    def __init__(self, layers: Mapping[str, nn.Module], mask: Mask) -> None:
        by_layer = mask if isinstance(mask, Mapping) else None
        for source in [mask] if by_layer is None else by_layer.values():
            if not (source is None or isinstance(source, (str, Tensor)) or callable(source)):
                raise TypeError(
                    "mask must be the name of an entry of the batch, a function of the batch, a tensor, or a mapping "
                    f"from layers to these; got {type(source).__name__}"
                )
        self._sources: dict[str, Any] = {}
        if by_layer is None:
            self._sources = dict.fromkeys(layers, mask)
        else:
            for key, source in by_layer.items():
                self._sources.update(dict.fromkeys(select(layers, key, "mask"), source))

    def of(self, name: str, batch: Any, shape: Sequence[int]) -> Tensor | None:
        """Return the mask of a layer for a batch, ``None`` where all counts.

        Args:
            name: Name of the layer.
            batch: The batch.
            shape: Shape of the layer's activation without the channels. The mask has this shape; or it is flattened to
                it, (B, T) for rows (B T,); or it has further axes behind, over which a position counts if any does:
                (B, T) for what is pooled to (B,).

        Raises:
            ValueError: If the batch has no such entry, or the mask does not fit.
            TypeError: If what is found is no tensor.
        """
        source = self._sources.get(name.split("#")[0])
        mask = _found(source, batch)
        if mask is None:
            return None
        if not isinstance(mask, Tensor):
            raise TypeError(f"the mask of {name} must be a tensor, got {type(mask).__name__}")
        shape = tuple(shape)
        if mask.shape == shape:
            return mask
        if len(shape) == 1 and mask.numel() == math.prod(shape):
            return mask.flatten()
        if mask.shape[: len(shape)] == shape:
            return (mask > 0).flatten(len(shape)).any(-1)
        raise ValueError(
            f"the mask of shape {tuple(mask.shape)} does not fit {name}, whose activation has shape {shape} without "
            f"its channels; give each layer its own, as mask={{{name!r}: ...}}, None for one that counts every value"
        )


def _found(source: Any, batch: Any) -> Any:
    if source is None or isinstance(source, Tensor):
        return source
    if not isinstance(source, str):
        return source(batch)
    for holder in (batch, batch[0] if isinstance(batch, (tuple, list)) and batch else None):
        if isinstance(holder, Mapping) and source in holder:
            return holder[source]
        if not isinstance(holder, Tensor) and hasattr(holder, source):
            return getattr(holder, source)
    has = f" with the entries {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
    raise ValueError(f"the batch, a {type(batch).__name__}{has}, has no {source!r}; pass mask= a function of the batch")
