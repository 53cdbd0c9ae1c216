"""The reports of surgery: what happens to each normalization layer, where, and why not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from flexnorm.surgery._compare import Difference

if TYPE_CHECKING:
    from rich.table import Table


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
