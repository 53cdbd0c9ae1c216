"""The figures of a report, as charts: what a study's numbers look like."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flexnorm.lab.charts import Chart, Scale, Series, accuracy, hues, linear, log_or_linear, logarithmic, rows, save
from flexnorm.lab.charts.numbers import fixed, percent, significant
from flexnorm.lab.charts.svg import fit
from flexnorm.lab.records import Cell, EpochRow, Run, ShiftRow, Study
from flexnorm.lab.replicates import Replicates, mean
from flexnorm.lab.report.headline import headline
from flexnorm.lab.report.load import load

Interval = tuple[float, float, float]
Write = Callable[[float], str]


def _precise(fraction: float) -> str:
    return percent(fraction, 2)


def picture(out_dir: str | Path, path: str | Path) -> Path:
    """Write the main figure of a comparison as a file: accuracy, relative shift and step time per normalizer.

    An SVG file stands alone (no fonts, no links), has a light and a dark version in one, and a ground of its own, so
    that it can be read on any page.

    Args:
        out_dir: The folder that ``flexnorm compare --out`` wrote.
        path: Where the picture goes (.svg; .png and .pdf with the extra ``plot``); it is replaced in one step.

    Returns:
        The path of the picture.

    Raises:
        FileNotFoundError: If ``out_dir`` is no folder of a comparison.
        ValueError: If the suffix of ``path`` is that of no format.
        ImportError: If the format needs what is not installed.
        OSError: If the file cannot be written; what was there before stays.
    """
    study = load(out_dir)
    marks = [
        Series(fit(optim, 200, 12), (), (), kind="points", hue=-1, style=i) for i, optim in enumerate(study.optims)
    ]
    return save(
        path,
        summary(study),
        title=headline(study, study.cells).claim,
        hues=hues(study.norms, study.baseline),
        legend=marks,
        note=f"{study.subject}; marks: means over seeds, whiskers: one standard deviation, dots: single seeds",
    )


def _place(study: Study, norm: str, optim: str) -> dict[str, Any]:
    """Return colour and marker of a row of the table."""
    return {"hue": study.norms.index(norm), "style": study.optims.index(optim)}


def summary(study: Study) -> list[Chart]:
    """Return three charts with a row per normalizer: test accuracy, relative shift, step time."""
    cells, ratio = study.cells, study.has_baseline

    def step(cell: Cell) -> Replicates:
        return cell.step_ratio if ratio else cell.step_ms

    times = _all(cells, step)
    return [
        _rows(
            study,
            lambda c: c.test_accuracy,
            accuracy(_all(cells, lambda c: c.test_accuracy), count=4),
            _precise,
            heading="Test accuracy",
            x_label="further right is better",
        ),
        _rows(
            study,
            lambda c: c.shift_relative,
            log_or_linear(_all(cells, lambda c: c.shift_relative), count=4),
            significant,
            heading="Internal covariate shift, relative",
            x_label=f"W₁ {study.per} ÷ spread of the layer",
        ),
        _rows(
            study,
            # Of times the median, which one disturbed run does not move far.
            lambda c: Replicates((step(c).median,)) if step(c) else Replicates(),
            linear([*times, 1.0] if ratio else times, zero=True, count=4),
            (lambda v: f"{significant(v)}×") if ratio else (lambda v: f"{significant(v)}\u202fms"),
            heading=f"Time per step, relative to {study.baseline}" if ratio else "Time per step",
            x_label=f"times {study.baseline}" if ratio else "ms",
            seeds=step,
            references=(1.0,) if ratio else (),
        ),
    ]


def _all(cells: Sequence[Cell], pick: Callable[[Cell], Replicates]) -> list[float]:
    return [value for cell in cells for value in pick(cell).values]


def _rows(
    study: Study,
    pick: Callable[[Cell], Replicates],
    x: Scale,
    write: Write,
    *,
    heading: str,
    x_label: str,
    seeds: Callable[[Cell], Replicates] | None = None,
    references: Sequence[float] = (),
) -> Chart:
    """Return a chart of one quantity: the mean of every cell, its standard deviation and its single seeds."""
    several = len(study.optims)
    y = rows([(norm, i) for i, norm in enumerate(study.norms)], height=max(34.0, 11.0 * several))
    series = []
    for cell in study.cells:
        found, place = pick(cell), _place(study, cell.norm, cell.optim)
        if not math.isfinite(found.mean):
            continue
        at = y.ticks[place["hue"]].value + 11.0 * (place["style"] - (several - 1) / 2)
        name = f"{cell.norm}, {cell.optim}"
        values = [v for v in (seeds or pick)(cell).values if math.isfinite(v)]
        series.append(
            Series(
                name,
                (found.mean,),
                (at,),
                (found.mean - found.std,),
                (found.mean + found.std,),
                kind="points",
                tips=(f"{name}: {write(found.mean)}{f' ± {write(found.std)}' if math.isfinite(found.std) else ''}",),
                seeds=[(v, at, "") for v in values] if len(values) > 1 else (),
                **place,
            )
        )
    words: dict[str, Any] = {"heading": heading, "x_label": x_label, "references": references}
    return Chart(f"{heading} per normalizer and optimizer", x, y, series, write=write, **words)


def loss_curves(study: Study) -> list[Chart]:
    """Return the training loss per epoch, a chart per optimizer."""
    return _curves(study, "Training loss", "cross-entropy (nats)", lambda r: r.train_loss, log_or_linear, significant)


def accuracy_curves(study: Study) -> list[Chart]:
    """Return the test accuracy per epoch, a chart per optimizer."""
    return _curves(study, "Test accuracy", "fraction correct", lambda r: r.test_accuracy, accuracy, _precise)


def _curves(
    study: Study,
    title: str,
    y_label: str,
    pick: Callable[[EpochRow], float],
    scale: Callable[[Sequence[float]], Scale],
    write: Write,
) -> list[Chart]:
    tracks = {id(run): _track(run, pick) for run in study.runs}
    started = [run for run in study.runs if tracks[id(run)]]
    if not started:
        return []
    y = scale([v for run in started for v in tracks[id(run)].values()])
    x = linear([row.epoch for run in started for row in run.epochs], integer=True, tight=True, count=6)
    charts = []
    for optim in study.optims:
        series: list[Series] = []
        for norm in study.norms:
            place = _place(study, norm, optim)
            runs = [run for run in study.of(norm, optim) if tracks[id(run)]]
            if done := [tracks[id(run)] for run in runs if run.complete]:
                series.append(mean_series(norm, done, **place))
            for run in runs:
                if not run.complete:
                    track = tracks[id(run)]
                    name = f"{norm}, seed {run.seed}, {run.status}"
                    series.append(Series(name, tuple(track), tuple(track.values()), ended=True, **place))
        if any(run.optim == optim for run in started):
            words: dict[str, Any] = {"heading": optim, "x_label": "epoch", "y_label": y_label}
            charts.append(Chart(f"{title} per epoch with {optim}", x, y, series[::-1], write=write, **words))
    return charts


def _track(run: Run, pick: Callable[[EpochRow], float]) -> dict[float, float]:
    """Return a run's finite values by epoch."""
    return {row.epoch: pick(row) for row in run.epochs if math.isfinite(pick(row)) and math.isfinite(row.epoch)}


