"""The table of results: one row per normalizer and optimizer, best accuracy first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from flexnorm.lab.charts import Scale, accuracy, marker_shape
from flexnorm.lab.charts.markup import Markup, element, number
from flexnorm.lab.charts.numbers import MISSING, decimals_for, fixed, percent, power_of_ten, signed, significant
from flexnorm.lab.charts.svg import XMLNS, group, line, marker
from flexnorm.lab.records import Cell, Study
from flexnorm.lab.replicates import Replicates

SEEDS_SIZE = (120.0, 20.0)
"""Size of the small drawing of the seeds in the accuracy column."""


class Entry(NamedTuple):
    """What stands in one place of the table."""

    value: float  # by which the page sorts; NaN for none
    text: str
    small: str | None = None  # what stands below
    bold: bool = False
    quiet: bool = False
    alarm: str = ""
    badges: Sequence[tuple[str, int, str]] = ()  # of runs without a result: status, how many, their reasons

    @property
    def sort(self) -> str:
        """The number as an attribute."""
        return "" if math.isnan(self.value) else f"{self.value!r}"


def results_table(study: Study) -> dict[str, Any]:
    """Return what the table of the page shows: its columns, its rows, and remarks of runs with whom they are about."""
    cells = study.cells
    axis = accuracy([v for c in cells for v in c.test_accuracy.values])
    places = (
        decimals_for((100 * c.test_accuracy.std for c in cells), least=1, most=3, default=2),
        decimals_for((100 * c.difference.std for c in cells), least=1, most=2, default=2),
    )
    about: dict[str, list[str]] = {}
    for cell in cells:
        for note in dict.fromkeys(note for run in cell.runs for note in run.notes):
            about.setdefault(note, []).append(f"{cell.norm} with {cell.optim}")
    return {
        "columns": (
            ("Normalizer", "", "name"),
            ("Optimizer", "", "name"),
            ("Test accuracy", "%, mean ± sd", "num"),
            ("Runs", "complete", "num"),
            ("Difference", f"to {study.baseline}, in points", "num"),
            ("Training loss", "nats", "num"),
            ("Shift W₁", "[lower, upper]", "num"),
            ("Relative shift", "W₁ ÷ spread", "num"),
            ("Step time", f"ratio to {study.baseline}", "num"),
        ),
        "rows": [_row(study, cell, axis, places) for cell in sorted(cells, key=_rank)],
        "notes": about,
    }


def _rank(cell: Cell) -> tuple[bool, float]:
    mean = cell.test_accuracy.mean
    return math.isnan(mean), 0.0 if math.isnan(mean) else -mean


def _row(study: Study, cell: Cell, axis: Scale, places: tuple[int, int]) -> dict[str, Any]:
    optim, base = study.optims.index(cell.optim), cell.norm == study.baseline
    mark = marker(marker_shape(optim), 8, 8, 4.6)
    step, ratio = cell.step_ms.median, cell.step_ratio.median
    return {
        "norm": cell.norm,
        "optim": cell.optim,
        "hue": study.norms.index(cell.norm),
        "base": base,
        "swatch": element("svg", mark, xmlns=XMLNS, viewBox="0 0 16 16", class_="swatch", aria_hidden="true"),
        "entries": [
            Entry(cell.test_accuracy.mean, _mean(cell.test_accuracy, places[0], 100), _seeds(cell, axis, optim)),
            _runs(cell),
            Entry(0.0, "baseline", quiet=True) if base else _difference(cell.difference, places[1]),
            Entry(cell.train_loss.mean, _significant(cell.train_loss)),
            _shift(cell),
            Entry(cell.shift_relative.mean, _significant(cell.shift_relative)),
            Entry(
                ratio if cell.step_ratio else step,
                f"{significant(ratio)}×" if cell.step_ratio else MISSING,
                f"{significant(step)}\u202fms" if cell.step_ms else None,
            ),
        ],
    }


def _mean(values: Replicates, places: int, factor: float = 1.0) -> str:
    std = f" ± {fixed(factor * values.std, places)}" if math.isfinite(values.std) else ""
    return f"{fixed(factor * values.mean, places)}{std}"


def _significant(values: Replicates) -> str:
    """Return mean ± std, both with the decimals that give the mean three digits."""
    size = max(abs(values.mean), values.std if math.isfinite(values.std) else 0.0)
    if not math.isfinite(size) or size == 0 or (not 1e-3 <= size < 1e6 and not math.isfinite(values.std)):
        return significant(values.mean)
    exponent = math.floor(math.log10(size))
    if not 1e-3 <= size < 1e6:
        return f"({_mean(values, 2, 10.0**-exponent)})×{power_of_ten(exponent)}"
    return _mean(values, max(0, 2 - exponent))


def _difference(values: Replicates, places: int) -> Entry:
    if not values:
        return Entry(math.nan, MISSING)
    text = signed(100 * values.mean, places)
    if math.isfinite(values.std):
        text += f" ± {fixed(100 * values.std, places)}"
    below = None
    if math.isfinite(values.margin):
        low, high = (signed(100 * (values.mean + s * values.margin), places) for s in (-1, 1))
        below = f"[{low}, {high}]"
    return Entry(values.mean, text, below, bold=values.separated)


def _shift(cell: Cell) -> Entry:
    mean, interval = cell.shift_w1.mean, None
    if cell.shift_lower:
        interval = f"[{significant(cell.shift_lower.mean, 2)}, {significant(cell.shift_upper.mean, 2)}]"
    return Entry(mean, significant(mean), interval, alarm="violated" if cell.interval_holds is False else "")


def _runs(cell: Cell) -> Entry:
    open_ = [run for run in cell.runs if not run.complete]
    badges = [
        (kind, cell.count(kind), "; ".join(dict.fromkeys(r.reason for r in open_ if r.status == kind and r.reason)))
        for kind in dict.fromkeys(run.status for run in open_)
    ]
    return Entry(len(cell.complete), f"{len(cell.complete)} of {len(cell.runs)}", badges=badges)


def _seeds(cell: Cell, scale: Scale, optim: int) -> Markup | None:
    """Return a drawing of the seeds on a line; the same scale in every row."""
    if not cell.test_accuracy:
        return None
    width, height = SEEDS_SIZE
    *places, centre = (6.0 + (width - 12.0) * scale(v) for v in (*cell.test_accuracy.values, cell.test_accuracy.mean))
    seeds = [marker("circle", place, height / 2, 2.4, class_="seed") for place in places]
    return element(
        "svg",
        group(
            line(0, height / 2, width, height / 2, "grid"),
            seeds if len(seeds) > 1 else None,
            marker(marker_shape(optim), centre, height / 2, 3.8),
        ),
        xmlns=XMLNS,
        viewBox=f"0 0 {number(width)} {number(height)}",
        class_="seeds",
        aria_hidden="true",
        data_range=f"{percent(scale.low)} to {percent(scale.high)}",
    )
