"""Accuracy against shift: does a network whose layers shift less become more accurate?"""

from __future__ import annotations

import math
from collections.abc import Sequence

from flexnorm.lab.records import Cell, Run, Study
from flexnorm.lab.report.aggregate import rank_correlation
from flexnorm.lab.report.frame import Frame
from flexnorm.lab.report.markup import Markup, join
from flexnorm.lab.report.numbers import fixed, percent, significant
from flexnorm.lab.report.palette import marker_shape
from flexnorm.lab.report.scale import accuracy, linear, logarithmic
from flexnorm.lab.report.svg import Point, drawing, fit, group, line, marker, text, text_width


def scatter(study: Study, rows: Sequence[Cell], key: str, *, width: float, height: float) -> Markup | None:
    """Return the figure: a small mark per run, a large one per row of the table; None where no run has both numbers.

    Args:
        study: What was compared.
        rows: Its cells.
        key: A name that is unique on the page.
        width: Width of the view box.
        height: Height of the view box.
    """
    runs = plotted(study)
    if not runs:
        return None
    shifts = [run.shift_relative for run in runs]
    spans = min(shifts) > 0 and max(shifts) / min(shifts) > 4
    x = logarithmic(shifts, count=5) if spans else linear(shifts, count=5)
    y = accuracy([run.test_accuracy for run in runs])
    frame = Frame.fitting(width, height, x, y)
    # All marks take their place before the first name looks for one.
    labels = _Labels(frame, [frame.point(*_center(study, cell)) for cell in rows if _runs(study, cell)])
    groups = []
    for index, norm in enumerate(study.norms):
        parts = [_cell(frame, study, cell, labels) for cell in rows if cell.norm == norm]
        groups.append(group(*parts, class_=f"n{index}", data_n=index))
    said = "; ".join(
        _tip(c.norm, c.optim, c.shift_relative.mean, c.test_accuracy.mean)
        for c in rows
        if c.shift_relative and c.test_accuracy
    )
    return drawing(
        key,
        width,
        height,
        frame.grid(
            x_label=f"relative shift: W₁ {study.per} ÷ spread of the layer", heading="Test accuracy", vertical=True
        ),
        join(groups),
        title="Test accuracy against relative internal covariate shift",
        desc=f"{said}.",
    )


def plotted(study: Study) -> list[Run]:
    """Return the complete runs that have a finite accuracy and a finite shift."""
    return [r for r in study.complete if math.isfinite(r.test_accuracy) and math.isfinite(r.shift_relative)]


def correlation_note(study: Study) -> str:
    """Return what the rank correlation over all plotted runs is, and what it is not; empty below four runs."""
    runs = plotted(study)
    rho = (
        rank_correlation([r.shift_relative for r in runs], [r.test_accuracy for r in runs])
        if len(runs) > 3
        else math.nan
    )
    if math.isnan(rho):
        return ""
    return (
        f"Over the {len(runs)} runs, Spearman’s rank correlation between shift and accuracy is {fixed(rho, 2)} "
        "(−1: less shift always goes with more accuracy; +1: the reverse; 0: no such order). "
        "It describes these runs; it does not say that one causes the other."
    )


class _Labels:
    """Places for names that do not lie on each other: a name is written where it fits, else not at all."""

    def __init__(self, frame: Frame, marks: Sequence[Point]) -> None:
        self.frame = frame
        self.taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in marks]

    def place(self, x: float, y: float, content: str) -> Markup | None:
        wide = text_width(content, 11.5)
        for dx, dy in ((9, 4), (-9 - wide, 4), (-wide / 2, -10), (-wide / 2, 19)):
            box = (x + dx, y + dy - 10, x + dx + wide, y + dy + 2)
            inside = box[0] > self.frame.left and box[2] < self.frame.width - 2 and box[1] > 22
            if inside and not any(
                b[0] < box[2] and box[0] < b[2] and b[1] < box[3] and box[1] < b[3] for b in self.taken
            ):
                self.taken.append(box)
                return text(x + dx, y + dy, content, class_="name")
        return None


def _cell(frame: Frame, study: Study, cell: Cell, labels: _Labels) -> Markup:
    shape = marker_shape(study.optims.index(cell.optim))
    runs = _runs(study, cell)
    if not runs:
        return Markup("")
    mean_x, mean_y = _center(study, cell)
    at = frame.point(mean_x, mean_y)
    parts: list[Markup | None] = []
    for run in runs if len(runs) > 1 else ():
        place = frame.point(run.shift_relative, run.test_accuracy)
        parts += [
            line(*at, *place, "spoke"),
            marker(
                shape, *place, 2.4, class_="seed", tip=_tip(run.norm, run.optim, run.shift_relative, run.test_accuracy)
            ),
        ]
    parts.append(marker(shape, *at, 5.0, tip=_tip(cell.norm, cell.optim, mean_x, mean_y)))
    parts.append(labels.place(*at, fit(cell.norm, 110, 11.5)))
    return group(*parts)


def _runs(study: Study, cell: Cell) -> list[Run]:
    return [r for r in plotted(study) if r.norm == cell.norm and r.optim == cell.optim]


def _center(study: Study, cell: Cell) -> Point:
    runs = _runs(study, cell)
    return math.fsum(r.shift_relative for r in runs) / len(runs), math.fsum(r.test_accuracy for r in runs) / len(runs)


def _tip(norm: str, optim: str, shift: float, accuracy_: float) -> str:
    return f"{norm}, {optim}: accuracy {percent(accuracy_, 2)}, relative shift {significant(shift)}"
