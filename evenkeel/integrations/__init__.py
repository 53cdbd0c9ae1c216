"""Callbacks that watch the shift in other training frameworks, none of which is needed to import this room.

* :class:`LightningShiftCallback` for Lightning's ``Trainer`` (``lightning`` or ``pytorch_lightning``).
* :class:`TransformersShiftCallback` for the ``Trainer`` of Hugging Face Transformers.

TensorBoard, with either of them or with a loop of your own, is :class:`evenkeel.shift.TensorBoardSink`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evenkeel.integrations.lightning_trainer import LightningShiftCallback
    from evenkeel.integrations.transformers_trainer import TransformersShiftCallback

__all__ = ["LightningShiftCallback", "TransformersShiftCallback"]

_HOMES = {
    "LightningShiftCallback": "evenkeel.integrations.lightning_trainer",
    "TransformersShiftCallback": "evenkeel.integrations.transformers_trainer",
}


def __getattr__(name: str) -> Any:
    # Later, not now: which framework a callback belongs to is known when the callback is asked for.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'evenkeel.integrations' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
