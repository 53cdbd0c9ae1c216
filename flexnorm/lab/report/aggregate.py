"""From runs to the rows of the table: means and spreads over seeds, and differences paired seed by seed.

Only complete runs enter a mean. The spread is the sample standard deviation (n - 1); with one seed there is none.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flexnorm.lab.report.study import Run, Study

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class Sample:
    """Some numbers, one per seed, and what they amount to.

    Attributes:
        values: The numbers; NaN is left out beforehand.
    """

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Sample:
        """Return the sample of the values that are not NaN."""
        return cls(tuple(v for v in values if not math.isnan(v)))

    def __bool__(self) -> bool:
        return bool(self.values)

    @property
    def n(self) -> int:
        """How many numbers there are."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Their mean; NaN where there are none."""
        return math.fsum(self.values) / self.n if self._finite else (sum(self.values) / self.n if self.n else math.nan)

    @property
    def std(self) -> float:
        """Their sample standard deviation (n - 1), zero where only rounding sets them apart; NaN for fewer than two."""
        if self.n < 2 or not self._finite:
            return math.nan
        std = statistics.stdev(self.values)
        return std if std > 1e-12 * max(abs(self.low), abs(self.high)) else 0.0

    @property
    def median(self) -> float:
        """Their median, which one disturbed run does not move far; NaN where there are none."""
        return statistics.median(self.values) if self.values else math.nan

    @property
    def low(self) -> float:
        """The smallest; NaN where there are none."""
        return min(self.values, default=math.nan)

    @property
    def high(self) -> float:
        """The largest; NaN where there are none."""
        return max(self.values, default=math.nan)

    @property
    def margin(self) -> float:
        """Half the width of the 95 % confidence interval of the mean, by Student's t.

        NaN for fewer than two numbers, and for numbers that are all the same (accuracies are multiples of one image):
        a few equal results do not show that there is no spread.
        """
        if not self.n > 1 or not self.std > 0:
            return math.nan
        quantile = _T95[self.n - 2] if self.n - 2 < len(_T95) else 1.96 + 2.6 / (self.n - 1)
        return quantile * self.std / math.sqrt(self.n)

    @property
    def separated(self) -> bool:
        """Whether zero lies outside the 95 % confidence interval of the mean; never where there is no such interval."""
        return abs(self.mean) > self.margin

    @property
    def _finite(self) -> bool:
        return self.n > 0 and all(math.isfinite(v) for v in self.values)


@dataclass(frozen=True)
class Cell:
    """One row of the table: one normalizer with one optimizer, over its seeds.

    Attributes:
        norm: The normalizer.
        optim: The optimizer.
        runs: All its runs, whatever became of them.
        test_accuracy: Fractions, over complete runs.
        train_loss: Nats, over complete runs.
        difference: Test accuracy minus the baseline's at the same optimizer and seed, as fractions; empty without a
            baseline and for the baseline itself.
        shift_w1: Mean Wasserstein distance over layers and measurements.
        shift_lower: The same mean of the lower bounds.
        shift_upper: The same mean of the upper bounds.
        shift_relative: Mean distance relative to the layer's spread.
        interval_holds: Whether lower <= W1 <= upper in every measurement; None without measurements.
        step_ms: Milliseconds per step.
        step_ratio: Step time over the baseline's at the same optimizer and seed.
    """

    norm: str
    optim: str
    runs: tuple[Run, ...]
    test_accuracy: Sample
    train_loss: Sample
    difference: Sample
    shift_w1: Sample
    shift_lower: Sample
    shift_upper: Sample
    shift_relative: Sample
    interval_holds: bool | None
    step_ms: Sample
    step_ratio: Sample

    @property
    def complete(self) -> tuple[Run, ...]:
        """The runs that reached their end."""
        return tuple(run for run in self.runs if run.complete)


def holds(lower: float, value: float, upper: float) -> bool:
    """Return whether an interval contains its estimate, up to the rounding of numbers written in decimal."""
    slack = 1e-6 * max(abs(lower), abs(value), abs(upper), 1e-30) if math.isfinite(value) else 0.0
    return lower - slack <= value <= upper + slack


def cells(study: Study) -> tuple[Cell, ...]:
    """Return one cell per normalizer and optimizer, in the order of the configuration."""
    pairs = [(norm, optim) for norm in study.norms for optim in study.optims]
    return tuple(_cell(study, norm, optim) for norm, optim in pairs if study.of(norm, optim))


def _cell(study: Study, norm: str, optim: str) -> Cell:
    runs = study.of(norm, optim)
    done = [run for run in runs if run.complete]
    base = {run.seed: run for run in study.of(study.baseline, optim) if run.complete}
    paired = [(run, base[run.seed]) for run in done if run.seed in base]
    checks = [holds(row.lower, row.w1, row.upper) for run in done for row in run.shifts if not math.isnan(row.w1)]
    return Cell(
        norm=norm,
        optim=optim,
        runs=runs,
        test_accuracy=Sample.of(run.test_accuracy for run in done),
        train_loss=Sample.of(run.train_loss for run in done),
        difference=Sample.of(a.test_accuracy - b.test_accuracy for a, b in paired if norm != study.baseline),
        shift_w1=Sample.of(run.shift_w1 for run in done),
        shift_lower=Sample.of(run.shift_lower for run in done),
        shift_upper=Sample.of(run.shift_upper for run in done),
        shift_relative=Sample.of(run.shift_relative for run in done),
        interval_holds=all(checks) if checks else None,
        step_ms=Sample.of(run.step_ms for run in done),
        step_ratio=Sample.of(_ratio(run, base.get(run.seed)) for run in done),
    )


def _ratio(run: Run, base: Run | None) -> float:
    """Return the recorded ratio of a step to the baseline's, else that of the two medians."""
    if not math.isnan(run.step_ratio):
        return run.step_ratio
    return run.step_ms / base.step_ms if base is not None and base.step_ms > 0 else math.nan


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Spearman's rank correlation of two sequences of finite numbers; NaN if one is constant or below three."""
    a, b = _ranks(x), _ranks(y)
    if len(a) < 3 or len(set(a)) == 1 or len(set(b)) == 1:
        return math.nan
    return statistics.correlation(a, b)


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    first = {v: i for i, v in reversed(list(enumerate(ordered)))}
    last = {v: i for i, v in enumerate(ordered)}
    return [(first[v] + last[v]) / 2 for v in values]
