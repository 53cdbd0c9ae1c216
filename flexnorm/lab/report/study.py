"""What a comparison left in its folder, as plain typed values: the only input of every figure and sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

COMPLETE, DIVERGED, REFUSED, UNFINISHED, MISSING_RUN = "complete", "diverged", "refused", "unfinished", "missing"


@dataclass(frozen=True)
class EpochRow:
    """One line of metrics.csv. Numbers that are not there are NaN.

    Attributes:
        epoch: Epoch, from 1 (or from 0, as the file has it).
        step: Optimizer steps taken so far.
        train_loss: Mean cross-entropy over the epoch's training batches, in nats.
        test_loss: Mean cross-entropy on the test set, in nats.
        test_accuracy: Fraction of test images classified correctly, in [0, 1].
        step_ms: Time per optimizer step in milliseconds.
    """

    epoch: float
    step: float
    train_loss: float
    test_loss: float
    test_accuracy: float
    step_ms: float


@dataclass(frozen=True)
class ShiftRow:
    """One line of shift.csv: the shift of one layer at one step. Numbers that are not there are NaN.

    Attributes:
        step: Optimizer steps taken so far.
        layer: The layer's name in the network.
        lower: Certified lower bound of the Wasserstein distance.
        w1: The Wasserstein distance as estimated.
        upper: Certified upper bound.
        relative_lower: The lower bound divided by the layer's spread.
        relative: The distance divided by the layer's spread.
        relative_upper: The upper bound divided by the layer's spread.
    """

    step: float
    layer: str
    lower: float
    w1: float
    upper: float
    relative_lower: float
    relative: float
    relative_upper: float

    def value(self, relative: bool) -> tuple[float, float, float]:
        """Return (lower, estimate, upper), relative to the layer's spread or absolute."""
        if relative:
            return self.relative_lower, self.relative, self.relative_upper
        return self.lower, self.w1, self.upper


@dataclass(frozen=True)
class Run:
    """One network trained under one normalizer, one optimizer and one seed.

    Attributes:
        norm: The normalizer's name.
        optim: The optimizer's name.
        seed: The seed.
        status: ``complete``, ``diverged``, ``refused``, ``unfinished`` (a folder without a summary) or ``missing``
            (no folder).
        reason: Why the run diverged or was refused; empty where none is known.
        path: Its folder, relative to the report.
        test_accuracy: Fraction of the test images right after the last epoch.
        train_loss: Mean training loss of the last epoch, in nats.
        shift_w1: Mean over layers and measurements of the Wasserstein distance.
        shift_lower: The same mean of the lower bounds.
        shift_upper: The same mean of the upper bounds.
        shift_relative: Mean over layers of the distance relative to the layer's spread.
        step_ms: Median time of an optimizer step, in milliseconds.
        step_ratio: ``step_ms`` over that of the baseline with the same optimizer and seed, as recorded; NaN if not.
        parameters: Count of trained numbers; NaN if unknown.
        wall_s: Wall time of the run, in seconds.
        notes: What the run has to say about itself (an optimizer that had nothing to do).
        epochs: The lines of metrics.csv, in order.
        shifts: The lines of shift.csv, in order.
    """

    norm: str
    optim: str
    seed: int
    status: str
    reason: str = ""
    path: str = ""
    test_accuracy: float = math.nan
    train_loss: float = math.nan
    shift_w1: float = math.nan
    shift_lower: float = math.nan
    shift_upper: float = math.nan
    shift_relative: float = math.nan
    step_ms: float = math.nan
    step_ratio: float = math.nan
    parameters: float = math.nan
    wall_s: float = math.nan
    notes: tuple[str, ...] = ()
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


@dataclass(frozen=True)
class Study:
    """Everything the report is made of.

    Attributes:
        name: The folder's name.
        runs: Every run that is there or should be, in the order of the configuration.
        norms: Normalizers, the baseline first, then in the order of the configuration.
        optims: Optimizers, in the order of the configuration.
        baseline: The normalizer that the others are compared with.
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
    config: Mapping[str, object] = field(default_factory=dict)
    environment: Mapping[str, object] = field(default_factory=dict)
    total_seconds: float = math.nan
    notes: tuple[str, ...] = ()

    @property
    def complete(self) -> tuple[Run, ...]:
        """The runs that reached their end."""
        return tuple(run for run in self.runs if run.complete)

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
        """Return the runs of one normalizer, of one optimizer, or of both."""
        return tuple(r for r in self.runs if norm in (None, r.norm) and optim in (None, r.optim))
