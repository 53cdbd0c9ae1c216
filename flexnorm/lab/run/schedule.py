"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from flexnorm._messages import unknown_name

__all__ = ["SCHEDULES", "factor"]

SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"warmup": 0.0},
    "cosine": {"warmup": 0.0, "final": 0.0},
    "onecycle": {"peak": 0.3, "initial": 0.04, "final": 0.0001},
    "step": {"drops": (), "every": 0, "factor": 0.1, "warmup": 0.0},
}
"""Every schedule with its arguments and their defaults.

* ``constant``: the learning rate itself, after a linear ``warmup`` over that fraction of the run.
* ``cosine``: half a cosine from 1 to ``final``.
* ``onecycle``: a cosine from ``initial`` up to 1 at the fraction ``peak`` of the run, and down to ``final``.
* ``step``: multiplied by ``factor`` at each epoch in ``drops``, or after every ``every`` epochs.
"""


def checked(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a schedule with the defaults filled in.

    Raises:
        ValueError: For an unknown schedule or argument.
    """
    if name not in SCHEDULES:
        raise ValueError(unknown_name("schedule", name, SCHEDULES))
    for key, value in args.items():
        if key not in SCHEDULES[name]:
            raise ValueError(f"schedule {name}: {unknown_name('argument', key, SCHEDULES[name])}")
        numbers = value if key == "drops" and isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and v >= 0 for v in numbers):
            raise ValueError(
                f"schedule {name}: {key} must be {'a list of epochs' if key == 'drops' else 'a number'} >= 0, "
                f"not {value!r}"
            )
    return {**SCHEDULES[name], **args}


def factor(name: str, args: Mapping[str, Any], step: int, steps_per_epoch: int, epochs: int) -> float:
    """Return what the learning rate is multiplied by at one step.

    Args:
        name: One of :data:`SCHEDULES`.
        args: Complete arguments, as :data:`SCHEDULES` lists them.
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
