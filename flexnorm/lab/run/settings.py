"""What an optimizer, a schedule and the additions to a run can be set to: names, defaults, and what each may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from flexnorm._messages import unknown_name

_SGD = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
_ADAMW = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.05}
_SPHERE = {"grad_clip": 0.1, "ortho": 0.1, "ortho_every": 1}
_PROJECTION = {"delta": 0.1, "wd_ratio": 0.1}
_ADAMG_SPHERE = {"momentum": 0.9, "beta2": 0.99, "lr_manifold": 0.05, **_SPHERE}
_ADAMG: dict[str, dict[str, Any]] = {
    "adamw": {"off_manifold": "adamw", "lr": _ADAMW["lr"], "weight_decay": _ADAMW["weight_decay"], **_ADAMG_SPHERE},
    "sgd": {"off_manifold": "sgd", **_SGD, **_ADAMG_SPHERE},
}

OPTIMS: dict[str, dict[str, Any]] = {
    "sgd": _SGD,
    "sgdg": {**_SGD, "lr_manifold": 0.2, **_SPHERE},
    "adamg": _ADAMG["adamw"],
    "adamw": _ADAMW,
    "sgdp": {**_SGD, **_PROJECTION},
    "adamp": {**_ADAMW, **_PROJECTION},
}
"""Every optimizer with its settings and their defaults.

``lr_manifold``, ``grad_clip`` and ``ortho`` are those of the weights on the sphere (Cho & Lee, 2017: 0.2 for SGD-G,
0.05 for Adam-G, clip and orthogonality 0.1; ``ortho_every`` 1 as there, which is not the default of
:class:`flexnorm.optim.SGDG`); ``lr``, ``momentum`` and ``weight_decay`` belong to all other parameters.
Adam-G moves those others by AdamW, whose betas are torch's (``momentum`` and ``beta2`` are those of the sphere); with
``off_manifold: sgd`` by SGD, as in the paper, with the settings of ``sgd`` and their defaults: :func:`optim_defaults`.
``delta`` and ``wd_ratio`` are those of the projection of SGDP and AdamP (Heo et al., 2021).
The learning rates are for batches of 64 images and more. For smaller batches these defaults, and only these, are scaled
down: linearly with the batch size, Adam-G's ``lr_manifold`` and the ``lr`` of AdamW and AdamP with its root.
"""


def optim_defaults(optim: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of one of :data:`OPTIMS` and their defaults, which for Adam-G depend on what is ``given``.

    Settings that name ``nesterov`` but not ``off_manifold`` are those of a run from before there was the choice: SGD.
    """
    if optim == "adamg":
        off = given.get("off_manifold", "sgd" if "nesterov" in given else "adamw")
        return _ADAMG["sgd" if off == "sgd" else "adamw"]
    return OPTIMS[optim]


GAMMA_DECAY: dict[str, Any] = {"coefficient": "adaptive", "batch_size": None, "decoupled": False, "every": 50}
"""Settings of the gamma decay and their defaults (:class:`flexnorm.optim.GammaDecay`).

``coefficient``: zeta, a number or ``"adaptive"``; ``batch_size``: M, the batch size whose noise is imitated (None: that
of the training); ``decoupled``: shrink gamma after the step instead of adding a penalty to the loss; ``every``: updates
between two estimates of an adaptive zeta.
"""

ESTIMATE: dict[str, Any] = {"every": 50, "samples": 10_000, "chunk": None}
"""Settings of the population statistics and their defaults (:class:`flexnorm.statistics.PopulationEstimator`).

``every``: updates between two renewals (one more comes before each evaluation); ``samples``: training images per
renewal; ``chunk``: images that go through at a time, where the memory does not take all at once.
"""

SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"warmup": 0.0},
    "cosine": {"warmup": 0.0, "final": 0.0},
    "onecycle": {"peak": 0.3, "initial": 0.04, "final": 0.0001},
    "step": {"drops": (), "every": 0, "factor": 0.1, "warmup": 0.0},
}
"""Every schedule of the learning rate with its arguments and their defaults.

* ``constant``: the learning rate itself, after a linear ``warmup`` over that fraction of the run.
* ``cosine``: half a cosine from 1 to ``final``.
* ``onecycle``: a cosine from ``initial`` up to 1 at the fraction ``peak`` of the run, and down to ``final``.
* ``step``: multiplied by ``factor`` at each epoch in ``drops``, or after every ``every`` epochs.
"""


def is_number(value: Any) -> bool:
    """Return whether a value is a whole or a real number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_Takes = tuple[str, Callable[[Any], bool]]


def _count(low: int, *, or_none: bool = False) -> _Takes:
    return f"a whole number of at least {low}", lambda v: (or_none and v is None) or (type(v) is int and v >= low)


def _not_negative(value: Any) -> bool:
    return is_number(value) and value >= 0


_FLAG: _Takes = ("true or false", lambda v: isinstance(v, bool))
_RATE: _Takes = ("a number above 0", lambda v: is_number(v) and v > 0)
_TAKES: dict[str, dict[str, _Takes]] = {
    "optims": {
        "lr": _RATE,
        "lr_manifold": _RATE,
        "nesterov": _FLAG,
        "ortho_every": _count(1),
        "off_manifold": ("adamw or sgd", lambda v: v in ("adamw", "sgd")),
        "": ("a number of at least 0", _not_negative),
    },
    "gamma_decay": {
        "coefficient": (
            "adaptive or a number of at least 0",
            lambda v: v == "adaptive" or (_not_negative(v) and v < float("inf")),
        ),
        "batch_size": _count(2, or_none=True),
        "decoupled": _FLAG,
        "every": _count(1),
    },
    "estimate": {"every": _count(1), "samples": _count(1), "chunk": _count(2, or_none=True)},
    "schedule": {
        "drops": (
            "a list of epochs >= 0",
            lambda v: all(map(_not_negative, v if isinstance(v, list | tuple) else [v])),
        ),
        "": ("a number >= 0", _not_negative),
    },
}
"""By kind of settings and name, what a setting must be, in words and as a test; under "" that of all others."""


def filled(kind: str, where: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the defaults filled in.

    Args:
        kind: ``"optims"``, ``"gamma_decay"``, ``"estimate"`` or ``"schedule"``.
        where: The key that messages begin with.
        defaults: The table of that kind.
        given: The settings that differ from it; a ValueError says which there is not, or what it takes.
    """
    for key, value in given.items():
        if key not in defaults:
            raise ValueError(f"{where}: {unknown_name('argument' if kind == 'schedule' else 'setting', key, defaults)}")
        words, fits = _TAKES[kind].get(key) or _TAKES[kind][""]
        if not fits(value):
            raise ValueError(f"{where}: {key} must be {words}, not {value!r}")
    return {**defaults, **given}


def schedule_factor(name: str, args: Mapping[str, Any], step: int, steps_per_epoch: int, epochs: int) -> float:
    """Return the factor that one of :data:`SCHEDULES`, its ``args`` complete, gives after ``step`` updates.

    Examples:
        >>> [schedule_factor("cosine", {"warmup": 0.0, "final": 0.0}, step, 10, 2) for step in (0, 10)]
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
