"""Normalization in deep networks: measure its shift, explain BatchNorm, replace it by something better.

The names below are all that most users need; the packages load when they are first used. ``flexnorm.lab``, the
application on top (experiments, reports, networks, data, the command line), needs ``pip install 'flexnorm[lab]'``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flexnorm._version import __version__

if TYPE_CHECKING:
    # isort: off
    from flexnorm import engine, integrations, kernels, lab, nn, optim
    from flexnorm import probe, shift, statistics, surgery, theory, transport

    # isort: on
    from flexnorm._messages import NothingDone
    from flexnorm.engine import FlexNorm, Moments, Segments, flex_norm
    from flexnorm.statistics import accumulate, freeze, recalibrate, unfreeze
    from flexnorm.surgery import conversion_plan, convert, convert_to_normprop, fold

# Loaded when first used: the command line answers before torch is there, and packages cost what they are used for.
_PLACES = {
    "NothingDone": "_messages",
    **dict.fromkeys(("FlexNorm", "Moments", "Segments", "flex_norm"), "engine"),
    **dict.fromkeys(("accumulate", "freeze", "recalibrate", "unfreeze"), "statistics"),
    **dict.fromkeys(("conversion_plan", "convert", "convert_to_normprop", "fold"), "surgery"),
}

__all__ = ["FlexNorm", "Moments", "NothingDone", "Segments", "__version__", "accumulate", "conversion_plan", "convert"]
__all__ += ["convert_to_normprop", "engine", "flex_norm", "fold", "freeze", "integrations", "kernels", "lab", "nn"]
__all__ += ["optim", "probe", "recalibrate", "shift", "statistics", "surgery", "theory", "transport", "unfreeze"]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f"flexnorm.{_PLACES[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"flexnorm.{name}")
    raise AttributeError(f"module 'flexnorm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
