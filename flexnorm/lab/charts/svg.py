"""SVG primitives: text, lines, bands, markers, and the drawing that holds them, in pixels of the view box."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from flexnorm.lab.charts.markup import Child, Markup, element, number

XMLNS = "http://www.w3.org/2000/svg"

Point = tuple[float, float]


def drawing(
    key: str, width: float, height: float, *children: Child, title: str, desc: str, **attributes: object
) -> Markup:
    """Return an SVG that says what it is and what it shows; ids are made from a key that is unique on the page."""
    return element(
        "svg",
        element("title", title, id=f"{key}-t"),
        element("desc", desc, id=f"{key}-d"),
        children,
        xmlns=XMLNS,
        width=float(width),
        height=float(height),
        viewBox=f"0 0 {number(width)} {number(height)}",
        role="img",
        aria_labelledby=f"{key}-t {key}-d",
        **{"class": "plot", **attributes},
    )


def group(*children: Child, **attributes: object) -> Markup:
    """Return a ``g``."""
    return element("g", *children, **attributes)


def text(x: float, y: float, content: str, *, anchor: str = "start", class_: str | None = None) -> Markup:
    """Return one line of text at its baseline; anchor is ``start``, ``middle`` or ``end``."""
    return element(
        "text", content, x=float(x), y=float(y), class_=class_, text_anchor=None if anchor == "start" else anchor
    )


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """Return a straight line."""
    return element("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def path(points: Iterable[Point], *, class_: str, dash: str = "", close: bool = False) -> Markup:
    """Return a polyline through points; those with a coordinate that is not finite are passed over."""
    known = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    d = "L".join(f"{number(x)} {number(y)}" for x, y in known)
    return element(
        "path", d=f"M{d}{'Z' if close else ''}" if d else "M0 0", class_=class_, stroke_dasharray=dash or None
    )


def band(lower: Sequence[Point], upper: Sequence[Point]) -> Markup:
    """Return the area between two polylines."""
    known = [(a, b) for a, b in zip(lower, upper, strict=True) if all(map(math.isfinite, (*a, *b)))]
    return path([a for a, _ in known] + [b for _, b in reversed(known)], class_="band", close=True)


_POLYGONS: dict[str, tuple[Point, ...]] = {
    "triangle": ((0, -1.2), (1.1, 0.8), (-1.1, 0.8)),
    "down": ((0, 1.2), (1.1, -0.8), (-1.1, -0.8)),
    "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "diamond": ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
    "pentagon": tuple((1.1 * math.sin(k * 0.4 * math.pi), -1.1 * math.cos(k * 0.4 * math.pi)) for k in range(5)),
    "cross": (
        *((-0.42, -1.2), (0.42, -1.2), (0.42, -0.42), (1.2, -0.42), (1.2, 0.42), (0.42, 0.42)),
        *((0.42, 1.2), (-0.42, 1.2), (-0.42, 0.42), (-1.2, 0.42), (-1.2, -0.42), (-0.42, -0.42)),
    ),
}


def marker(shape: str, x: float, y: float, radius: float, *, class_: str = "mark", tip: str = "") -> Markup:
    """Return a marker of the area of a circle of about that radius; ``tip`` is shown when pointed at."""
    title = element("title", tip) if tip else None
    if shape == "circle":
        return element("circle", title, cx=float(x), cy=float(y), r=float(radius), class_=class_)
    points = " ".join(f"{number(x + radius * dx)},{number(y + radius * dy)}" for dx, dy in _POLYGONS[shape])
    return element("polygon", title, points=points, class_=class_)


def end_cross(x: float, y: float) -> Markup:
    """Return the sign for a run that ended early."""
    r = 3.5
    left, up, down = number(x - r), number(y - r), number(y + r)
    return element("path", d=f"M{left} {up}l{2 * r:g} {2 * r:g}M{left} {down}l{2 * r:g} {-2 * r:g}", class_="ended")


_NARROW, _WIDE = frozenset("iljtfrI.,:;'|!()[]/ \u202f-"), frozenset("mwMW@%…–−×")


def text_width(content: str, size: float) -> float:
    """Return about how wide text is in a common sans-serif face, in pixels, rather too wide than too narrow."""
    return size * sum(0.34 if c in _NARROW else 0.88 if c in _WIDE or ord(c) > 0x2E80 else 0.6 for c in content)


def fit(content: str, width: float, size: float) -> str:
    """Return text cut to a width, with an ellipsis where something was cut."""
    if text_width(content, size) <= width:
        return content
    cut = content
    while cut and text_width(cut + "…", size) > width:
        cut = cut[:-1]
    return cut + "…"
