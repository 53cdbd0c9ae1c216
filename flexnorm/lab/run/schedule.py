"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def factor(name: str, args: Mapping[str, Any], step: int, steps_per_epoch: int, epochs: int) -> float:
    """Return what the learning rate is multiplied by at one step.

    Args:
        name: One of :data:`flexnorm.lab.run.SCHEDULES`.
        args: Complete arguments, as they are listed there.
        step: Number of updates made so far, from 0.
        steps_per_epoch: Updates in one epoch.
        epochs: Length of the run.

    Examples:
        >>> [factor("cosine", {"warmup": 0.0, "final": 0.0}, step, 10, 2) for step in (0, 10)]
        [1.0, 0.5]
    """
    total = steps_per_epoch * epochs
    done = step / total
    if name == "onecycle":
        peak = float(args["peak"])
        if done < peak:
            return _cosine(args["initial"], 1.0, done / peak)
        return _cosine(1.0, args["final"], (done - peak) / (1 - peak) if peak < 1 else 0.0)
    warmup: float = args["warmup"]
    if done < warmup:
        return (step + 1) / (warmup * total + 1)
    if name == "cosine":
        return _cosine(1.0, args["final"], (done - warmup) / (1 - warmup))
    if name == "step":
        epoch = step // steps_per_epoch
        drops = sum(epoch >= drop for drop in args["drops"]) + (epoch // args["every"] if args["every"] else 0)
        return math.pow(args["factor"], drops)
    return 1.0


def _cosine(start: float, end: float, done: float) -> float:
    """Return the value of half a cosine from `start` to `end` at the fraction `done`."""
    return float(end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
