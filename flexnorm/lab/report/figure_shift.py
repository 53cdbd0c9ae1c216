"""Internal covariate shift per layer over time, and over the depth of the network, with its certified interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flexnorm.lab.records import Run, ShiftRow, Study
from flexnorm.lab.report.lines import Series, line_panel
from flexnorm.lab.report.markup import Markup
from flexnorm.lab.report.numbers import significant
from flexnorm.lab.report.scale import Scale, linear, log_or_linear

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Depth:
    """One column of the figure: the layers of the networks that are compared with each other.

    Attributes:
        label: What it is called.
        names: The layer's name per normalizer.
    """

    label: str
    names: dict[str, str]


def depths(study: Study) -> list[Depth]:
    """Return the layers to compare.

    Networks with equally many measured layers are matched by position (a normalization may be a module of another
    name), all
    others by name.
    """
    layers: dict[str, tuple[str, ...]] = {}
    for run in study.complete:
        if run.shifts and run.norm not in layers:
            layers[run.norm] = run.layers
    if len({len(names) for names in layers.values()}) == 1:
        out = []
        for index, names in enumerate(zip(*layers.values(), strict=True)):
            same = len(set(names)) == 1
            out.append(Depth(names[0] if same else f"layer {index + 1}", dict(zip(layers, names, strict=True))))
        return out
    every = dict.fromkeys(name for names in layers.values() for name in names)
    return [Depth(name, {norm: name for norm in layers if name in layers[norm]}) for name in every]


def shift_scale(study: Study, relative: bool) -> Scale:
    """Return the vertical scale that all panels share: logarithmic where they span more than a factor of ten.

    Lower bounds far below every estimate do not stretch it; such a band is cut off at the edge.
    """
    rows = [row.value(relative) for run in study.complete for row in run.shifts]
    middles = [m for _, m, _ in rows if math.isfinite(m) and m > 0]
    floor = min(middles, default=0.0) / 1.5
    return log_or_linear(
        [max(low, floor) if math.isfinite(low) else math.nan for low, _, _ in rows]
        + [v for _, middle, high in rows for v in (middle, high)]
    )


def time_panels(study: Study, optim: str, chosen: Sequence[Depth], relative: bool, y: Scale) -> list[Markup]:
    """Return the shift over training steps with one optimizer, one panel per layer."""
    kind = "relative" if relative else "absolute"
    x = linear([row.step for run in study.complete for row in run.shifts], integer=True, tight=True, count=4)
    every = depths(study)
    return [
        line_panel(
            f"shift-{kind}-{study.optims.index(optim)}-{every.index(depth)}",
            time_series(study, optim, depth, relative),
            x,
            y,
            title=f"{kind.capitalize()} shift of {depth.label} over training with {optim}",
            heading=depth.label,
            x_label="step",
            y_label=f"W₁ {study.per} ÷ spread" if relative else f"W₁ {study.per}",
            write=significant,
            height=230.0,
        )
        for depth in chosen
    ]


def time_series(study: Study, optim: str, depth: Depth, relative: bool) -> list[Series]:
    """Return a line per normalizer: means over the seeds of estimate, lower and upper bound at every measured step."""
    series = []
    for norm, layer in depth.names.items():
        by_step: dict[float, list[Triple]] = {}
        for run in study.of(norm, optim):
            for row in run.shifts if run.complete else ():
                if row.layer == layer and math.isfinite(row.step) and math.isfinite(row.value(relative)[1]):
                    by_step.setdefault(row.step, []).append(row.value(relative))
        if by_step:
            stops = sorted(by_step)
            low, middle, high = zip(*(_mean(by_step[step]) for step in stops), strict=True)
            place = (study.norms.index(norm), study.optims.index(optim))
            series.append(Series(*place, norm, tuple(stops), middle, low, high))
    return sorted(series, key=lambda s: -s.norm)


def depth_panels(study: Study, relative: bool, y: Scale) -> list[Markup]:
    """Return the shift over the depth of the network, averaged over training, one panel per optimizer."""
    every, kind = depths(study), "relative" if relative else "absolute"
    x = linear(range(1, len(every) + 1), integer=True, tight=True, count=8)
    out = []
    for index, optim in enumerate(study.optims):
        series = []
        for norm in reversed(study.norms):
            runs = [run for run in study.of(norm, optim) if run.complete and run.shifts]
            stops = [i for i, depth in enumerate(every) if norm in depth.names]
            rows = [_mean(_values(runs, every[i].names[norm], relative)) for i in stops]
            if runs and rows:
                low, middle, high = zip(*rows, strict=True)
                place = tuple(float(i + 1) for i in stops)
                series.append(Series(study.norms.index(norm), index, norm, place, middle, low, high))
        if series:
            out.append(
                line_panel(
                    f"depth-{kind}-{index}",
                    series,
                    x,
                    y,
                    title=f"{kind.capitalize()} shift over the depth of the network with {optim}",
                    heading=optim,
                    x_label="layer",
                    y_label=f"W₁ {study.per} ÷ spread" if relative else f"W₁ {study.per}",
                    write=significant,
                )
            )
    return out


def _values(runs: Iterable[Run], layer: str, relative: bool) -> list[Triple]:
    rows: list[ShiftRow] = [row for run in runs for row in run.shifts if row.layer == layer]
    return [row.value(relative) for row in rows]


def _mean(rows: Sequence[Triple]) -> Triple:
    """Return the mean of each column over its finite entries; NaN where there are none."""
    columns = [[v for v in column if math.isfinite(v)] for column in zip(*rows, strict=True)] or [[], [], []]
    low, middle, high = (math.fsum(c) / len(c) if c else math.nan for c in columns)
    return low, middle, high
