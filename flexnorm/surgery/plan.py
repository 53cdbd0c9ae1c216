"""The report of a conversion: what happens to each normalization layer, where, and why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexnorm.surgery._compare import Difference
from flexnorm.surgery._report import Report

__all__ = ["ConversionPlan", "ConversionRow"]


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
        self,
        rows: Sequence[ConversionRow],
        evaluation: Difference | None = None,
        training: Difference | None = None,
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

    def names(self, row: ConversionRow) -> list[str]:
        """All names of the layer."""
        return list(row.names)

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
