"""Learning curves: one panel per optimizer, one line per normalizer, a band over the seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from flexnorm.lab.records import EpochRow, Run, Study
from flexnorm.lab.report.lines import Series, line_panel
from flexnorm.lab.report.markup import Markup
from flexnorm.lab.report.numbers import percent, significant
from flexnorm.lab.report.scale import Scale, accuracy, linear, log_or_linear

Pick = Callable[[EpochRow], float]


def loss_panels(study: Study) -> list[Markup]:
    """Return the training loss per epoch, a panel per optimizer."""
    return _panels(
        study, "loss", "Training loss", "cross-entropy (nats)", lambda r: r.train_loss, log_or_linear, significant
    )


def accuracy_panels(study: Study) -> list[Markup]:
    """Return the test accuracy per epoch, a panel per optimizer."""
    return _panels(
        study,
        "accuracy",
        "Test accuracy",
        "fraction correct",
        lambda r: r.test_accuracy,
        accuracy,
        lambda v: percent(v, 2),
    )


def _panels(
    study: Study,
    key: str,
    title: str,
    y_label: str,
    pick: Pick,
    scale: Callable[[Sequence[float]], Scale],
    write: Callable[[float], str],
) -> list[Markup]:
    started = [run for run in study.runs if any(math.isfinite(pick(row)) for row in run.epochs)]
    if not started:
        return []
    y = scale([v for v in (pick(row) for run in started for row in run.epochs) if math.isfinite(v)])
    x = linear([row.epoch for run in started for row in run.epochs], integer=True, tight=True, count=6)
    return [
        line_panel(
            f"curve-{key}-{index}",
            curve_series(study, optim, pick),
            x,
            y,
            title=f"{title} per epoch with {optim}",
            heading=optim,
            x_label="epoch",
            y_label=y_label,
            write=write,
        )
        for index, optim in enumerate(study.optims)
        if any(run.optim == optim for run in started)
    ]


def curve_series(study: Study, optim: str, pick: Pick) -> list[Series]:
    """Return the lines of one optimizer: the means of complete runs, and each run that ended early."""
    series = []
    for norm in study.norms:
        place = (study.norms.index(norm), study.optims.index(optim))
        runs = [run for run in study.of(norm, optim) if run.epochs]
        done = [run for run in runs if run.complete]
        if done:
            series.append(mean_series(*place, norm, [points(run, pick) for run in done]))
        for run in runs:
            track = points(run, pick)
            if not run.complete and track:
                label = f"{norm}, seed {run.seed}, {run.status}"
                series.append(Series(*place, label, tuple(track), tuple(track.values()), ended=True))
    return series[::-1]


def points(run: Run, pick: Pick) -> dict[float, float]:
    """Return a run's finite values by epoch."""
    return {row.epoch: pick(row) for row in run.epochs if math.isfinite(pick(row)) and math.isfinite(row.epoch)}


def mean_series(norm: int, optim: int, label: str, tracks: Sequence[dict[float, float]]) -> Series:
    """Return the mean over runs at each position, and as a band the smallest and the largest of them."""
    stops = sorted({x for track in tracks for x in track})
    columns = [[track[x] for track in tracks if x in track] for x in stops]
    band = len(tracks) > 1
    return Series(
        norm,
        optim,
        label,
        tuple(stops),
        tuple(math.fsum(c) / len(c) for c in columns),
        tuple(map(min, columns)) if band else (),
        tuple(map(max, columns)) if band else (),
    )
