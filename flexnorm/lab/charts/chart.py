"""Charts: two scales, and on them lines with bands, points with intervals, and bars."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flexnorm.lab.charts.markup import Markup, element, join, number
from flexnorm.lab.charts.numbers import significant
from flexnorm.lab.charts.palette import dash, marker_shape
from flexnorm.lab.charts.scale import Scale
from flexnorm.lab.charts.svg import Point, band, drawing, end_cross, fit, group, line, marker, path, text, text_width

FONT = 11.5
"""Size of the text of an axis, in pixels of the view box."""

FEW = 10
"""Up to so many points a line shows each of them as a marker; beyond, only its last."""

BAR = 13.0
"""Thickness of a bar."""


Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Series:
    """One line, some points or some bars, in the units of the data.

    Attributes:
        label: Name in the legend and at the pointer.
        x: Positions.
        y: Values, as many; in a chart of rows the places of the marks from the top, in pixels.
        low: Lower ends of an interval around the values (in a chart of rows: around the positions), as many, or empty.
        high: Upper ends, likewise.
        kind: ``"line"`` (with markers where they are few, else with one at its end), ``"curve"`` (a line without any),
            ``"points"``, or ``"bar"`` (from the left edge of a chart of rows).
        hue: Index of the colour; negative for grey.
        style: Index of dash and marker.
        tips: What is shown where a point is pointed at, as many; by default its position and value.
        notes: Text at the points, as many, or empty; at a point that has no room for it, it is left out.
        seeds: Small marks of the single values behind a point: position, value, and what is shown when pointed at.
        ended: Whether this is a run that ended early: drawn thin, with a cross at its end.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    kind: str = "line"
    hue: int = 0
    style: int = 0
    tips: Sequence[str] = ()
    notes: Sequence[str] = ()
    seeds: Sequence[tuple[float, float, str]] = ()
    ended: bool = False

    @property
    def last(self) -> float:
        """The last finite value; NaN where there is none."""
        return next((v for v in reversed(self.y) if math.isfinite(v)), math.nan)


