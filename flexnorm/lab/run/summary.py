"""The outcome of a run, computed from its files alone, so that resuming cannot change it."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexnorm.lab.files import read_rows
from flexnorm.lab.records import SHIFT_MEANS, EpochRow, ShiftRow
from flexnorm.lab.replicates import mean

_NOTHING = EpochRow(*[math.nan] * len(dataclasses.fields(EpochRow)))


def result(folder: Path) -> dict[str, Any]:
    """Return what ``metrics.csv`` and ``shift.csv`` say, named as in :class:`flexnorm.lab.records.Run`.

    Loss and accuracy are those of the last epoch; the shift of a layer is the mean over its measurements, ``shift_w1``
    and ``shift_relative`` are means over the layers; ``shift_holds`` says whether every single measurement satisfied
    lower <= W1 <= upper.
    """
    epochs = [EpochRow.read(row) for row in read_rows(folder / "metrics.csv")]
    layers: dict[str, list[ShiftRow]] = {}
    for row in map(ShiftRow.read, read_rows(folder / "shift.csv")):
        known = layers.setdefault(row.layer, [])
        # A network that diverges has no distribution to measure any more; what was measured before stands.
        if math.isfinite(row.w1):
            known.append(row)
    shift = {
        layer: {name: mean([getattr(row, name) for row in rows]) for name in SHIFT_MEANS}
        for layer, rows in layers.items()
    }
    measured = [row for rows in layers.values() for row in rows]
    last = epochs[-1] if epochs else _NOTHING
    return {
        "train_loss": last.train_loss,
        "test_loss": last.test_loss,
        "test_accuracy": last.test_accuracy,
        "best_test_accuracy": max((row.test_accuracy for row in epochs), default=math.nan),
        "shift": shift,
        "shift_w1": mean([layer["w1"] for layer in shift.values()]),
        "shift_relative": mean([layer["relative"] for layer in shift.values()]),
        "shift_measurements": len(measured),
        "shift_holds": all(row.lower <= row.w1 <= row.upper for row in measured) if measured else None,
    }


def step_ms(times: Sequence[float]) -> float:
    """Return the median time of a step in milliseconds, without the first ones, which pay for warm-up."""
    settled = times[min(5, len(times) // 2) :]
    return statistics.median(settled) * 1e3 if settled else math.nan
