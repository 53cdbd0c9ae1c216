"""Callbacks for other training frameworks, none of which is needed to import this room.

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
    from flexnorm.integrations.lightning_population import LightningPopulationCallback
    from flexnorm.integrations.lightning_trainer import LightningShiftCallback
    from flexnorm.integrations.transformers_population import TransformersPopulationCallback
    from flexnorm.integrations.transformers_trainer import TransformersShiftCallback

__all__ = [
    "LightningPopulationCallback",
    "LightningShiftCallback",
    "TransformersPopulationCallback",
    "TransformersShiftCallback",
]

_HOMES = {
    "LightningPopulationCallback": "flexnorm.integrations.lightning_population",
    "LightningShiftCallback": "flexnorm.integrations.lightning_trainer",
    "TransformersPopulationCallback": "flexnorm.integrations.transformers_population",
    "TransformersShiftCallback": "flexnorm.integrations.transformers_trainer",
}


def __getattr__(name: str) -> Any:
    # Later, not now: which framework a callback belongs to is known when the callback is asked for.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'flexnorm.integrations' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