@dataclass(frozen=True)
class Chart:
    """One panel.

    Attributes:
        title: What it is, for those who do not see it.
        x: Horizontal scale.
        y: Vertical scale; that of :func:`rows` makes a chart of rows, whose height follows from them.
        series: What is drawn, the first below the others.
        heading: What tells the panel from its neighbours.
        x_label: Name and unit of the horizontal axis.
        y_label: Name and unit of the vertical axis; it stands above it, where it is read without turning the head.
        write: How a value is written at the pointer and in the description.
        references: Positions that get a dotted vertical line.
        vertical: Whether the horizontal axis has grid lines too.
        width: Width of the view box.
        height: Height of the view box.
    """

    title: str
    x: Scale
    y: Scale
    series: Sequence[Series]
    heading: str = ""
    x_label: str = ""
    y_label: str = ""
    write: Callable[[float], str] = significant
    references: Sequence[float] = ()
    vertical: bool = False
    width: float = 360.0
    height: float = 250.0

    @property
    def by_rows(self) -> bool:
        """Whether the vertical axis has names instead of numbers."""
        return self.y.kind == "rows"

    @cached_property
    def left(self) -> float:
        """Margin for the labels of the vertical axis."""
        widest = max((text_width(tick.label, FONT + self.by_rows) for tick in self.y.ticks), default=0.0)
        if self.by_rows:
            return min(widest + (34.0 if self._bars else 12.0), 0.38 * self.width)
        return max(26.0, widest + 10.0)

    @cached_property
    def right(self) -> float:
        """Margin on the right, where bars have their values."""
        notes = [text_width(note, FONT) for s in self._bars for note in s.notes]
        return max(notes) + 16.0 if notes else 14.0

    @property
    def top(self) -> float:
        """Margin for heading and name of the vertical axis."""
        return 8.0 + (22.0 if self.heading else 6.0 * bool(self.y_label)) + (14.0 if self.y_label else 0.0)

    @property
    def bottom(self) -> float:
        """Where the horizontal axis lies."""
        return self.top + self.y.low if self.by_rows else self.height - 38.0

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of the view box."""
        return self.width, self.bottom + 38.0

    @property
    def _bars(self) -> list[Series]:
        return [s for s in self.series if s.kind == "bar"]

    def px(self, value: float) -> float:
        """Return where a value lies horizontally."""
        return self.left + (self.width - self.left - self.right) * self.x(value)

    def py(self, value: float) -> float:
        """Return where a value lies vertically."""
        return self.bottom - (self.bottom - self.top) * self.y(value)

    def point(self, x: float, y: float) -> Point:
        """Return where a pair of values lies."""
        return self.px(x), self.py(y)

    def tips(self, series: Series) -> Sequence[str]:
        """Return what is shown where the points of a series are pointed at."""
        pairs = zip(series.x, series.y, strict=True)
        return series.tips or [f"{series.label}: {self.x_label} {x:g}, {self.write(y)}" for x, y in pairs]

    @property
    def description(self) -> str:
        """What the chart shows, in words."""
        lines = [s for s in self.series if s.kind in ("line", "curve") or not s.tips]
        ends = [f"{s.label}{' (ended early)' if s.ended else ''} {self.write(s.last)}" for s in lines]
        said = [*([f"Last values: {'; '.join(ends)}"] if ends else []), *(tip for s in self.series for tip in s.tips)]
        return f"{'; '.join(said)}." if said else "There is nothing to draw."

    def svg(self, key: str, *, pointer: bool = True) -> Markup:
        """Return the chart as an SVG element.

        Args:
            key: A name that is unique on the page.
            pointer: Whether a line chart carries the data that the page's script shows at the pointer.
        """
        lines = [s for s in self.series if s.kind in ("line", "curve")]
        stops = sorted({v for s in lines for v in s.x if math.isfinite(v)}) if pointer and lines else []
        data: dict[str, Any] = {
            "data_x": " ".join(number(self.px(v)) for v in stops),
            "data_at": "|".join(f"{self.x_label} {v:g}" for v in stops),
            "data_box": f"{number(self.top)} {number(self.bottom)}",
        }
        # All marks take their place before the first note looks for one.
        taken = [(x - 6, y - 6, x + 6, y + 6) for s in self.series if s.notes for x, y in map(self.point, s.x, s.y)]
        return drawing(
            key,
            *self.size,
            self.frame(),
            [self._draw(s, stops, taken) for s in self.series],
            title=self.title,
            desc=self.description,
            **(data if pointer and lines else {}),
        )

    def frame(self) -> Markup:
        """Return grid lines, labels of ticks and axes, references, and a heading above the plot."""
        x0, x1, y0 = self.left, self.width - self.right, self.bottom
        parts: list[Markup] = [*(self._row_names() if self.by_rows else self._y_ticks()), *self._x_ticks()]
        parts.append(line(x0, y0, x1, y0, "base"))
        parts += [line(self.px(v), self.top, self.px(v), y0, "reference") for v in self.references]
        if self.heading:
            parts.append(text(0, 12, fit(self.heading, self.width, 13), class_="heading"))
        if self.y_label:
            parts.append(text(0, self.top - 16, fit(self.y_label, self.width, FONT), class_="label"))
        if self.x_label:
            parts.append(text(x1, y0 + 33, self.x_label, anchor="end", class_="label"))
        return group(join(parts), aria_hidden="true")

    def _y_ticks(self) -> Iterator[Markup]:
        for tick in self.y.ticks:
            y = self.py(tick.value)
            yield line(self.left, y, self.width - self.right, y, "grid")
            yield text(self.left - 7, y + 4, tick.label, anchor="end", class_="tick")
        if self.y.zero_at_edge:
            yield text(self.left - 7, self.bottom + 4, "0", anchor="end", class_="tick")

    def _row_names(self) -> Iterator[Markup]:
        gap = 24.0 if self._bars else 10.0
        before = None
        for tick in self.y.ticks:
            y = self.py(tick.value)
            if before is not None and before.hue != tick.hue:
                edge = (y + self.py(before.value)) / 2
                yield line(0, edge, self.width - self.right, edge, "rule")
            before = tick
            name = text(
                self.left - gap, y + 4, fit(tick.label, self.left - gap - 2, FONT + 1), anchor="end", class_="name"
            )
            yield group(name, class_=f"n{tick.hue}", data_n=tick.hue)

    def _x_ticks(self) -> Iterator[Markup]:
        y0, vertical = self.bottom, self.vertical or self.by_rows
        if self.x.zero_at_edge:
            yield text(self.left, y0 + 16, "0", anchor="middle", class_="tick")
        free = self.left + 8 if self.x.zero_at_edge else -1e9
        for tick in self.x.ticks:
            x, half = self.px(tick.value), text_width(tick.label, FONT) / 2
            yield line(x, self.top, x, y0, "grid") if vertical else line(x, y0, x, y0 + 4, "stem")
            # A label that would touch its neighbour is left out rather than printed over it.
            if x - half > free + 4 and x + half < self.width + 10:
                yield text(x, y0 + 16, tick.label, anchor="middle", class_="tick")
                free = x + half

    def _draw(self, series: Series, stops: Sequence[float], taken: list[Box]) -> Markup:
        places = [self.point(x, y) for x, y in zip(series.x, series.y, strict=True)]
        data: dict[str, object] = {}
        if series.kind in ("line", "curve"):
            parts = list(self._line(series, places))
            if stops:
                values = dict(zip(series.x, series.y, strict=True))
                shown = "|".join(self.write(values.get(stop, math.nan)) for stop in stops)
                data = {"data_label": series.label, "data_v": shown}
        else:
            parts = list(self._bar(series, places) if series.kind == "bar" else self._points(series, places, taken))
        if series.hue < 0:
            return group(*parts, class_="plain", **data)
        return group(*parts, class_=f"n{series.hue}", data_n=series.hue, **data)

    def _line(self, series: Series, places: Sequence[Point]) -> Iterator[Markup]:
        known = [place for place in places if all(map(math.isfinite, place))]
        if series.low:
            yield band(*(list(map(self.point, series.x, edge)) for edge in (series.low, series.high)))
        if not known:
            return
        yield path(known, class_="thin" if series.ended else "curve", dash=dash(series.style))
        if series.ended:
            yield end_cross(*known[-1])
        elif series.kind == "line":
            shown = known if len(known) <= FEW else known[-1:]
            yield join(marker(marker_shape(series.style), x, y, 2.6) for x, y in shown)

    def _points(self, series: Series, places: Sequence[Point], taken: list[Box]) -> Iterator[Markup]:
        shape = marker_shape(series.style)
        for low, high, x, y in zip(series.low, series.high, series.x, series.y, strict=bool(series.low)):
            if math.isfinite(low) and high > low:
                ends = (
                    (*self.point(low, y), *self.point(high, y))
                    if self.by_rows
                    else (*self.point(x, low), *self.point(x, high))
                )
                yield line(*ends, "whisker")
        for x, y, tip in series.seeds:
            if not self.by_rows:
                yield line(*places[0], *self.point(x, y), "spoke")
            round_, radius = ("circle", 1.7) if self.by_rows else (shape, 2.4)
            yield marker(round_, *self.point(x, y), radius, class_="seed", tip=tip)
        for place, tip in zip(places, self.tips(series), strict=True):
            if all(map(math.isfinite, place)):
                yield marker(shape, *place, 4.0 if series.tips else 2.8, tip=tip)
        for (x, y), note in zip(places, series.notes, strict=False):
            if (spot := self._free(x, y, note, taken)) is not None:
                yield text(*spot, note, class_="name")

    def _bar(self, series: Series, places: Sequence[Point]) -> Iterator[Markup]:
        for (x, y), tip in zip(places, self.tips(series), strict=True):
            yield marker(marker_shape(series.style), self.left - 13, y, 3.4)
            shape = {"x": self.left, "y": y - BAR / 2, "width": max(x - self.left, 0.5), "height": BAR, "rx": 1.5}
            yield element("rect", element("title", tip), class_="bar", **shape)
        for x, y, tip in series.seeds:
            yield marker("circle", *self.point(x, y), 1.8, class_="pip", tip=tip)
        reach = max((self.px(x) for x, _, _ in series.seeds), default=0.0)
        for (x, y), note in zip(places, series.notes, strict=False):
            yield text(max(x, reach) + 8, y + 4, note, class_="value")

    def _free(self, x: float, y: float, note: str, taken: list[Box]) -> Point | None:
        """Return where a note fits beside a point without lying on anything, and take that place."""
        wide = text_width(note, FONT)
        for dx, dy in ((9, 4), (-9 - wide, 4), (-wide / 2, -10), (-wide / 2, 19)):
            box = (x + dx, y + dy - 10, x + dx + wide, y + dy + 2)
            inside = box[0] > self.left and box[2] < self.width - 2 and box[1] > 22
            if inside and not any(b[0] < box[2] and box[0] < b[2] and b[1] < box[3] and box[1] < b[3] for b in taken):
                taken.append(box)
                return x + dx, y + dy
        return None


def legend_sample(series: Series, x: float = 0.0, y: float = 7.0) -> Markup:
    """Return what a series looks like, 34 pixels wide, for a legend.

    Args:
        series: The series; its data do not matter.
        x: Left end.
        y: Middle.
    """
    parts: list[Markup] = []
    if series.kind in ("line", "curve"):
        parts.append(path([(x + 1, y), (x + 33, y)], class_="curve", dash=dash(series.style)))
    if series.kind in ("line", "points"):
        parts.append(marker(marker_shape(series.style), x + 17, y, 3.2))
    return group(*parts, class_="plain" if series.hue < 0 else f"n{series.hue}")
