"""The outcome of a run, computed from its files alone, so that resuming cannot change it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexnorm.lab.run.files import read_rows

__all__ = ["METRICS_HEADER", "SHIFT_COLUMNS", "SHIFT_HEADER", "result"]

METRICS_HEADER = "epoch,step,train_loss,test_loss,test_accuracy,lr,step_ms,seconds"
SHIFT_COLUMNS = ("lower", "w1", "upper", "spread", "relative_lower", "relative", "relative_upper")
SHIFT_HEADER = "epoch,step,layer," + ",".join(SHIFT_COLUMNS)

_REPORTED = tuple(column for column in SHIFT_COLUMNS if column != "spread")


def mean(values: Sequence[float]) -> float:
    """Return the mean, correctly rounded whatever the order; NaN for no values."""
    return math.fsum(values) / len(values) if values else math.nan


def result(folder: Path) -> dict[str, Any]:
    """Return the ``result`` part of a summary from ``metrics.csv`` and ``shift.csv``.

    Loss and accuracy are those of the last epoch; the shift of a layer is the mean over its measurements, ``shift_w1``
    and ``shift_relative`` are means over the layers; ``shift_holds`` says whether every single measurement satisfied
    lower <= W1 <= upper.
    """
    metrics, shifts = read_rows(folder / "metrics.csv"), read_rows(folder / "shift.csv")
    last: Mapping[str, str] = metrics[-1] if metrics else {}
    layers: dict[str, list[dict[str, float]]] = {}
    for row in shifts:
        values = {column: float(row[column]) for column in SHIFT_COLUMNS}
        layers.setdefault(row["layer"], [])
        # A network that diverges has no distribution to measure any more; what was measured before stands.
        if math.isfinite(values["w1"]):
            layers[row["layer"]].append(values)
    shift = {
        layer: {column: mean([row[column] for row in rows]) for column in _REPORTED} for layer, rows in layers.items()
    }
    accuracies = [float(row["test_accuracy"]) for row in metrics]
    return {
        "train_loss": float(last.get("train_loss", "nan")),
        "test_loss": float(last.get("test_loss", "nan")),
        "test_accuracy": float(last.get("test_accuracy", "nan")),
        "best_test_accuracy": max(accuracies, default=math.nan),
        "shift": shift,
        "shift_w1": mean([layer["w1"] for layer in shift.values()]),
        "shift_relative": mean([layer["relative"] for layer in shift.values()]),
        "shift_measurements": sum(map(len, layers.values())),
        "shift_holds": all(interval_holds(row) for rows in layers.values() for row in rows)
        if any(layers.values())
        else None,
    }


def interval_holds(row: Mapping[str, float]) -> bool:
    """Whether lower <= W1 <= upper."""
    return row["lower"] <= row["w1"] <= row["upper"]


def step_ms(times: Sequence[float]) -> float:
    """Return the median time of a step in milliseconds, without the first ones, which pay for warm-up."""
    settled = times[min(5, len(times) // 2) :]
    return statistics.median(settled) * 1e3 if settled else math.nan
