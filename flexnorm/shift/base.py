"""What all monitors share: when to measure, keeping an anchor until it is compared, sinks, a resumable state."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Self, TypedDict, TypeVar, get_args

from torch import Tensor, nn

from flexnorm._messages import unknown_name
from flexnorm.probe import unwrap
from flexnorm.shift.records import Record, Sink, as_sink

Schedule = Callable[[int], bool]
"""Anything that maps a step count to whether to measure there; a plain function will do."""

Anchor = Literal["previous", "initial", "both"]
Every = int | Schedule | Iterable[int]
Snapshot = dict[str, Tensor]
R = TypeVar("R", bound=Record)

_FORMAT = 1


@dataclass(frozen=True)
class EverySteps:
    """Measure at ``start``, ``start + interval``, ``start + 2 interval``, ...

    Attributes:
        interval: Steps between two measurements, at least 1.
        start: First step to measure at.
    """

    interval: int
    start: int = 0

    def __post_init__(self) -> None:
        if self.interval < 1 or self.start < 0:
            raise ValueError(f"interval must be at least 1 and start at least 0, got {self.interval} and {self.start}")

    def __call__(self, step: int, /) -> bool:
        """Whether ``step`` lies on the grid."""
        return step >= self.start and (step - self.start) % self.interval == 0


@dataclass(frozen=True)
class Logarithmic:
    """Measure often at first, then ever more rarely: at 0 and at the rounded powers ``base ** (k / per_base)``.

    Attributes:
        base: Ratio of steps within which ``per_base`` measurements are made, above 1.
        per_base: Measurements per factor of ``base``, at least 1.
    """

    base: float = 10.0
    per_base: int = 10

    def __post_init__(self) -> None:
        if self.base <= 1 or self.per_base < 1:
            raise ValueError(f"base must exceed 1 and per_base be at least 1, got {self.base} and {self.per_base}")

    def __call__(self, step: int, /) -> bool:
        """Whether a rounded power equals ``step``."""
        if step < 1:
            return step == 0
        # The powers that round to `step` lie within half a step of it.
        low, high = (self.per_base * math.log(bound, self.base) for bound in (max(step - 0.5, 1), step + 0.5))
        return any(round(self.base ** (k / self.per_base)) == step for k in range(math.floor(low), math.ceil(high) + 1))


@dataclass(frozen=True)
class AtSteps:
    """Measure at the listed steps.

    Attributes:
        steps: The step counts.
    """

    steps: frozenset[int]

    def __init__(self, steps: Iterable[int]) -> None:
        object.__setattr__(self, "steps", frozenset(int(step) for step in steps))
        if not self.steps or min(self.steps) < 0:
            raise ValueError(f"steps must be a non-empty list of counts from 0 on, got {sorted(self.steps)}")

    def __call__(self, step: int, /) -> bool:
        """Whether ``step`` is listed."""
        return step in self.steps


@dataclass
class EverySeconds:
    """Measure when at least ``interval`` seconds have passed since the last measurement; the first call measures.

    What it does depends on the clock, so a resumed run need not measure at the steps of an uninterrupted one.

    Attributes:
        interval: Seconds between two measurements, above 0.
        clock: Returns the time in seconds.
    """

    interval: float
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    _last: float | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.interval > 0:
            raise ValueError(f"interval must be a positive number of seconds, got {self.interval}")

    def __call__(self, step: int, /) -> bool:  # noqa: ARG002
        """Whether the interval has passed; if so it starts anew."""
        now = self.clock()
        if self._last is not None and now - self._last < self.interval:
            return False
        self._last = now
        return True


def as_schedule(every: int | Schedule | Iterable[int]) -> Schedule:
    """A schedule from a number of steps, a list of steps, or a schedule or function as it is; TypeError for others."""
    if isinstance(every, int) and not isinstance(every, bool):
        return EverySteps(every)
    if callable(every):
        return every
    if isinstance(every, (list, tuple, set, frozenset, range)):
        return AtSteps(every)
    raise TypeError(f"every must be a number of steps, a list of steps or a schedule, got {every!r}")


class MonitorOptions(TypedDict, total=False):
    """What every monitor takes by keyword, as explained at :class:`flexnorm.shift.ShiftMonitor`."""

    every: Every
    lag: int
    anchor: Anchor
    sinks: Iterable[Any]


class Monitor(ABC, Generic[R]):
    """Base of the monitors: takes a snapshot, the *anchor*, where its schedule says so, and compares a later one.

    Arguments and attributes are explained at :class:`flexnorm.shift.ShiftMonitor`.
    """

    _kind: type[R]

    def __init__(
        self, model: nn.Module, every: Every = 100, lag: int = 1, anchor: Anchor = "previous", sinks: Iterable[Any] = ()
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a module, got {type(model).__name__}")
        check_count("lag", lag)
        if anchor not in get_args(Anchor):
            raise ValueError(unknown_name("anchor", anchor, get_args(Anchor)))
        self._model = unwrap(model)
        self._schedule = as_schedule(every)
        self._lag = lag
        self._anchor = anchor
        self._sinks: list[Sink] = [as_sink(sink) for sink in sinks]
        self._pending: list[tuple[int, Snapshot]] = []
        self._initial: list[tuple[int, Snapshot]] = []
        self._started = False
        self.steps = 0
        self.records: list[R] = []

    @abstractmethod
    def look(self) -> Snapshot:
        """What is compared, as it is now: tensors by name. Changes nothing in the model."""

    @abstractmethod
    def _compare(self, before: Snapshot, now: Snapshot) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """What a record says besides where it was made, by the name of its layer."""

    @abstractmethod
    def _config(self) -> dict[str, Any]:
        """Further arguments that must agree for a state to be taken up, as plain values."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Take the snapshots before the first step, where they are needed. ``with`` calls this."""
        if self._started:
            return
        self._started = True
        due = self._schedule(self.steps) and self._anchor != "initial"
        if due or self._anchor != "previous":
            entry = (self.steps, self.look())
            self._pending += [entry] if due else []
            self._initial += [entry] if self._anchor != "previous" else []

    def step(self) -> list[R]:
        """Tell the monitor that the optimizer has made a step; call it once after each ``optimizer.step()``.

        Returns:
            The records made at this step; most often none.

        Raises:
            RuntimeError: The monitor was not started.
        """
        if not self._started:
            raise RuntimeError("call start(), or use the monitor in a with statement, before the first optimizer step")
        self.steps += 1
        scheduled = self._schedule(self.steps)
        ready = [entry for entry in self._pending if entry[0] + self._lag <= self.steps]
        since_start = self._initial if scheduled else []
        take = scheduled and self._anchor != "initial"
        if not (ready or since_start or take):
            return []
        now = self.look()
        made = [
            self._kind(step=self.steps, layer=layer, anchor=anchor, anchor_step=taken, **numbers)
            for anchor, entries in (("previous", ready), ("initial", since_start))
            for taken, before in entries
            for layer, numbers in self._compare(before, now)
        ]
        self._pending = [entry for entry in self._pending if entry[0] + self._lag > self.steps]
        if take:
            self._pending.append((self.steps, now))
        self.records += made
        for sink in self._sinks:
            for record in made:
                sink.write(record)
        return made

    def close(self) -> None:
        """Close the sinks. The records stay readable."""
        for sink in self._sinks:
            sink.close()

    def summary(self) -> dict[str, dict[str, float]]:
        """Mean over the measurements so far of every number of the records, by layer."""
        table: dict[str, list[Mapping[str, Any]]] = {}
        for record in self.records:
            table.setdefault(record.layer, []).append(record.asdict())
        skip = {"step", "layer", "reference", "reference_step"}
        return {
            layer: {key: sum(row[key] for row in rows) / len(rows) for key in rows[0] if key not in skip}
            for layer, rows in table.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on exactly: tensors, numbers and strings, nothing else."""
        return {
            "format": _FORMAT,
            "config": self._arguments(),
            "steps": self.steps,
            "started": self._started,
            "pending": [_pack(entry) for entry in self._pending],
            "initial": _pack(self._initial[0]) if self._initial else None,
            "records": [record.asdict() for record in self.records],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`. File sinks drop the rows of steps that will be made again.

        Raises:
            ValueError: The state is of another format, or of a monitor with other arguments.
        """
        if state.get("format") != _FORMAT:
            raise ValueError(f"the monitor's state has format {state.get('format')!r}, this version reads {_FORMAT}")
        there, here = state["config"], self._arguments()
        differences = [f"{k}: {there.get(k)!r} there, {v!r} here" for k, v in here.items() if there.get(k) != v]
        if differences:
            raise ValueError(f"the state is of a monitor with other arguments ({'; '.join(differences)})")
        self.steps = int(state["steps"])
        self._started = bool(state["started"])
        self._pending = [_unpack(entry) for entry in state["pending"]]
        self._initial = [] if state["initial"] is None else [_unpack(state["initial"])]
        self.records = [self._kind.from_dict(values) for values in state["records"]]
        for sink in self._sinks:
            sink.rewind(self.steps)

    def _arguments(self) -> dict[str, Any]:
        # States and files call the anchor "reference", as they always have.
        return {"lag": self._lag, "reference": self._anchor, **self._config()}


def check_count(name: str, number: object) -> None:
    """Refuse what is not a whole number from 1 on (ValueError)."""
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"{name} must be a whole number from 1 on, got {number!r}")


def _pack(entry: tuple[int, Snapshot]) -> dict[str, Any]:
    return {"step": entry[0], "values": dict(entry[1])}


def _unpack(entry: Mapping[str, Any]) -> tuple[int, Snapshot]:
    return int(entry["step"]), {name: value.clone() for name, value in entry["values"].items()}
