"""Callbacks for other training frameworks, none of which is needed to import this.

For Lightning's ``Trainer`` (``lightning`` or ``pytorch_lightning``) and for that of Hugging Face Transformers:

* :class:`LightningShiftCallback` and :class:`TransformersShiftCallback` watch the shift of every layer.
* :class:`LightningPopulationCallback` and :class:`TransformersPopulationCallback` renew the statistics of population
  normalization.

TensorBoard, with any of them or with a loop of your own, is :class:`flexnorm.shift.TensorBoardSink`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexnorm.integrations.lightning import LightningPopulationCallback, LightningShiftCallback
    from flexnorm.integrations.transformers import TransformersPopulationCallback, TransformersShiftCallback

__all__ = [
    "LightningPopulationCallback",
    "LightningShiftCallback",
    "TransformersPopulationCallback",
    "TransformersShiftCallback",
]


def __getattr__(name: str) -> Any:
    # Later, not now: which framework a callback belongs to is known when the callback is asked for.
    if name in __all__:
        framework = "lightning" if name.startswith("Lightning") else "transformers"
        return getattr(importlib.import_module(f"flexnorm.integrations.{framework}"), name)
    raise AttributeError(f"module 'flexnorm.integrations' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
