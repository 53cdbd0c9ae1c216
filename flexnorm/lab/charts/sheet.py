"""Charts as a file of their own: panels under a title and a legend, as SVG, PNG or PDF."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexnorm._messages import optional, unknown_name
from flexnorm.lab.charts.chart import Chart, Series, legend_sample
from flexnorm.lab.charts.markup import Markup, element, number
from flexnorm.lab.charts.palette import HUES, Hue, plain_style, style
from flexnorm.lab.charts.svg import drawing, fit, group, text, text_width
from flexnorm.lab.files import atomic_write, check_folder

GAP, EDGE = 28.0, 24.0
FORMATS = (".pdf", ".png", ".svg")


def sheet(
    charts: Sequence[Chart],
    *,
    title: str,
    hues: Sequence[Hue] = HUES,
    legend: Sequence[Series] | None = None,
    note: str = "",
    columns: int = 0,
    plain: bool = False,
) -> Markup:
    """Return charts side by side as one SVG that stands alone: no fonts, no links, a light and a dark version in one.

    Args:
        charts: The charts, all of one width.
        title: What stands above them.
        hues: The colours of the series.
        legend: Series whose samples and labels stand below the title; by default each label of the charts once.
        note: A sentence after the legend.
        columns: Charts in a row; 0 for all of them.
        plain: Whether the styles are those that converters understand: only the light version.
    """
    if legend is None:
        legend = list({s.label: s for chart in charts for s in chart.series}.values())
    columns, wide = columns or len(charts), charts[0].width
    width = columns * (wide + GAP) - GAP + 2 * EDGE
    keys, y = _legend(legend, note, width)
    parts: list[Markup] = []
    for start in range(0, len(charts), columns):
        row = charts[start : start + columns]
        for i, chart in enumerate(row):
            place = f"translate({number(EDGE + i * (wide + GAP))} {number(y)})"
            parts.append(group(chart.svg(f"chart-{start + i}", pointer=False), transform=place))
        y += max(chart.size[1] for chart in row) + 12.0
    return drawing(
        "sheet",
        width,
        y,
        element("style", Markup(plain_style(hues) if plain else style(hues))),
        element("rect", width=width, height=y, fill="#fdfdfb" if plain else "var(--paper)", rx=8),
        text(EDGE, 38, fit(title, width - 2 * EDGE, 18), class_="title"),
        keys,
        parts,
        title=title,
        desc=" ".join(dict.fromkeys(f"{chart.title}." for chart in charts)),
    )


def _legend(legend: Sequence[Series], note: str, width: float) -> tuple[Markup, float]:
    """Return the legend and where the charts may begin."""
    parts, x, y = [], EDGE, 62.0
    for series in legend:
        name, indent = fit(series.label, width - 2 * EDGE - 40, 12), 40.0 if series.kind != "points" else 18.0
        wide = indent + text_width(name, 12)
        if x > EDGE and x + wide > width - EDGE:
            x, y = EDGE, y + 20.0
        parts += [
            legend_sample(series, x - (0 if indent == 40 else 11), y),
            text(x + indent, y + 4, name, class_="name"),
        ]
        x += wide + 18.0
    if note:
        if x > EDGE and x + text_width(note, 11.5) > width - EDGE:
            x, y = EDGE, y + 20.0
        parts.append(text(x, y + 4, fit(note, width - EDGE - x, 11.5)))
    return group(*parts), y + (26.0 if parts else -6.0)


def check_format(path: Path) -> Any:
    """Return the module that converts an SVG to the format of ``path``, ``None`` for SVG; errors as of :func:`save`."""
    if path.suffix not in FORMATS:
        raise ValueError(unknown_name("format of a picture", path.suffix, FORMATS))
    return None if path.suffix == ".svg" else optional("vl_convert", f"a picture as {path.suffix}", "plot")


def save(path: str | Path, charts: Sequence[Chart], *, title: str, **words: Any) -> Path:
    """Write charts as a picture, in one step; what was there before stays if that fails.

    Args:
        path: The file; its suffix chooses the format: ``.svg``, or with the extra ``plot`` also ``.png`` and ``.pdf``.
        charts: The charts, all of one width.
        title: What stands above them.
        **words: More arguments of :func:`sheet`.

    Returns:
        The path.

    Raises:
        ValueError: If the suffix is that of no format.
        ImportError: If the format needs what is not installed.
        FileNotFoundError: If its folder does not exist.
        OSError: If it cannot be written.
    """
    path = Path(path)
    convert = check_format(path)
    plain = convert is not None
    picture = sheet(charts, title=title, plain=plain, **words)
    if not plain:
        return write_text(path, f'<?xml version="1.0" encoding="UTF-8"?>\n{picture}\n')
    return write(path, convert.svg_to_png(picture, scale=2.0) if path.suffix == ".png" else convert.svg_to_pdf(picture))


def write_text(path: Path, content: str) -> Path:
    """Write the text ``content`` as the file ``path`` in UTF-8, in one step, so that a reader never finds half of it.

    Returns:
        The path.

    Raises:
        FileNotFoundError: If the folder does not exist.
        OSError: If it cannot be written; nothing is left behind and an older file stays.
    """
    return write(path, content.encode())


def write(path: Path, content: bytes) -> Path:
    """Write a file as :func:`write_text` does."""
    check_folder(path)
    atomic_write(path, content)
    return path