def mean_series(label: str, tracks: Sequence[dict[float, float]], *, hue: int = 0, style: int = 0) -> Series:
    """Return the mean over runs at each position, and as a band the smallest and the largest of them."""
    stops = sorted({x for track in tracks for x in track})
    columns = [[track[x] for track in tracks if x in track] for x in stops]
    low, high = ([f(c) for c in columns] if len(tracks) > 1 else () for f in (min, max))
    return Series(label, stops, [mean(c) for c in columns], low, high, hue=hue, style=style)


class Depth(NamedTuple):
    """The layers of the networks that are compared with each other: what they are called, and their name by norm."""

    label: str
    names: dict[str, str]


def depths(study: Study) -> list[Depth]:
    """Return the layers to compare.

    Networks with equally many measured layers are matched by position (a normalization may be a module of another
    name), all others by name.
    """
    layers: dict[str, tuple[str, ...]] = {}
    for run in study.complete:
        if run.shifts:
            layers.setdefault(run.norm, run.layers)
    if len({len(names) for names in layers.values()}) == 1:
        found = []
        for index, names in enumerate(zip(*layers.values(), strict=True)):
            label = names[0] if len(set(names)) == 1 else f"layer {index + 1}"
            found.append(Depth(label, dict(zip(layers, names, strict=True))))
        return found
    every = dict.fromkeys(name for names in layers.values() for name in names)
    return [Depth(name, {norm: name for norm in layers if name in layers[norm]}) for name in every]


