"""One colour per normalizer and one dash and marker per optimizer, the same in every figure and in every report.

The baseline is ink, so that everything coloured is read against it. The hues stay apart for readers with protanopia and
deuteranopia (the tests simulate both) and have a lighter twin for a dark page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Hue:
    """A colour in two versions.

    Attributes:
        light: On a light page, as ``#rrggbb``.
        dark: On a dark page.
    """

    light: str
    dark: str


INK = Hue("#1d262f", "#f2f4f6")
"""The baseline's colour."""

HUES = (
    Hue("#1a60ab", "#4496e6"),  # blue
    Hue("#c04a08", "#e08332"),  # vermilion
    Hue("#12a08a", "#55c9a9"),  # bluish green
    Hue("#7b2a80", "#cf8cd6"),  # purple
    Hue("#bd8a08", "#eddc62"),  # amber
    Hue("#2fa0e0", "#a3d8ff"),  # sky
    Hue("#a8305a", "#ee5c7b"),  # crimson
    Hue("#6b7280", "#98a1ae"),  # grey
    Hue("#7a4a21", "#c29a72"),  # brown
)

_KNOWN = {"unitized": 0, "population": 1, "group": 2, "layer": 3, "instance": 4, "normprop": 5, "none": 6, "batch": 7}

DASHES = ("", "7 3", "2 2.5", "10 3 2 3", "5 2", "1 3", "12 4")
"""Dash patterns of optimizers, in order; the first is a solid line."""

MARKERS = ("circle", "triangle", "square", "diamond", "down", "cross", "pentagon")
"""Marker shapes of optimizers, in order."""


def hues(norms: Sequence[str], baseline: str) -> tuple[Hue, ...]:
    """Return one colour per normalizer: ink for the baseline, fixed ones for known names, free ones for others."""
    taken = {_KNOWN[n] for n in norms if n in _KNOWN and n != baseline}
    free = [i for i in range(len(HUES)) if i not in taken] or list(range(len(HUES)))
    chosen: list[Hue] = []
    strangers = 0
    for norm in norms:
        if norm == baseline:
            chosen.append(INK)
        elif norm in _KNOWN:
            chosen.append(HUES[_KNOWN[norm]])
        else:
            chosen.append(HUES[free[strangers % len(free)]])
            strangers += 1
    return tuple(chosen)


def dash(index: int) -> str:
    """Return the dash pattern of the optimizer at an index (beyond the list they repeat)."""
    return DASHES[index % len(DASHES)]


def marker_shape(index: int) -> str:
    """Return the marker of the optimizer at an index (beyond the list they repeat)."""
    return MARKERS[index % len(MARKERS)]
