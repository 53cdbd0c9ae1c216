"""Do two models compute the same function? Measured on an example, in both modes, without a trace in either."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.shift._isolate import isolated
from evenkeel.shift._probe import call
from evenkeel.shift._select import unwrap

__all__ = ["Difference", "difference", "outputs"]

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Difference:
    """How far two models are apart on an example.

    Attributes:
        maximum: Largest absolute difference of an output value; infinity if the outputs cannot be compared.
        scale: Largest absolute output value of the first model.
        error: Why there is no number, else empty.
    """

    maximum: float
    scale: float
    error: str = ""

    @property
    def preserved(self) -> bool:
        """Whether the difference is rounding: at most 1e-4 of the largest output."""
        return not self.error and self.maximum <= TOLERANCE * max(self.scale, 1e-30)

    def __str__(self) -> str:
        if self.error:
            return self.error
        verdict = "preserved" if self.preserved else "NOT preserved"
        return f"{verdict} (max difference {self.maximum:.2e}, largest output {self.scale:.2e})"


def difference(model: nn.Module, other: nn.Module, example_input: Any, *, training: bool) -> Difference:
    """Compare two models on an example, with the same random numbers, in training or in evaluation mode."""
    try:
        wanted = outputs(model, example_input, training=training)
    except Exception as error:  # noqa: BLE001 - whatever the model raises is the finding
        return Difference(float("inf"), 0.0, f"the model itself failed: {_first_line(error)}")
    try:
        got = outputs(other, example_input, training=training)
    except Exception as error:  # noqa: BLE001
        return Difference(float("inf"), 0.0, f"the changed model failed: {_first_line(error)}")
    if [t.shape for t in wanted] != [t.shape for t in got]:
        return Difference(float("inf"), 0.0, "the outputs have other shapes")
    if not wanted:
        return Difference(float("inf"), 0.0, "the model returns no tensor")
    gaps, sizes = [0.0], [0.0]
    for first, second in zip(wanted, got, strict=True):
        if first.numel():
            a, b = first.double(), second.double()
            # Equal infinities, and NaN in the same places, are no difference.
            gap = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
            gaps.append(float(gap.nan_to_num(nan=float("inf")).max()))
            sizes.append(float(a.nan_to_num(0.0, 0.0, 0.0).abs().max()))
    return Difference(max(gaps), max(sizes))


def outputs(model: nn.Module, example_input: Any, *, training: bool) -> list[Tensor]:
    """All tensors that the model returns for the example; the model is not changed."""
    inner = unwrap(model)
    with isolated(inner, 0):
        inner.train(training)
        return [t.detach().clone() for t in tensors(call(inner, example_input))]


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor inside nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif is_dataclass(value):
        for entry in fields(value):
            yield from tensors(getattr(value, entry.name))


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
