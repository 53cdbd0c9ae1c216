"""Panels of lines over time, with bands, markers and the data that the page's pointer reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flexnorm.lab.report.frame import Frame
from flexnorm.lab.report.markup import Markup, element, join, number
from flexnorm.lab.report.palette import dash, marker_shape
from flexnorm.lab.report.scale import Scale
from flexnorm.lab.report.svg import band, drawing, end_cross, group, marker, path

FEW = 10
"""Up to so many points a line shows each of them as a marker; beyond, only its last."""


@dataclass(frozen=True)
class Series:
    """One line of a panel.

    Attributes:
        norm: Index of the normalizer, which gives the colour.
        optim: Index of the optimizer, which gives dash and marker.
        label: Name in the legend and at the pointer.
        x: Positions.
        y: Values.
        low: Lower edge of the band, one per position; empty for no band.
        high: Upper edge of the band.
        ended: Whether this is a single run that ended early: drawn thin, with a cross at its end.
    """

    norm: int
    optim: int
    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    ended: bool = False

    @property
    def last(self) -> float:
        """The last finite value; NaN where there is none."""
        return next((v for v in reversed(self.y) if math.isfinite(v)), math.nan)


def line_panel(
    key: str,
    series: Sequence[Series],
    x: Scale,
    y: Scale,
    *,
    title: str,
    heading: str,
    x_label: str,
    y_label: str,
    write: Callable[[float], str],
    width: float = 360.0,
    height: float = 250.0,
) -> Markup:
    """Return one panel.

    Args:
        key: A name that is unique on the page.
        series: The lines, the first drawn below the others.
        x: Horizontal scale, shared with the neighbouring panels.
        y: Vertical scale, shared with the neighbouring panels.
        title: What the panel is, for those who do not see it.
        heading: What tells it from its neighbours.
        x_label: Name of the horizontal axis.
        y_label: Name of the vertical axis.
        write: How a value is written at the pointer and in the description.
        width: Width of the view box.
        height: Height of the view box.
    """
    frame = Frame.fitting(width, height, x, y)
    ends = [f"{s.label}{' (ended early)' if s.ended else ''} {write(s.last)}" for s in series]
    stops = sorted({v for s in series for v in s.x if math.isfinite(v)})
    return drawing(
        key,
        width,
        height,
        frame.grid(heading=heading, x_label=x_label, y_label=y_label),
        join(_line(frame, s, write, stops) for s in series),
        title=title,
        desc=f"Last values: {'; '.join(ends)}." if ends else "There is nothing to draw.",
        data_x=" ".join(number(frame.px(v)) for v in stops),
        data_at="|".join(f"{x_label} {v:g}" for v in stops),
        data_box=f"{number(frame.top)} {number(height - frame.bottom)}",
    )


def _line(frame: Frame, series: Series, write: Callable[[float], str], stops: Sequence[float]) -> Markup:
    points = [frame.point(a, b) for a, b in zip(series.x, series.y, strict=True)]
    known = [p for p in points if math.isfinite(p[0]) and math.isfinite(p[1])]
    parts: list[Markup] = []
    if series.low:
        edges = (series.low, series.high)
        lower, upper = ([frame.point(a, b) for a, b in zip(series.x, edge, strict=True)] for edge in edges)
        parts.append(band(lower, upper))
    if known:
        parts.append(path(known, class_="thin" if series.ended else "curve", dash=dash(series.optim)))
        if series.ended:
            parts.append(end_cross(*known[-1]))
        else:
            shown = known if len(known) <= FEW else known[-1:]
            parts += [marker(marker_shape(series.optim), px, py, 2.6) for px, py in shown]
    values = dict(zip(series.x, series.y, strict=True))
    return group(
        *parts,
        class_=f"n{series.norm}",
        data_n=series.norm,
        data_label=series.label,
        data_v="|".join(write(values.get(stop, math.nan)) for stop in stops),
    )


def legend_line(optim: int) -> Markup:
    """Return the sample of an optimizer's dash and marker for the legend."""
    return element(
        "svg",
        path([(1, 7), (33, 7)], class_="curve", dash=dash(optim)),
        marker(marker_shape(optim), 17, 7, 3.2),
        xmlns="http://www.w3.org/2000/svg",
        viewBox="0 0 34 14",
        class_="sample",
        aria_hidden="true",
    )