def shift_scale(study: Study, relative: bool) -> Scale:
    """Return the vertical scale that all charts of the shift share: logarithmic where they span more than ten.

    Lower bounds far below every estimate do not stretch it; such a band is cut off at the edge.
    """
    found = [row.value(relative) for run in study.complete for row in run.shifts]
    floor = min((m for _, m, _ in found if math.isfinite(m) and m > 0), default=0.0) / 1.5
    lows = [max(low, floor) if math.isfinite(low) else math.nan for low, _, _ in found]
    return log_or_linear(lows + [v for _, middle, high in found for v in (middle, high)])


def shift_over_time(study: Study, optim: str, chosen: Sequence[Depth], relative: bool, y: Scale) -> list[Chart]:
    """Return the shift over training steps with one optimizer, one chart per layer.

    Lines are means over the seeds of the estimate at every measured step, bands those of the bounds.
    """
    x = linear([row.step for run in study.complete for row in run.shifts], integer=True, tight=True, count=4)
    charts = []
    for depth in chosen:
        series = []
        for norm in sorted(depth.names, key=study.norms.index, reverse=True):
            at: dict[float, list[ShiftRow]] = {}
            for row in _measured(study, norm, optim, depth.names[norm]):
                if math.isfinite(row.step) and math.isfinite(row.value(relative)[1]):
                    at.setdefault(row.step, []).append(row)
            series += _banded(study, norm, optim, {step: at[step] for step in sorted(at)}, relative)
        charts.append(
            _shift_chart(study, series, x, y, f"of {depth.label} over training", optim, relative, depth.label)
        )
    return charts


def shift_over_depth(study: Study, relative: bool, y: Scale) -> list[Chart]:
    """Return the shift over the depth of the network, averaged over training, one chart per optimizer."""
    every = depths(study)
    x = linear(range(1, len(every) + 1), integer=True, tight=True, count=8)
    charts = []
    for optim in study.optims:
        series = []
        for norm in reversed(study.norms):
            places = {float(i + 1): depth.names[norm] for i, depth in enumerate(every) if norm in depth.names}
            at = {place: _measured(study, norm, optim, layer) for place, layer in places.items()}
            series += _banded(study, norm, optim, at if any(at.values()) else {}, relative)
        if series:
            charts.append(_shift_chart(study, series, x, y, "over the depth of the network", optim, relative, ""))
    return charts


def _shift_chart(
    study: Study, series: Sequence[Series], x: Scale, y: Scale, what: str, optim: str, relative: bool, layer: str
) -> Chart:
    kind = "relative" if relative else "absolute"
    return Chart(
        f"{kind.capitalize()} shift {what} with {optim}",
        x,
        y,
        series,
        heading=layer or optim,
        x_label="step" if layer else "layer",
        y_label=f"W₁ {study.per} ÷ spread" if relative else f"W₁ {study.per}",
        height=230.0 if layer else 250.0,
    )


def _measured(study: Study, norm: str, optim: str, layer: str) -> list[ShiftRow]:
    return [row for run in study.of(norm, optim) if run.complete for row in run.shifts if row.layer == layer]


def _banded(study: Study, norm: str, optim: str, at: dict[float, list[ShiftRow]], relative: bool) -> list[Series]:
    """Return a line through the means of the rows at each position, with the means of their bounds as its band."""
    if not at:
        return []
    low, middle, high = zip(*(_interval(row.value(relative) for row in found) for found in at.values()), strict=True)
    return [Series(norm, tuple(at), middle, low, high, **_place(study, norm, optim))]


def _interval(found: Iterable[Interval]) -> Interval:
    """Return the mean of each column over its finite entries; NaN where there are none."""
    columns = [[v for v in column if math.isfinite(v)] for column in zip(*found, strict=True)] or [[], [], []]
    low, middle, high = map(mean, columns)
    return low, middle, high


