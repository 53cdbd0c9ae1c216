"""Colours, dashes and markers: one colour per normalizer and one marker per optimizer, the same in every picture.

The baseline is ink, so that everything coloured is read against it. The hues stay apart for readers with protanopia and
deuteranopia (the tests simulate both) and have a lighter twin for a dark page.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from importlib import resources
from typing import NamedTuple


class Hue(NamedTuple):
    """A colour on a light and on a dark page, as ``#rrggbb``."""

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
    """Return one colour per name in `norms`: ink for the baseline, fixed ones for known names, free ones for others."""
    taken = {_KNOWN[n] for n in norms if n in _KNOWN and n != baseline}
    free = [i for i in range(len(HUES)) if i not in taken] or list(range(len(HUES)))
    strangers = itertools.cycle(free)
    return tuple(INK if n == baseline else HUES[_KNOWN[n] if n in _KNOWN else next(strangers)] for n in norms)


def dash(index: int) -> str:
    """Return the dash pattern of the optimizer at an index (beyond the list they repeat)."""
    return DASHES[index % len(DASHES)]


def marker_shape(index: int) -> str:
    """Return the marker of the optimizer at an index (beyond the list they repeat)."""
    return MARKERS[index % len(MARKERS)]


_FONTS = {
    "serif": '"Iowan Old Style",Charter,"Bitstream Charter","Source Serif 4","Source Serif Pro","Noto Serif",Georgia,'
    '"Liberation Serif",serif',
    "sans": 'system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Noto Sans","Liberation Sans",Arial,sans-serif',
    "mono": 'ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace',
}
_GROUNDS = {  # on a light page, on a dark one
    "paper": ("#fdfdfb", "#14171b"),
    "veil": ("#fdfdfbee", "#14171bee"),
    "ink": ("#1c2128", "#eceff3"),
    "soft": ("#3f4753", "#c3c9d1"),
    "muted": ("#667080", "#949eab"),
    "rule": ("#dcdfe4", "#323840"),
    "grid": ("#e6e8ec", "#272c33"),
    "axis": ("#9aa3af", "#5d6672"),
    "tint": ("#f4f5f3", "#1b1f25"),
    "hover": ("#eef1f5", "#22272e"),
    "accent": ("#0a5ca8", "#7db8f5"),
    "bad": ("#b3261e", "#ff8a80"),
}


def style(chosen: Sequence[Hue]) -> str:
    """Return the CSS of page and charts: fonts, colours as variables, and a class ``n0``, ``n1``, ... for each hue.

    A dark scheme applies where the reader's system asks for one, never on paper.

    Args:
        chosen: The hues of the series, by index.
    """
    fonts = "".join(f"--{name}:{value};" for name, value in _FONTS.items())
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in _GROUNDS.items()) for i in (0, 1))
    rules = [".plain{--c:var(--muted)}", *(f".n{i}{{--c:{hue.light}}}" for i, hue in enumerate(chosen))]
    night = "".join(f".n{i}{{--c:{hue.dark}}}" for i, hue in enumerate(chosen))
    return (
        f":root{{color-scheme:light dark;{fonts}{light}}}{''.join(rules)}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}{night}}}{_chart_rules()}"
    )


def plain_style(chosen: Sequence[Hue]) -> str:
    """Return the CSS of charts without variables and conditions, which converters of SVG do not know: the light scheme.

    Args:
        chosen: The hues of the series, by index.
    """
    colours = [(".plain", _GROUNDS["muted"][0]), *((f".n{i}", hue.light) for i, hue in enumerate(chosen))]
    rules = []
    for rule in _chart_rules().splitlines():
        own = [f"{name} {rule.replace('var(--c)', colour)}" for name, colour in colours]
        rules += own if "var(--c)" in rule else [rule]
    known = {name: pair[0] for name, pair in _GROUNDS.items()} | {"sans": '"Liberation Sans",Arial,sans-serif'}
    return re.sub(r"var\(--(\w+)\)", lambda match: known[match[1]], "\n".join(rules))


def _chart_rules() -> str:
    return resources.files("flexnorm.lab.charts").joinpath("chart.css").read_text(encoding="utf-8")
