"""The main figure as an SVG file of its own, for a README or a slide."""

from __future__ import annotations

from pathlib import Path

from flexnorm.lab.records import Study
from flexnorm.lab.report.figure_summary import summary_panels
from flexnorm.lab.report.headline import headline
from flexnorm.lab.report.load import load
from flexnorm.lab.report.markup import Markup, element, join, number
from flexnorm.lab.report.palette import marker_shape
from flexnorm.lab.report.rows import rows_height
from flexnorm.lab.report.svg import drawing, fit, group, marker, text, text_width
from flexnorm.lab.report.theme import asset, variables
from flexnorm.lab.report.write import write_text

PANEL, GAP, EDGE = 360.0, 28.0, 24.0


def picture(out_dir: str | Path, path: str | Path) -> Path:
    """Write the main figure of a comparison as an SVG file: accuracy, relative shift and step time per normalizer.

    The file stands alone (no fonts, no links), has a light and a dark version in one, and a ground of its own, so
    that it can
    be read on any page.

    Args:
        out_dir: The folder that ``flexnorm compare --out`` wrote.
        path: Where the picture goes; it is replaced in one step if it exists.

    Returns:
        The path of the picture.

    Raises:
        FileNotFoundError: If ``out_dir`` is no folder of a comparison.
        OSError: If the file cannot be written; what was there before stays.
    """
    return write_text(Path(path), f'<?xml version="1.0" encoding="UTF-8"?>\n{draw(load(out_dir))}\n')


def draw(study: Study) -> Markup:
    """Return the picture of a study as SVG."""
    rows = study.cells
    claim = headline(study, rows).claim
    width = 3 * PANEL + 2 * GAP + 2 * EDGE
    height = 96.0 + rows_height(len(study.norms), len(study.optims)) + 8.0
    panels = [
        group(panel, transform=f"translate({number(EDGE + i * (PANEL + GAP))} 92)")
        for i, panel in enumerate(summary_panels(study, rows, prefix="picture", width=PANEL))
    ]
    style = variables(study) + asset("plot.css") + ".plot text.title{font-size:19px;font-weight:600;fill:var(--ink)}"
    return drawing(
        "picture",
        width,
        height,
        element("style", Markup(style)),
        element("rect", width=width, height=height, fill="var(--paper)", rx=8),
        text(EDGE, 38, fit(claim, width - 2 * EDGE, 18), class_="title"),
        _optims(study),
        join(panels),
        title=claim,
        desc="Test accuracy, relative internal covariate shift and time per step of every normalizer and optimizer.",
    )


def _optims(study: Study) -> Markup:
    parts, x = [], EDGE + 6.0
    for index, optim in enumerate(study.optims):
        name = fit(optim, 200, 12)
        parts += [marker(marker_shape(index), x, 62, 4.4, class_="key"), text(x + 11, 66, name, class_="name")]
        x += text_width(name, 12) + 36.0
    parts.append(
        text(x, 66, f"{study.subject}; marks: means over seeds, whiskers: one standard deviation, dots: single seeds")
    )
    return group(parts, fill="var(--muted)")
