"""The main figure: accuracy, shift and speed of every normalizer and optimizer at one glance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from flexnorm.lab.records import Cell, Study
from flexnorm.lab.replicates import Replicates
from flexnorm.lab.report.markup import Markup
from flexnorm.lab.report.numbers import percent, significant
from flexnorm.lab.report.rows import Dot, rows_panel
from flexnorm.lab.report.scale import Scale, accuracy, linear, log_or_linear


def summary_panels(
    study: Study, rows: Sequence[Cell], *, prefix: str = "summary", width: float = 360.0
) -> list[Markup]:
    """Return three panels with a row per normalizer: test accuracy, relative shift, step time.

    Args:
        study: What was compared.
        rows: Its cells.
        prefix: Beginning of the panels' ids.
        width: Width of a panel's view box.
    """
    ratio = study.has_baseline
    shifts = [v for c in rows for v in c.shift_relative.values]

    def panel(
        name: str, pick: Callable[[Cell], Replicates], scale: Scale, write: Callable[[float], str], **words: str
    ) -> Markup:
        return rows_panel(
            f"{prefix}-{name}",
            dots(study, rows, pick, median=name == "time"),
            study.norms,
            len(study.optims),
            scale,
            width=width,
            write=write,
            reference=1.0 if name == "time" and ratio else math.nan,
            title=f"{words['heading']} per normalizer and optimizer",
            **words,
        )

    times = [v for c in rows for v in (c.step_ratio if ratio else c.step_ms).values]
    return [
        panel(
            "accuracy",
            lambda c: c.test_accuracy,
            accuracy([v for c in rows for v in c.test_accuracy.values], count=4),
            lambda v: percent(v, 2),
            heading="Test accuracy",
            x_label="further right is better",
        ),
        panel(
            "shift",
            lambda c: c.shift_relative,
            log_or_linear(shifts, count=4),
            significant,
            heading="Internal covariate shift, relative",
            x_label=f"W₁ {study.per} ÷ spread of the layer",
        ),
        panel(
            "time",
            (lambda c: c.step_ratio) if ratio else (lambda c: c.step_ms),
            linear([*times, 1.0] if ratio else times, zero=True, count=4),
            (lambda v: f"{significant(v)}×") if ratio else (lambda v: f"{significant(v)}\u202fms"),
            heading=f"Time per step, relative to {study.baseline}" if ratio else "Time per step",
            x_label=f"times {study.baseline}" if ratio else "ms",
        ),
    ]


def dots(study: Study, rows: Sequence[Cell], pick: Callable[[Cell], Replicates], *, median: bool = False) -> list[Dot]:
    """Return one mark per cell that has a finite mean: the mean with its standard deviation, or the median alone."""
    return [
        Dot(
            norm=study.norms.index(cell.norm),
            optim=study.optims.index(cell.optim),
            label=f"{cell.norm}, {cell.optim}",
            mean=pick(cell).median if median else pick(cell).mean,
            std=math.nan if median else pick(cell).std,
            values=pick(cell).values,
        )
        for cell in rows
        if math.isfinite(pick(cell).mean)
    ]
