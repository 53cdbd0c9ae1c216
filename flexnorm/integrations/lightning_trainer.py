"""A callback for Lightning's Trainer that watches the shift of every layer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from flexnorm.integrations._watch import ShiftWatch, base_class
from flexnorm.probe import batch_inputs
from flexnorm.shift import ShiftRecord

_Base: Any = base_class((("lightning.pytorch.callbacks", "Callback"), ("pytorch_lightning.callbacks", "Callback")))


class LightningShiftCallback(_Base):
    """Watches the shift of the layers of a LightningModule, with the trainer's precision and on its first process.

    A step is a training batch after which ``trainer.global_step`` has grown; with gradient accumulation that is one in
    several. The training stays bit-identical. The state goes into the trainer's checkpoints, so that an interrupted
    training goes on exactly.

    Args:
        probe: Inputs of the module, as for :class:`flexnorm.shift.ShiftMonitor`; ``None`` for the inputs of the first
            training batch: its first element, or all but ``labels`` and ``targets`` where it is a dictionary.
        log: Whether to hand the numbers to the trainer's loggers, as ``shift/LAYER/NAME``.
        **options: All other arguments of :class:`flexnorm.shift.ShiftMonitor`: ``layers``, ``every``, ``sinks``, ...

    Attributes:
        records: All measurements so far.
        monitor: The monitor, once the training has begun; ``None`` on other processes.

    Example:
        >>> callback = LightningShiftCallback(every=100, sinks=["shift.csv"])
        >>> callback.records
        []
    """

    def __init__(self, probe: Any = None, *, log: bool = True, **options: Any) -> None:
        super().__init__()
        self._watch = ShiftWatch(probe, options)
        self._log = log
        self._updates = 0

    @property
    def records(self) -> list[ShiftRecord]:
        """All measurements so far."""
        return self._watch.records

    @property
    def monitor(self) -> Any:
        """The monitor, once the training has begun."""
        return self._watch.monitor

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Begin, where the probe is known."""
        self._updates = trainer.global_step
        if self._watch.probe is not None:
            self._begin(trainer, pl_module, None)

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Begin with the first batch as the probe, where none was given."""
        if self._watch.monitor is None:
            self._begin(trainer, pl_module, batch)

    def on_train_batch_end(
        self,
        trainer: Any,
        pl_module: nn.Module,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Count a step where the batch has led to one."""
        if trainer.global_step == self._updates or self._watch.monitor is None:
            return
        self._updates = trainer.global_step
        with _precision(trainer):
            made = self._watch.step()
        if self._log and made:
            numbers = {
                f"shift/{record.layer}/{name}": value
                for record in made
                for name, value in record.asdict().items()
                if isinstance(value, float) and math.isfinite(value)
            }
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=trainer.global_step)

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:  # noqa: ARG002
        """Close the sinks."""
        self._watch.end()

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:  # noqa: ARG002
        """Close the sinks."""
        self._watch.end()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to go on exactly."""
        return self._watch.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state when the training begins."""
        self._watch.load_state_dict(state_dict)

    def _begin(self, trainer: Any, module: nn.Module, batch: Any) -> None:
        if trainer.is_global_zero:
            with _precision(trainer):
                self._watch.begin(module, _inputs(batch))


def _inputs(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in ("label", "labels", "target", "targets")}
    return batch_inputs(batch)


def _precision(trainer: Any) -> contextlib.AbstractContextManager[Any]:
    """The autocast of the trainer, for the hooks are called outside of it."""
    context = getattr(getattr(trainer, "precision_plugin", None), "forward_context", contextlib.nullcontext)
    manager: contextlib.AbstractContextManager[Any] = context()
    return manager
