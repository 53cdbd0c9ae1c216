"""Where records go as soon as they are made: files readable while the run is live, TensorBoard, any function."""

from __future__ import annotations

import csv
import json
import math
import os
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TextIO, runtime_checkable

from flexnorm._messages import optional
from flexnorm.shift.records import Record


@runtime_checkable
class Sink(Protocol):
    """What a monitor asks of a place for its records; a class derived from it needs ``write`` alone."""

    @abstractmethod
    def write(self, record: Record) -> None:
        """Take one record; it is visible to readers when this returns."""

    def rewind(self, step: int) -> None:  # noqa: ARG002
        """Forget the records of steps after ``step``, which a resumed run will make again; by default nothing."""
        return

    def close(self) -> None:
        """Release what the sink holds open; by default nothing."""
        return


class _FileSink(Sink):
    """A text file with a line for each record; it is open only while a line is written, so readers see whole lines."""

    _header = 0

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def _open(self) -> TextIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.path.open("a", newline="", encoding="utf-8")

    @abstractmethod
    def _step(self, line: str, header: list[str]) -> float:
        """The step of a line that ends; infinite for one that was torn before."""

    def rewind(self, step: int) -> None:
        """Keep the header and the complete lines up to ``step``."""
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        head, rest = lines[: self._header], lines[self._header :]
        part = self.path.with_name(self.path.name + ".part")
        kept = [line for line in rest if line.endswith("\n") and self._step(line, head) <= step]
        part.write_text("".join(head + kept), encoding="utf-8", newline="")
        part.replace(self.path)


class CSVSink(_FileSink):
    """Appends each record as a row of a CSV file; the first row names the columns.

    Args:
        path: The file; its folder is made where missing. An existing file is continued.
    """

    _header = 1

    def write(self, record: Record) -> None:
        """Append a row, and the header to an empty file."""
        row = record.asdict()
        with self._open() as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)

    def _step(self, line: str, header: list[str]) -> float:
        return int(line.split(",", 1)[0]) if line.count(",") >= header[0].count(",") else math.inf


class JSONLSink(_FileSink):
    """Appends each record as a line of JSON; numbers that are not finite become ``null``.

    Args:
        path: The file; its folder is made where missing. An existing file is continued.
    """

    def write(self, record: Record) -> None:
        """Append a line."""
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.asdict().items()}
        with self._open() as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def _step(self, line: str, header: list[str]) -> float:  # noqa: ARG002
        return int(json.loads(line)["step"])


class MemorySink(Sink):
    """Keeps the records in a list.

    Attributes:
        records: The records so far.
    """

    def __init__(self) -> None:
        self.records: list[Record] = []

    def write(self, record: Record) -> None:
        """Append to the list."""
        self.records.append(record)

    def rewind(self, step: int) -> None:
        """Drop the records of later steps."""
        self.records = [record for record in self.records if record.step <= step]


class TensorBoardSink(Sink):
    """Writes each number of a record as a scalar ``shift/LAYER/NAME``; of two values of one step it shows the later.

    Args:
        target: A folder for event files (needs ``pip install 'flexnorm[tensorboard]'``), or a ``SummaryWriter`` that
            already exists.
        names: Which numbers to write; ``None`` for all.
    """

    def __init__(self, target: Any, names: tuple[str, ...] | None = None) -> None:
        self.names = names
        self._own = isinstance(target, (str, os.PathLike))
        if self._own:
            optional("tensorboard", "TensorBoardSink", "tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            target = SummaryWriter(str(target))
        self._writer: Any = target

    def write(self, record: Record) -> None:
        """Add the scalars at the step of the record."""
        for name, value in record.asdict().items():
            if isinstance(value, float) and (self.names is None or name in self.names):
                self._writer.add_scalar(f"shift/{record.layer}/{name}", value, record.step)
        self._writer.flush()

    def close(self) -> None:
        """Close the writer if this sink made it."""
        if self._own:
            self._writer.close()


class FunctionSink(Sink):
    """Hands each record to a function; what that did cannot be taken back.

    Args:
        function: Called with each record.
    """

    def __init__(self, function: Callable[[Record], Any]) -> None:
        self._function = function

    def write(self, record: Record) -> None:
        """Call the function."""
        self._function(record)


def as_sink(target: Any) -> Sink:
    """A sink from a path ending in ``.csv`` or ``.jsonl`` (else ValueError), a sink, or a function of a record."""
    if isinstance(target, (str, os.PathLike)):
        ending = Path(target).suffix
        if ending not in (".csv", ".jsonl"):
            raise ValueError(f"a sink's path must end in .csv or .jsonl, got {os.fspath(target)!r}")
        return CSVSink(target) if ending == ".csv" else JSONLSink(target)
    if isinstance(target, Sink):
        return target
    if callable(target):
        return FunctionSink(target)
    raise TypeError(f"a sink must be a path, a sink or a function, got {type(target).__name__}")
