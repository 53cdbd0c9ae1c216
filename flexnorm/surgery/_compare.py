"""Do two models compute the same function? Measured on an example, in both modes, without a trace in either."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flexnorm.probe import call, isolated, map_tensors, tensors, unwrap

TOLERANCE, EXACT = 1e-4, 1e-9  # in the model's own precision, in float64


@dataclass(frozen=True)
class Difference:
    """How far two models are apart on an example.

    Attributes:
        maximum: Largest absolute difference of an output value; infinity if the outputs cannot be compared.
        scale: Largest absolute output value of the first model.
        error: Why there is no number, else empty.
        exact: The same difference in float64, measured only where that in the model's own precision is larger than
            1e-4 of the largest output: deep networks can amplify the rounding of float32 that far.
    """

    maximum: float
    scale: float
    error: str = ""
    exact: float | None = None

    @property
    def preserved(self) -> bool:
        """Whether the difference is rounding: at most 1e-4 of the largest output, or 1e-9 of it in float64."""
        if self.error:
            return False
        scale = max(self.scale, 1e-30)
        return self.maximum <= TOLERANCE * scale or (self.exact is not None and self.exact <= EXACT * scale)

    def __str__(self) -> str:
        if self.error:
            return self.error
        verdict = "preserved" if self.preserved else "NOT preserved"
        exact = "" if self.exact is None else f"; in float64 {self.exact:.2e}"
        return f"{verdict} (max difference {self.maximum:.2e}, largest output {self.scale:.2e}{exact})"


Change = Callable[[nn.Module, Any], nn.Module]
"""Makes the changed model out of a copy of the model, given the example."""


def difference(model: nn.Module, other: nn.Module, example_input: Any, change: Change, *, training: bool) -> Difference:
    """Compare a model as it was and as it is on an example, with the same random numbers, in one mode.

    ``change`` repeats the change in float64, to see whether a difference is rounding.
    """
    found = _difference(model, other, example_input, training=training)
    if found.preserved or found.error:
        return found
    try:
        exact, example = copy.deepcopy(model).double(), _double(example_input)
        changed = change(copy.deepcopy(exact), example)
    except Exception:  # noqa: BLE001 - a model that does not run in float64 is judged by its own precision
        return found
    again = _difference(exact, changed, example, training=training)
    return found if again.error else replace(found, exact=again.maximum)


def _double(value: Any) -> Any:
    return map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, value)


def _difference(model: nn.Module, other: nn.Module, example_input: Any, *, training: bool) -> Difference:
    found = []
    for which, label in ((model, "the model itself"), (other, "the changed model")):
        try:
            found.append(outputs(which, example_input, training=training))
        except Exception as error:  # noqa: BLE001 - whatever the model raises is the finding
            first_line = (str(error).strip().splitlines() or [""])[0]
            return Difference(float("inf"), 0.0, f"{label} failed: {type(error).__name__}: {first_line}")
    wanted, got = found
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
