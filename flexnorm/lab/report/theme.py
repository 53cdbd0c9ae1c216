"""Colours and faces of page and pictures, light and dark, as CSS variables."""

from __future__ import annotations

from importlib import resources

from flexnorm.lab.records import Study
from flexnorm.lab.report.palette import hues

_FACES = (
    '--serif:"Iowan Old Style",Charter,"Bitstream Charter","Source Serif 4","Source Serif Pro","Noto Serif",Georgia,'
    '"Liberation Serif",serif;'
    '--sans:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Noto Sans","Liberation Sans",Arial,sans-serif;'
    '--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;'
)
_LIGHT = (
    "--paper:#fdfdfb;--veil:#fdfdfbee;--ink:#1c2128;--soft:#3f4753;--muted:#667080;--rule:#dcdfe4;--grid:#e6e8ec;"
    "--axis:#9aa3af;--tint:#f4f5f3;--hover:#eef1f5;--accent:#0a5ca8;--bad:#b3261e;"
)
_DARK = (
    "--paper:#14171b;--veil:#14171bee;--ink:#eceff3;--soft:#c3c9d1;--muted:#949eab;--rule:#323840;--grid:#272c33;"
    "--axis:#5d6672;--tint:#1b1f25;--hover:#22272e;--accent:#7db8f5;--bad:#ff8a80;"
)


def variables(study: Study) -> str:
    """Return the CSS that gives page and plots their colours, and each normalizer (class ``n0``, ``n1``, ...) its own.

    A dark scheme applies where the reader's system asks for one, never on paper.
    """
    chosen = hues(study.norms, study.baseline)
    light = "".join(f".n{i}{{--c:{hue.light}}}" for i, hue in enumerate(chosen))
    dark = "".join(f".n{i}{{--c:{hue.dark}}}" for i, hue in enumerate(chosen))
    return (
        f":root{{color-scheme:light dark;{_FACES}{_LIGHT}}}{light}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}}}{dark}}}"
    )


def asset(name: str) -> str:
    """Return the text of a file that lies beside this module (``style.css``, ``plot.css``, ``page.js``)."""
    return resources.files("flexnorm.lab.report").joinpath(name).read_text(encoding="utf-8")
