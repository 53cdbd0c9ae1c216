"""The reports of surgery: what happens to each layer, and whether the model computes the same function afterwards.

That is measured on an example, in both modes, without a trace in the model.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from flexnorm.probe import call, isolated, map_tensors, tensors, unwrap

if TYPE_CHECKING:
    from rich.table import Table


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
        exact = copy.deepcopy(model).double()
        example = map_tensors(lambda t: t.double() if t.is_floating_point() else t, example_input)
        changed = change(copy.deepcopy(exact), example)
    except Exception:  # noqa: BLE001 - a model that does not run in float64 is judged by its own precision
        return found
    again = _difference(exact, changed, example, training=training)
    return found if again.error else replace(found, exact=again.maximum)


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


def first_three(texts: Sequence[str], function: str) -> str:
    """Some texts for a message, and which function tells the rest."""
    return "; ".join(texts[:3]) + (f"; and {len(texts) - 3} more, see {function}()" if len(texts) > 3 else "")


class _Named(Protocol):
    @property
    def names(self) -> tuple[str, ...]: ...


Row = TypeVar("Row", bound=_Named)


class Report(ABC, Generic[Row]):
    """A list of rows with a heading per column and lines of summary below; plain text, or a table where rich prints it.

    Attributes:
        rows: The rows, in the order of the model.
    """

    headings: tuple[str, ...] = ()

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, key: int | str) -> Row:
        """The row at a position, or of a layer's name."""
        if isinstance(key, int):
            return self.rows[key]
        for row in self.rows:
            if key in row.names:
                return row
        raise KeyError(key)

    @abstractmethod
    def cells(self, row: Row) -> tuple[str, ...]:
        """One text per heading."""

    @abstractmethod
    def summary(self) -> list[str]:
        """Lines below the table."""

    def __str__(self) -> str:
        table = [self.headings, *(self.cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(self.headings))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table]
        return "\n".join([*lines, "", *self.summary()])

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(*self.headings, caption="\n".join(self.summary()), caption_justify="left")
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in self.cells(row)))
        return table


@dataclass(frozen=True)
class ConversionRow:
    """What a conversion does with one normalization layer.

    Attributes:
        name: Name of the layer in the model (the first one, if it hangs in several places).
        names: All its names.
        source: What it is.
        target: What it becomes; empty if it stays.
        status: ``"convert"``, ``"keep"`` (it is already what was asked for) or ``"refuse"``.
        effect: ``"kept"``: the layer computes the same function; ``"kept in evaluation"``; or ``"changes"``. Judged by
            the kinds of layers; the report measures it if an example input was given.
        reason: Why the layer is kept or refused.
        notes: What else happens: what is dropped, what has to be done next.
    """

    name: str
    names: tuple[str, ...]
    source: str
    target: str = ""
    status: str = "convert"
    effect: str = "kept"
    reason: str = ""
    notes: tuple[str, ...] = ()


class ConversionPlan(Report[ConversionRow]):
    """What :func:`flexnorm.convert` would do; prints as a table.

    Attributes:
        rows: One :class:`ConversionRow` per normalization layer, in the order of the model.
        evaluation: Measured :class:`Difference` in evaluation mode, if an example input was given.
        training: The same in training mode.
    """

    headings = ("layer", "is", "becomes", "function", "remarks")

    def __init__(
        self, rows: Sequence[ConversionRow], evaluation: Difference | None = None, training: Difference | None = None
    ) -> None:
        super().__init__(rows)
        self.evaluation = evaluation
        self.training = training

    @property
    def preserved(self) -> bool | None:
        """Whether the measured function is preserved in evaluation and in training; ``None`` without an example."""
        if self.evaluation is None or self.training is None:
            return None
        return self.evaluation.preserved and self.training.preserved

    @property
    def converted(self) -> list[ConversionRow]:
        """Rows of the layers that are exchanged."""
        return [row for row in self.rows if row.status == "convert"]

    @property
    def refused(self) -> list[ConversionRow]:
        """Rows of the layers that cannot be exchanged."""
        return [row for row in self.rows if row.status == "refuse"]

    def cells(self, row: ConversionRow) -> tuple[str, ...]:
        """The row as texts."""
        also = (f"also {', '.join(row.names[1:])}",) if len(row.names) > 1 else ()
        remarks = "; ".join([*([row.reason] if row.reason else []), *row.notes, *also])
        target = row.target if row.status == "convert" else {"keep": "(stays)", "refuse": "(refused)"}[row.status]
        return (row.name or "(model)", row.source, target, row.effect if row.status == "convert" else "", remarks)

    def summary(self) -> list[str]:
        """Counts, and the measured difference."""
        kept = len(self.rows) - len(self.converted) - len(self.refused)
        lines = [f"{len(self.converted)} converted, {kept} kept, {len(self.refused)} refused"]
        if self.evaluation is not None:
            lines.append(f"function in evaluation: {self.evaluation}")
        if self.training is not None:
            lines.append(f"function in training: {self.training}")
        return lines
