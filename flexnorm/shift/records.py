"""One measurement as a record, the function that makes it from two clouds of points, and where records go.

Sinks get them as soon as they are made: files readable while the run is live, TensorBoard, any function.
"""

from __future__ import annotations

import csv
import json
import math
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, Self, TextIO, runtime_checkable

import torch
from torch import Tensor

from flexnorm._messages import optional
from flexnorm.transport import safe_norm, shift_bounds, wasserstein

FAST_BOUNDS = ("mean", "marginal", "max_sliced", "radial", "coupled", "triangle")
"""The bounds that a monitor evaluates: cheap beside the exact distance at its sample sizes."""

_COLUMNS = {"anchor": "reference", "anchor_step": "reference_step"}


@dataclass(frozen=True)
class Record:
    """What every record of a monitor says: where it was made, of which layer or weight, and measured from where.

    Attributes:
        step: Optimizer steps done when the record was made.
        layer: Name of the layer or weight.
        anchor: What the shift is measured from: ``"previous"`` (``lag`` steps earlier) or ``"initial"`` (the first step
            that the monitor saw).
        anchor_step: Optimizer steps done when the anchor was taken.
    """

    step: int
    layer: str
    anchor: str
    anchor_step: int

    def asdict(self) -> dict[str, Any]:
        """All numbers in one flat dictionary, metrics last; the anchor is called ``reference``, as in every file."""
        values = {_COLUMNS.get(f.name, f.name): getattr(self, f.name) for f in fields(self)}
        return values | dict(values.pop("metrics", {}))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`asdict`."""
        names = {_COLUMNS.get(f.name, f.name): f.name for f in fields(cls)}
        own: dict[str, Any] = {names[name]: value for name, value in values.items() if name in names}
        metrics = {name: value for name, value in values.items() if name not in names}
        return cls(**(own | {"metrics": metrics} if metrics else own))


@dataclass(frozen=True)
class Shift:
    """How far one distribution moved, in the units of the activations and relative to its own spread.

    Attributes:
        lower: Certified lower bound of ``w1``.
        w1: Wasserstein-1 distance of the two sets of points, exact.
        upper: Certified upper bound of ``w1``.
        spread: Mean Euclidean distance of the points before to their mean, E||X - EX||: what ``w1`` is measured
            against, so that a layer does not look steady by shrinking its output.
        relative_lower: ``lower / spread``.
        relative: ``w1 / spread``. With a spread of 0: 0 where nothing moved, else infinite.
        relative_upper: ``upper / spread``.
    """

    lower: float
    w1: float
    upper: float
    spread: float
    relative_lower: float
    relative: float
    relative_upper: float


def measure_shift(before: Tensor, after: Tensor, *, include: Iterable[str] | None = FAST_BOUNDS) -> Shift:
    """Wasserstein-1 distance between two sets of points, its certified interval, and both relative to the spread.

    Rows that come from the same input in both give a close upper bound, and keep the bias of empirical
    transport in high dimension out: two independent draws from one 64-dimensional Gaussian are about 9 apart.

    Args:
        before: (n, d) points.
        after: (m, d) points; row i from the input of row i of ``before`` where n = m.
        include: Bounds to evaluate, see :func:`flexnorm.shift.shift_bounds`; ``None`` for all.

    Returns:
        The shift; every number is NaN if a point is not finite.

    Raises:
        TypeError: A side is not a floating-point tensor.
        ValueError: Shapes that do not fit.

    Examples:
        >>> x = torch.tensor([[-1.0], [1.0]])
        >>> shift = measure_shift(x, x + 0.5)
        >>> shift.w1, shift.spread, shift.relative
        (0.5, 1.0, 0.5)
    """
    if not bool(torch.isfinite(before).all()) or not bool(torch.isfinite(after).all()):
        return Shift(*[math.nan] * len(fields(Shift)))
    before, after = before.detach().double(), after.detach().double()
    bounds = shift_bounds(before, after, include=include)
    w1 = float(wasserstein(before, after, "exact"))
    spread = float(safe_norm(before - before.mean(0)).mean())
    return Shift(bounds.lower, w1, bounds.upper, spread, *(_ratio(v, spread) for v in (bounds.lower, w1, bounds.upper)))


@dataclass(frozen=True)
class ShiftRecord(Shift, Record):
    """The shift of one layer between two steps, with what else was asked for.

    The attributes are those of :class:`Record` (to the layer's name ``#2`` and so on is appended for further calls of
    it within one forward), of :class:`Shift`, and:

    Attributes:
        metrics: Further numbers by name, as the monitor's ``metrics`` ask for.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)


def _ratio(value: float, spread: float) -> float:
    if spread > 0:
        return value / spread
    return 0.0 if value == 0 else math.inf


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
    """Appends each record to a file as a line of JSON, as :class:`CSVSink` does; not finite numbers become ``null``."""

    def write(self, record: Record) -> None:
        """Append a line."""
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.asdict().items()}
        with self._open() as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def _step(self, line: str, header: list[str]) -> float:  # noqa: ARG002
        return int(json.loads(line)["step"])


class MemorySink(Sink):
    """Keeps the records so far in a list, ``records``."""

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
    """Hands each record to a function; what that did cannot be taken back."""

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
