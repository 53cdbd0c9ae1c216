"""What a comparison leaves in its folder, as plain typed values: written by the trainer, read by everything else.

A number that is not there, or that JSON has as null, is NaN.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flexnorm.lab.replicates import Replicates, paired_difference

COMPLETE, DIVERGED, REFUSED, UNFINISHED, MISSING_RUN = "complete", "diverged", "refused", "unfinished", "missing"

SHIFT_NUMBERS = ("lower", "w1", "upper", "spread", "relative_lower", "relative", "relative_upper")
SHIFT_HEADER = ",".join(("epoch", "step", "layer", *SHIFT_NUMBERS))
SHIFT_MEANS = tuple(name for name in SHIFT_NUMBERS if name != "spread")


@dataclass(frozen=True)
class EpochRow:
    """One line of metrics.csv: what is known at the end of an epoch.

    Attributes:
        epoch: Epochs done, from 1.
        step: Updates done.
        train_loss: Mean loss over the batches of this epoch (with label smoothing and augmentation), in nats.
        test_loss: Mean cross entropy on the test images, in nats.
        test_accuracy: Share of the test images classified correctly, 0 to 1.
        lr: Learning rate of the last update (of the first parameter group).
        step_ms: Median time of an update in milliseconds.
        seconds: Time spent on this run so far.
    """

    epoch: float
    step: float
    train_loss: float
    test_loss: float
    test_accuracy: float
    lr: float = math.nan
    step_ms: float = math.nan
    seconds: float = math.nan

    @classmethod
    def read(cls, row: Mapping[str, str]) -> EpochRow:
        """Return the row of a CSV file."""
        return cls(**{f.name: number(row.get(f.name)) for f in dataclasses.fields(cls)})


METRICS_HEADER = ",".join(f.name for f in dataclasses.fields(EpochRow))


@dataclass(frozen=True)
class ShiftRow:
    """One line of shift.csv: how far some updates have moved the output of one layer.

    Attributes:
        step: Updates done.
        layer: The layer's name in the network.
        lower: Certified lower bound of the Wasserstein distance.
        w1: The Wasserstein distance as estimated.
        upper: Certified upper bound.
        relative_lower: The lower bound divided by the spread of the layer's output.
        relative: The distance, likewise.
        relative_upper: The upper bound, likewise.
        spread: That spread, the mean distance of the outputs to their mean.
        epoch: Epoch that the step belongs to, from 1.
    """

    step: float
    layer: str
    lower: float
    w1: float
    upper: float
    relative_lower: float
    relative: float
    relative_upper: float
    spread: float = math.nan
    epoch: float = math.nan

    @classmethod
    def read(cls, row: Mapping[str, str]) -> ShiftRow:
        """Return the row of a CSV file."""
        numbers = {name: number(row.get(name)) for name in ("epoch", "step", *SHIFT_NUMBERS)}
        return cls(layer=str(row.get("layer") or "?"), **numbers)

    def value(self, relative: bool) -> tuple[float, float, float]:
        """Return (lower, estimate, upper), relative to the spread of the layer's output or absolute."""
        if relative:
            return self.relative_lower, self.relative, self.relative_upper
        return self.lower, self.w1, self.upper


def holds(lower: float, value: float, upper: float) -> bool:
    """Return whether an interval contains its estimate, up to the rounding of numbers written in decimal."""
    slack = 1e-6 * max(abs(lower), abs(value), abs(upper), 1e-30) if math.isfinite(value) else 0.0
    return lower - slack <= value <= upper + slack