def scatter(study: Study, *, width: float, height: float) -> Chart | None:
    """Return the chart: a small mark per run, a large one per row of the table; None where no run has both numbers."""
    runs = _plotted(study)
    if not runs:
        return None

    def said(who: Run | Cell, shift: float, share: float) -> str:
        return f"{who.norm}, {who.optim}: accuracy {_precise(share)}, relative shift {significant(shift)}"

    series = []
    for cell in sorted(study.cells, key=lambda c: study.norms.index(c.norm)):
        own = [run for run in cell.runs if run in runs]
        if own:
            x, y = mean([r.shift_relative for r in own]), mean([r.test_accuracy for r in own])
            dots = [(r.shift_relative, r.test_accuracy, said(r, r.shift_relative, r.test_accuracy)) for r in own]
            series.append(
                Series(
                    f"{cell.norm}, {cell.optim}",
                    (x,),
                    (y,),
                    kind="points",
                    tips=(said(cell, x, y),),
                    notes=(fit(cell.norm, 110, 11.5),),
                    seeds=dots if len(dots) > 1 else (),
                    **_place(study, cell.norm, cell.optim),
                )
            )
    shifts = [run.shift_relative for run in runs]
    spans = min(shifts) > 0 and max(shifts) / min(shifts) > 4
    return Chart(
        "Test accuracy against relative internal covariate shift",
        logarithmic(shifts, count=5) if spans else linear(shifts, count=5),
        accuracy([run.test_accuracy for run in runs]),
        series,
        heading="Test accuracy",
        x_label=f"relative shift: W₁ {study.per} ÷ spread of the layer",
        vertical=True,
        width=width,
        height=height,
    )


def _plotted(study: Study) -> list[Run]:
    """Return the complete runs that have a finite accuracy and a finite shift."""
    return [r for r in study.complete if math.isfinite(r.test_accuracy) and math.isfinite(r.shift_relative)]


def correlation_note(study: Study) -> str:
    """Return what the rank correlation over all plotted runs is, and what it is not; empty below four runs."""
    runs = _plotted(study)
    rho = rank_correlation([r.shift_relative for r in runs], [r.test_accuracy for r in runs])
    if len(runs) < 4 or math.isnan(rho):
        return ""
    return (
        f"Over the {len(runs)} runs, Spearman’s rank correlation between shift and accuracy is {fixed(rho, 2)} "
        "(−1: less shift always goes with more accuracy; +1: the reverse; 0: no such order). "
        "It describes these runs; it does not say that one causes the other."
    )


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Spearman's rank correlation of two sequences of finite numbers; NaN if one is constant or below three."""
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return math.nan
    return statistics.correlation(_ranks(x), _ranks(y))


def _ranks(values: Sequence[float]) -> list[float]:
    """Return the rank of every value; equal ones share the mean of theirs."""
    ordered = sorted(values)
    return [ordered.index(v) + (ordered.count(v) - 1) / 2 for v in values]


def steps(study: Study, *, width: float) -> Chart | None:
    """Return a bar per cell, relative to the baseline or in milliseconds without one; None where there is no time."""
    relative = study.has_baseline and any(cell.step_ratio for cell in study.cells)
    shown = [cell for cell in study.cells if math.isfinite((cell.step_ratio if relative else cell.step_ms).median)]
    if not shown:
        return None
    times = [v for c in shown for v in (c.step_ratio if relative else c.step_ms).values]
    y = rows([(f"{c.norm} {c.optim}", study.norms.index(c.norm)) for c in shown], height=17.0, gap=10.0)
    series = []
    for cell, tick in zip(shown, y.ticks, strict=True):
        own = cell.step_ratio if relative else cell.step_ms
        ms = f"{significant(cell.step_ms.median)}\u202fms"
        note = f"{significant(cell.step_ratio.median)}× · {ms}" if relative else ms
        series.append(
            Series(
                f"{cell.norm}, {cell.optim}",
                (own.median,),
                (tick.value,),
                kind="bar",
                tips=(f"{cell.norm}, {cell.optim}: {note}",),
                notes=(note,),
                seeds=[(v, tick.value, "") for v in own.values] if own.n > 1 else (),
                **_place(study, cell.norm, cell.optim),
            )
        )
    return Chart(
        f"Time per optimizer step relative to {study.baseline}" if relative else "Time per optimizer step",
        linear(times, zero=True, count=5 if width > 500 else 3),
        y,
        series,
        x_label=f"× {study.baseline}" if relative else "ms per step",
        references=(1.0,) if relative else (),
        width=width,
    )
