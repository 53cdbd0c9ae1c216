"""Normalization in deep networks: measure its shift, explain BatchNorm, replace it by something better.

The names below are all that most users need; the rooms ``evenkeel.nn``, ``optim``, ``shift``, ``theory``, ``surgery``,
``models``, ``data``, ``experiment``, ``report`` and ``integrations`` load when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from evenkeel._version import __version__

if TYPE_CHECKING:
    from evenkeel import data, experiment, integrations, models, nn, optim, profile, report, shift, surgery, theory
    from evenkeel.flexnorm import FlexNorm, Moments, flex_norm
    from evenkeel.surgery import accumulate, conversion_plan, convert, fold, freeze, recalibrate, unfreeze

# Loaded when first used: the command line answers before torch is there, and rooms cost what they are used for.
_ROOMS = (
    "data",
    "experiment",
    "integrations",
    "models",
    "nn",
    "optim",
    "profile",
    "report",
    "shift",
    "surgery",
    "theory",
)
_NAMES = {
    **dict.fromkeys(("FlexNorm", "Moments", "flex_norm"), "flexnorm"),
    **dict.fromkeys(
        ("accumulate", "conversion_plan", "convert", "fold", "freeze", "recalibrate", "unfreeze"), "surgery"
    ),
}

__all__ = [
    "FlexNorm",
    "Moments",
    "__version__",
    "accumulate",
    "conversion_plan",
    "convert",
    "data",
    "experiment",
    "flex_norm",
    "fold",
    "freeze",
    "integrations",
    "models",
    "nn",
    "optim",
    "profile",
    "recalibrate",
    "report",
    "shift",
    "surgery",
    "theory",
    "unfreeze",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"evenkeel.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"evenkeel.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'evenkeel' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
