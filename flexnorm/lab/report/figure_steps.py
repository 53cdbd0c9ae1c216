"""Step times: a bar per normalizer and optimizer, relative to the baseline of the same optimizer, in the same sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flexnorm.lab.records import Cell, Study
from flexnorm.lab.replicates import Replicates
from flexnorm.lab.report.frame import FONT, Frame
from flexnorm.lab.report.markup import Markup, element, join
from flexnorm.lab.report.numbers import significant
from flexnorm.lab.report.palette import marker_shape
from flexnorm.lab.report.scale import Scale, linear
from flexnorm.lab.report.svg import drawing, fit, group, line, marker, text, text_width

BAR = 13.0
GAP = 4.0


def steps(study: Study, rows: Sequence[Cell], key: str, *, width: float) -> Markup | None:
    """Return the figure; in milliseconds where there is no baseline; None where no time was recorded.

    Args:
        study: What was compared.
        rows: Its cells.
        key: A name that is unique on the page.
        width: Width of the view box.
    """
    relative = study.has_baseline and any(cell.step_ratio for cell in rows)

    def pick(cell: Cell) -> Replicates:
        return cell.step_ratio if relative else cell.step_ms

    shown = [cell for cell in rows if math.isfinite(pick(cell).median)]
    if not shown:
        return None
    labels = {id(cell): _label(cell, relative) for cell in shown}
    most = max(text_width(label, FONT) for label in labels.values())
    left = min(max(text_width(f"{c.norm} {c.optim}", FONT + 1) for c in shown) + 34.0, 0.42 * width)
    height = 62.0 + sum(BAR + GAP for _ in shown) + 10.0 * len({c.norm for c in shown})
    x = linear([v for c in shown for v in pick(c).values], zero=True, count=5 if width > 500 else 3)
    unit = f"× {study.baseline}" if relative else "ms per step"
    frame = Frame(width, height, x, Scale("linear", 0.0, 1.0, ()), left=left, right=most + 16.0, top=8.0)
    parts: list[Markup] = [frame.grid(x_label=unit, vertical=True)]
    if relative:
        parts.append(line(frame.px(1.0), frame.top, frame.px(1.0), height - frame.bottom, "reference"))
    y, last = frame.top + 4.0, shown[0].norm
    for cell in shown:
        y += 10.0 if cell.norm != last else 0.0
        last = cell.norm
        parts.append(_bar(frame, study, cell, pick(cell), labels[id(cell)], y))
        y += BAR + GAP
    said = "; ".join(f"{c.norm} with {c.optim} {labels[id(c)]}" for c in shown)
    title = f"Time per optimizer step relative to {study.baseline}" if relative else "Time per optimizer step"
    return drawing(key, width, height, join(parts), title=title, desc=f"{said}.")


def _label(cell: Cell, relative: bool) -> str:
    ms = f"{significant(cell.step_ms.median)}\u202fms"
    return f"{significant(cell.step_ratio.median)}× · {ms}" if relative else ms


def _bar(frame: Frame, study: Study, cell: Cell, sample: Replicates, label: str, y: float) -> Markup:
    norm, optim = study.norms.index(cell.norm), study.optims.index(cell.optim)
    end, middle = frame.px(sample.median), y + BAR / 2
    tip = f"{cell.norm}, {cell.optim}: {label}"
    bar = element(
        "rect",
        element("title", tip),
        x=frame.left,
        y=y,
        width=max(end - frame.left, 0.5),
        height=BAR,
        rx=1.5,
        class_="bar",
    )
    reach = max([end, *(frame.px(v) for v in sample.values)])
    name = fit(f"{cell.norm} {cell.optim}", frame.left - 30, FONT + 1)
    return group(
        text(frame.left - 24, middle + 4, name, anchor="end", class_="name"),
        marker(marker_shape(optim), frame.left - 13, middle, 3.4),
        bar,
        [marker("circle", frame.px(v), middle, 1.8, class_="pip") for v in sample.values] if sample.n > 1 else None,
        text(reach + 8, middle + 4, label, class_="value"),
        class_=f"n{norm}",
        data_n=norm,
    )
