"""Reports that print as tables: plain text by ``str``, a rich table where rich prints them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Report"]

Row = TypeVar("Row")


class Report(ABC, Generic[Row]):
    """A list of rows with a heading per column and lines of summary below.

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
            if key in self.names(row):
                return row
        raise KeyError(key)

    @abstractmethod
    def names(self, row: Row) -> list[str]:
        """All names under which the row can be looked up."""

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
