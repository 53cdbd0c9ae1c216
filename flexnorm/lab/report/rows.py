"""Panels of rows: one row per normalizer, one mark per optimizer, every seed visible."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flexnorm.lab.report.frame import FONT, Frame
from flexnorm.lab.report.markup import Markup, join
from flexnorm.lab.report.palette import marker_shape
from flexnorm.lab.report.scale import Scale
from flexnorm.lab.report.svg import drawing, fit, group, line, marker, text, text_width

ROW = 34.0
"""Height of a row with up to three marks; more marks make it taller."""


@dataclass(frozen=True)
class Dot:
    """One mark of a row.

    Attributes:
        norm: Index of the normalizer, which gives row and colour.
        optim: Index of the optimizer, which gives the marker and the place within the row.
        label: What the mark stands for.
        mean: Where the mark is.
        std: Half the length of its whisker; NaN for none.
        values: The single seeds.
    """

    norm: int
    optim: int
    label: str
    mean: float
    std: float
    values: tuple[float, ...]


def rows_height(norms: int, optims: int) -> float:
    """Return the height of a panel with so many rows and so many marks in each."""
    return 74.0 + norms * _row_height(optims)


def _row_height(optims: int) -> float:
    return max(ROW, 11.0 * optims)


def rows_panel(
    key: str,
    dots: Sequence[Dot],
    names: Sequence[str],
    optims: int,
    x: Scale,
    *,
    title: str,
    heading: str,
    x_label: str,
    write: Callable[[float], str],
    reference: float = math.nan,
    width: float = 360.0,
) -> Markup:
    """Return one panel.

    Args:
        key: A name that is unique on the page.
        dots: The marks.
        names: Names of the rows, from the top.
        optims: How many optimizers share a row.
        x: Horizontal scale.
        title: What the panel is, for those who do not see it.
        heading: What tells it from its neighbours.
        x_label: Name and unit of the horizontal axis.
        write: How a value is written.
        reference: A value that gets a vertical line of its own; NaN for none.
        width: Width of the view box.
    """
    left = min(max((text_width(name, FONT + 1) for name in names), default=0.0) + 12.0, 0.32 * width)
    height, row = rows_height(len(names), optims), _row_height(optims)
    blank = Scale("linear", 0.0, 1.0, ())
    frame = Frame(width, height, x, blank, left=left, top=30.0)
    parts: list[Markup] = [frame.grid(heading=heading, x_label=x_label, vertical=True)]
    if math.isfinite(reference):
        parts.append(line(frame.px(reference), frame.top, frame.px(reference), height - frame.bottom, "reference"))
    for index, name in enumerate(names):
        middle = frame.top + (index + 0.5) * row
        label = text(left - 10, middle + 4, fit(name, left - 12, FONT + 1), anchor="end", class_="name")
        marks = [_dot(frame, d, middle + 11.0 * (d.optim - (optims - 1) / 2), write) for d in dots if d.norm == index]
        if index:
            parts.append(line(0, middle - row / 2, width - frame.right, middle - row / 2, "rule"))
        parts.append(group(label, marks, class_=f"n{index}", data_n=index))
    said = "; ".join(f"{d.label} {write(d.mean)}{f' ± {write(d.std)}' if math.isfinite(d.std) else ''}" for d in dots)
    return drawing(
        key, width, height, join(parts), title=title, desc=f"{said}." if said else "There is nothing to draw."
    )


def _dot(frame: Frame, dot: Dot, y: float, write: Callable[[float], str]) -> Markup:
    spread = f" ± {write(dot.std)}" if math.isfinite(dot.std) else ""
    tip = f"{dot.label}: {write(dot.mean)}{spread}"
    parts = []
    if math.isfinite(dot.std) and dot.std > 0:
        parts.append(line(frame.px(dot.mean - dot.std), y, frame.px(dot.mean + dot.std), y, "whisker"))
    if len(dot.values) > 1:
        parts += [marker("circle", frame.px(v), y, 1.7, class_="seed") for v in dot.values if math.isfinite(v)]
    if math.isfinite(dot.mean):
        parts.append(marker(marker_shape(dot.optim), frame.px(dot.mean), y, 4.0, tip=tip))
    return group(*parts)