@dataclass(frozen=True)
class Run:
    """One network trained under one normalization, one optimizer and one seed; summary.json, and perhaps its tables.

    Attributes:
        norm: The normalization's name.
        optim: The optimizer's name.
        seed: The seed.
        status: ``complete``, ``diverged``, ``refused``, ``unfinished`` (a folder without a summary) or ``missing``
            (no folder).
        reason: Why the run diverged or was refused; empty where none is known.
        path: Its folder, relative to that of the study.
        test_accuracy: Share of the test images after the last epoch, 0 to 1.
        best_test_accuracy: The largest after any epoch.
        train_loss: Mean training loss of the last epoch, in nats.
        test_loss: Cross entropy on the test images after the last epoch.
        shift: By layer, means over its measurements, named as in :class:`ShiftRow`.
        shift_w1: Mean over layers and measurements of the Wasserstein distance.
        shift_relative: Mean over layers of the distance relative to the spread of the layer's output.
        shift_measurements: Number of measurements.
        shift_holds: Whether every measurement satisfied lower <= W1 <= upper; None without any.
        step_ms: Median time of an update, in milliseconds.
        step_count: Number of updates that were timed.
        step_ratio: ``step_ms`` over that of the baseline with the same optimizer and seed, as recorded; NaN if not.
        wall_s: Wall time of the run, in seconds.
        epochs_done: Epochs done.
        steps: Updates done.
        parameters: Count of trained numbers.
        identity: SHA-256 of settings and data (:meth:`flexnorm.lab.run.Config.fingerprint`).
        notes: What the run has to say about itself (an optimizer that had nothing to do).
        environment: Versions and machine.
        epochs: The lines of metrics.csv, in order, where they have been read.
        shifts: The lines of shift.csv, in order, where they have been read.
    """

    norm: str
    optim: str
    seed: int
    status: str
    reason: str = ""
    path: str = ""
    test_accuracy: float = math.nan
    best_test_accuracy: float = math.nan
    train_loss: float = math.nan
    test_loss: float = math.nan
    shift: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    shift_w1: float = math.nan
    shift_relative: float = math.nan
    shift_measurements: float = math.nan
    shift_holds: bool | None = None
    step_ms: float = math.nan
    step_count: float = math.nan
    step_ratio: float = math.nan
    wall_s: float = math.nan
    epochs_done: float = math.nan
    steps: float = math.nan
    parameters: float = math.nan
    identity: str = ""
    notes: tuple[str, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    epochs: tuple[EpochRow, ...] = ()
    shifts: tuple[ShiftRow, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether the run reached its last epoch with finite losses."""
        return self.status == COMPLETE

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the measured layers, in the order in which the file has them (that of the network)."""
        return tuple(dict.fromkeys(row.layer for row in self.shifts))

    @property
    def shift_lower(self) -> float:
        """Mean over the layers of the lower bounds."""
        return Replicates.of(layer["lower"] for layer in self.shift.values()).mean

    @property
    def shift_upper(self) -> float:
        """Mean over the layers of the upper bounds."""
        return Replicates.of(layer["upper"] for layer in self.shift.values()).mean

    @property
    def interval_holds(self) -> bool | None:
        """Whether lower <= W1 <= upper in every measurement, by the table where it has been read; None without any."""
        checks = [holds(row.lower, row.w1, row.upper) for row in self.shifts if not math.isnan(row.w1)]
        return all(checks) if checks else self.shift_holds

    @classmethod
    def read(cls, values: Mapping[str, Any], **more: Any) -> Run:
        """Return a run from a summary, or its entry in results.json, as far as it goes; ``more`` wins over it."""
        result, timing, notes = _mapping(values.get("result")), _mapping(values.get("timing")), values.get("notes")
        status, count, holds_ = values.get("status"), values.get("seed"), result.get("shift_holds")
        read: dict[str, Any] = {
            "norm": str(values.get("norm", "")),
            "optim": str(values.get("optim", "")),
            "seed": count if isinstance(count, int) else 0,
            "status": status if status in (COMPLETE, DIVERGED, REFUSED) else UNFINISHED,
            "reason": str(values.get("reason") or ""),
            "path": str(values.get("path") or ""),
            "shift": {
                layer: {name: number(_mapping(means).get(name)) for name in SHIFT_MEANS}
                for layer, means in _mapping(result.get("shift")).items()
            },
            "shift_holds": holds_ if isinstance(holds_, bool) else None,
            "epochs_done": number(values.get("epochs")),
            "identity": str(values.get("run") or ""),
            "notes": tuple(map(str, notes)) if isinstance(notes, list) else (),
            "environment": renamed(_mapping(values.get("environment"))),
        }
        for place, names in ((values, _OWN), (result, _RESULT), (timing, _TIMING)):
            read |= {name: number(place.get(name)) for name in names}
        return cls(**read | more)

    def summary(self) -> dict[str, Any]:
        """Return the content of summary.json."""
        return {
            "format": 1,
            "status": self.status,
            "reason": self.reason or None,
            "notes": list(self.notes),
            "norm": self.norm,
            "optim": self.optim,
            "seed": self.seed,
            "epochs": self.epochs_done,
            "steps": self.steps,
            "parameters": self.parameters,
            "run": self.identity,
            "result": {
                **{name: getattr(self, name) for name in _RESULT[:4]},
                "shift": self.shift,
                **{name: getattr(self, name) for name in (*_RESULT[4:], "shift_holds")},
            },
            "timing": {name: getattr(self, name) for name in _TIMING},
            "environment": dict(self.environment),
        }


_OWN = ("steps", "parameters", "step_ratio")
_RESULT = (
    *("train_loss", "test_loss", "test_accuracy", "best_test_accuracy"),
    *("shift_w1", "shift_relative", "shift_measurements"),
)
_TIMING = ("step_ms", "wall_s", "step_count")


@dataclass(frozen=True)
class Cell:
    """One row of the table: one normalization with one optimizer. Numbers are those of its complete runs.

    Attributes:
        norm: The normalization.
        optim: The optimizer.
        runs: All its runs, whatever became of them.
        test_accuracy: As in :class:`Run`, and likewise ``train_loss``, ``step_ms`` and the shifts.
        difference: Test accuracy minus the baseline's at the same optimizer and seed, over the seeds that both
            completed; empty without a baseline and for the baseline itself.
        interval_holds: Whether lower <= W1 <= upper in every measurement; None without measurements.
        step_ratio: Step time over the baseline's at the same optimizer and seed.
    """

    norm: str
    optim: str
    runs: tuple[Run, ...]
    test_accuracy: Replicates
    train_loss: Replicates
    difference: Replicates
    shift_w1: Replicates
    shift_lower: Replicates
    shift_upper: Replicates
    shift_relative: Replicates
    interval_holds: bool | None
    step_ms: Replicates
    step_ratio: Replicates

    @property
    def complete(self) -> tuple[Run, ...]:
        """The runs that reached their end."""
        return tuple(run for run in self.runs if run.complete)

    def count(self, status: str) -> int:
        """Return how many of the runs ended like that."""
        return sum(run.status == status for run in self.runs)

    @property
    def reason(self) -> str:
        """The first reason that a run gives for not being complete; empty without any."""
        return next((run.reason for run in self.runs if run.reason), "")

    @property
    def notes(self) -> list[str]:
        """What the runs have to say about themselves, each once."""
        return sorted({note for run in self.runs for note in run.notes})

    def asdict(self) -> dict[str, Any]:
        """Return the row as results.json has it."""
        difference = self.difference.asdict() | {"n": self.difference.n}
        del difference["values"]
        return {
            "norm": self.norm,
            "optim": self.optim,
            "seeds": len(self.runs),
            **{status: self.count(status) for status in (COMPLETE, DIVERGED, REFUSED)},
            "reason": self.reason or None,
            "notes": self.notes,
            "test_accuracy": self.test_accuracy.asdict(),
            "train_loss": self.train_loss.asdict(),
            "difference": difference if self.difference else None,
            "shift_w1": self.shift_w1.asdict(),
            "shift_relative": self.shift_relative.asdict(),
            "shift_interval_holds": self.interval_holds,
            "step_ms": self.step_ms.asdict(),
            "step_ratio": self.step_ratio.median if self.step_ratio else None,
        }


_OVER_SEEDS = ("test_accuracy", "train_loss", "shift_w1", "shift_lower", "shift_upper", "shift_relative", "step_ms")


def _cell(runs: Sequence[Run], baseline_runs: Sequence[Run], baseline: str) -> Cell:
    norm, done = runs[0].norm, [run for run in runs if run.complete]
    base = [run for run in baseline_runs if run.complete]
    times = {run.seed: run.step_ms for run in base}
    known = [run.interval_holds for run in done if run.interval_holds is not None]
    return Cell(
        norm=norm,
        optim=runs[0].optim,
        runs=tuple(runs),
        difference=paired_difference(*({run.seed: run.test_accuracy for run in part} for part in (done, base)))
        if norm != baseline
        else Replicates(),
        interval_holds=all(known) if known else None,
        # As recorded, else from the two medians.
        step_ratio=Replicates.of(
            _ratio(run.step_ms, times.get(run.seed, math.nan)) if math.isnan(run.step_ratio) else run.step_ratio
            for run in done
        ),
        **{name: Replicates.of(getattr(run, name) for run in done) for name in _OVER_SEEDS},
    )


def _ratio(own: float, base: float) -> float:
    return own / base if own > 0 and base > 0 else math.nan


def with_step_ratios(runs: Sequence[Run], baseline: str) -> tuple[Run, ...]:
    """Return the runs with their step time over that of the baseline with the same optimizer and seed."""
    times = {(run.optim, run.seed): run.step_ms for run in runs if run.norm == baseline}
    return tuple(
        dataclasses.replace(run, step_ratio=_ratio(run.step_ms, times.get((run.optim, run.seed), math.nan)))
        for run in runs
    )


@dataclass(frozen=True)
class Study:
    """A comparison: all its runs and what they have in common; results.json.

    Attributes:
        name: The folder's name.
        runs: Every run that is there or should be.
        norms: Normalizations.
        optims: Optimizers.
        baseline: The normalization that the others are compared with.
        data: The data in words; empty if not recorded.
        command: The command line that made the folder; empty if not recorded.
        config: The resolved configuration.
        environment: Versions and machine.
        total_seconds: Wall time of the whole comparison; NaN if not recorded.
        notes: What a reader should know about files that are missing or unreadable.
    """

    name: str
    runs: tuple[Run, ...]
    norms: tuple[str, ...]
    optims: tuple[str, ...]
    baseline: str = "batch"
    data: str = ""
    command: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    total_seconds: float = math.nan
    notes: tuple[str, ...] = ()

    @property
    def complete(self) -> tuple[Run, ...]:
        """The runs that reached their end."""
        return tuple(run for run in self.runs if run.complete)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The rows of the table, in the order of the runs."""
        found: dict[tuple[str, str], list[Run]] = {}
        for run in self.runs:
            found.setdefault((run.norm, run.optim), []).append(run)
        base = self.baseline
        return tuple(_cell(own, found.get((base, optim), ()), base) for (_, optim), own in found.items())

    @property
    def has_baseline(self) -> bool:
        """Whether at least one run of the baseline is complete."""
        return any(run.norm == self.baseline for run in self.complete)

    @property
    def subject(self) -> str:
        """What was trained on what, as far as the configuration says so."""
        parts = [self.config.get(key) for key in ("model", "data")]
        return " on ".join(part for part in parts if isinstance(part, str) and part) or self.name

    @property
    def per(self) -> str:
        """Over how many updates a shift is measured: ``per step``, or ``over 5 steps``."""
        lag = self.config.get("shift_lag", 1)
        return f"over {lag} steps" if isinstance(lag, int) and lag > 1 else "per step"

    def of(self, norm: str | None = None, optim: str | None = None) -> tuple[Run, ...]:
        """Return the runs of one normalization, of one optimizer, or of both."""
        return tuple(r for r in self.runs if norm in (None, r.norm) and optim in (None, r.optim))

    @classmethod
    def read(cls, results: Mapping[str, Any], name: str = "") -> Study:
        """Return a study from the content of results.json; ``name`` is that of the folder."""
        config, runs = _mapping(results.get("config")), tuple(Run.read(run) for run in results["runs"])
        return cls(
            name=name,
            runs=runs,
            norms=tuple(dict.fromkeys(run.norm for run in runs)),
            optims=tuple(dict.fromkeys(run.optim for run in runs)),
            baseline=str(results.get("baseline", "batch")),
            data=str(results.get("data") or ""),
            command=renamed_command(results),
            config=config,
            environment=renamed(_mapping(results.get("environment"))),
            total_seconds=number(results.get("total_seconds")),
        )

    def asdict(self) -> dict[str, Any]:
        """Return the content of results.json."""
        return {
            "format": 1,
            "command": self.command,
            "data": self.data,
            "config": dict(self.config),
            "environment": dict(self.environment),
            "baseline": self.baseline,
            "total_seconds": self.total_seconds,
            "runs": [run.summary() | {"path": run.path, "step_ratio": run.step_ratio} for run in self.runs],
            "table": [cell.asdict() for cell in self.cells],
        }


def renamed(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Return an environment with the version under the package's present name; before 0.1 it was called evenkeel."""
    return {"flexnorm" if key == "evenkeel" else key: value for key, value in environment.items()}


def renamed_command(record: Mapping[str, Any]) -> str:
    """Return the command that a file records, by the package's present name; empty if it records none."""
    return re.sub(r"^evenkeel\b", "flexnorm", str(record.get("command") or ""))


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def number(value: object) -> float:
    """Return a number from JSON or CSV; NaN for what is none (null, an empty cell, half a line)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return math.nan
    try:
        known = float(value)
    except (ValueError, OverflowError):
        return math.nan
    return known if isinstance(value, str) else value
