"""The table of results: one row per normalizer and optimizer, best accuracy first."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flexnorm.lab.charts import Scale, accuracy, marker_shape
from flexnorm.lab.charts.markup import Child, Markup, element, join, number
from flexnorm.lab.charts.numbers import (
    MISSING,
    decimals_for,
    fixed,
    listing,
    percent,
    power_of_ten,
    signed,
    significant,
)
from flexnorm.lab.charts.svg import group, line, marker
from flexnorm.lab.records import Cell, Study
from flexnorm.lab.replicates import Replicates

STRIP = (120.0, 20.0)
"""Size of the small drawing of the seeds in the accuracy column."""


def results_table(study: Study, rows: Sequence[Cell]) -> Markup:
    """Return the table. Every cell carries its number in ``data-v``, by which the page sorts."""
    ranked = sorted(rows, key=lambda c: (math.isnan(c.test_accuracy.mean), -_or_zero(c.test_accuracy.mean)))
    strip = accuracy([v for c in rows for v in c.test_accuracy.values])
    places = _Places(
        decimals_for((100 * c.test_accuracy.std for c in rows), least=1, most=3, default=2),
        decimals_for((100 * c.difference.std for c in rows), least=1, most=2, default=2),
    )
    columns = [
        ("Normalizer", "", "name"),
        ("Optimizer", "", "name"),
        ("Test accuracy", "%, mean ± sd", "num"),
        ("Runs", "complete", "num"),
        ("Difference", f"to {study.baseline}, in points", "num"),
        ("Training loss", "nats", "num"),
        ("Shift W₁", "[lower, upper]", "num"),
        ("Relative shift", "W₁ ÷ spread", "num"),
        ("Step time", f"ratio to {study.baseline}", "num"),
    ]
    head = [
        element(
            "th",
            element("span", name, class_="th"),
            element("small", unit) if unit else None,
            scope="col",
            class_=kind,
            aria_sort="descending" if name == "Test accuracy" else None,
        )
        for name, unit, kind in columns
    ]
    note = (
        "Means over the complete runs of each row; ± is the standard deviation over seeds. "
        "In brackets: the 95 % confidence interval of a difference, the certified interval of a shift."
    )
    body = [_row(study, cell, strip, places) for cell in ranked]
    table = element(
        "table",
        element("caption", "Results per normalizer and optimizer", class_="unseen"),
        element("thead", element("tr", head)),
        element("tbody", body),
        class_="results",
    )
    scroll = element("div", table, class_="scroll", tabindex="0", role="region", aria_label="Table of results")
    return join([scroll, element("p", note, class_="under"), _notes(rows)])


def _notes(rows: Sequence[Cell]) -> Markup | None:
    """Return what runs have to say about themselves, each remark once, with the rows it is about."""
    about: dict[str, list[str]] = {}
    for cell in rows:
        for note in dict.fromkeys(note for run in cell.runs for note in run.notes):
            about.setdefault(note, []).append(f"{cell.norm} with {cell.optim}")
    items = [element("li", element("b", listing(names)), f": {note}") for note, names in about.items()]
    return element("ul", items, class_="under") if items else None


class _Places(tuple[int, int]):
    """Decimals of the accuracy and of the difference column."""

    __slots__ = ()

    def __new__(cls, accuracy_: int, difference: int) -> _Places:
        return super().__new__(cls, (accuracy_, difference))


def _row(study: Study, cell: Cell, strip: Scale, places: _Places) -> Markup:
    norm, optim = study.norms.index(cell.norm), study.optims.index(cell.optim)
    base = cell.norm == study.baseline
    swatch = element(
        "svg",
        marker(marker_shape(optim), 8, 8, 4.6),
        xmlns="http://www.w3.org/2000/svg",
        viewBox="0 0 16 16",
        class_="swatch",
        aria_hidden="true",
    )
    cells = [
        element("th", swatch, element("span", cell.norm), scope="row", class_="name", data_v=cell.norm),
        element("td", cell.optim, class_="name", data_v=cell.optim),
        _cell(cell.test_accuracy.mean, _mean(cell.test_accuracy, places[0], 100), _strip(cell, strip, optim)),
        _runs(cell),
        _difference(cell, places[1], base),
        _cell(cell.train_loss.mean, _significant(cell.train_loss), None),
        _cell(cell.shift_w1.mean, significant(cell.shift_w1.mean), _interval(cell)),
        _cell(cell.shift_relative.mean, _significant(cell.shift_relative), None),
        _cell(
            cell.step_ratio.median if cell.step_ratio else cell.step_ms.median,
            f"{significant(cell.step_ratio.median)}×" if cell.step_ratio else MISSING,
            f"{significant(cell.step_ms.median)}\u202fms" if cell.step_ms else None,
        ),
    ]
    return element("tr", cells, class_=f"n{norm}{' base' if base else ''}", data_n=norm)


def _cell(value: float, main: str, below: Child) -> Markup:
    small = element("small", below) if below else None
    return element("td", element("span", main), small, class_="num", data_v="" if math.isnan(value) else repr(value))


def _mean(sample: Replicates, places: int, factor: float = 1.0) -> str:
    if not math.isfinite(sample.std):
        return fixed(factor * sample.mean, places)
    return f"{fixed(factor * sample.mean, places)} ± {fixed(factor * sample.std, places)}"


def _significant(sample: Replicates) -> str:
    """Return mean ± std, both with the decimals that give the mean three digits."""
    size = max(abs(sample.mean), sample.std if math.isfinite(sample.std) else 0.0)
    if not math.isfinite(size) or size == 0 or (not 1e-3 <= size < 1e6 and not math.isfinite(sample.std)):
        return significant(sample.mean)
    if not 1e-3 <= size < 1e6:
        exponent = math.floor(math.log10(size))
        return f"({_mean(sample, 2, 10.0**-exponent)})×{power_of_ten(exponent)}"
    return _mean(sample, max(0, 2 - math.floor(math.log10(size))))


def _difference(cell: Cell, places: int, base: bool) -> Markup:
    sample = cell.difference
    if base:
        return element("td", element("span", "baseline", class_="quiet"), class_="num", data_v="0")
    if not sample:
        return element("td", MISSING, class_="num", data_v="")
    text = signed(100 * sample.mean, places)
    below = None
    if math.isfinite(sample.std):
        text += f" ± {fixed(100 * sample.std, places)}"
    if math.isfinite(sample.margin):
        low, high = (signed(100 * (sample.mean + s * sample.margin), places) for s in (-1, 1))
        below = f"[{low}, {high}]"
    return element(
        "td",
        element("strong" if sample.separated else "span", text),
        element("small", below) if below else None,
        class_="num",
        data_v=repr(sample.mean),
    )


def _interval(cell: Cell) -> Child:
    if not cell.shift_lower:
        return None
    text = f"[{significant(cell.shift_lower.mean, 2)}, {significant(cell.shift_upper.mean, 2)}]"
    if cell.interval_holds is False:
        return [text, element("span", " violated", class_="bad")]
    return text


def _runs(cell: Cell) -> Markup:
    done = f"{len(cell.complete)} of {len(cell.runs)}"
    kinds = dict.fromkeys(run.status for run in cell.runs if not run.complete)
    badges = [
        element(
            "span",
            f"{sum(r.status == kind for r in cell.runs)} {kind}",
            class_=f"badge {kind}",
            title="; ".join(dict.fromkeys(r.reason for r in cell.runs if r.status == kind and r.reason)) or None,
        )
        for kind in kinds
    ]
    return element("td", element("span", done), badges or None, class_="num", data_v=len(cell.complete))


def _strip(cell: Cell, scale: Scale, optim: int) -> Child:
    """Return a drawing of the seeds on a line; the same scale in every row."""
    if not cell.test_accuracy:
        return None
    width, height = STRIP
    middle = height / 2
    places = [6.0 + (width - 12.0) * scale(v) for v in (*cell.test_accuracy.values, cell.test_accuracy.mean)]
    seeds = [marker("circle", place, middle, 2.4, class_="seed") for place in places[:-1]]
    mean = marker(marker_shape(optim), places[-1], middle, 3.8)
    return element(
        "svg",
        group(line(0, middle, width, middle, "grid"), seeds if cell.test_accuracy.n > 1 else None, mean),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {number(width)} {number(height)}",
        class_="strip",
        aria_hidden="true",
        data_range=f"{percent(scale.low)} to {percent(scale.high)}",
    )


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value
