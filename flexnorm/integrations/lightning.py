"""Callbacks for Lightning's Trainer: the shift of every layer, and population statistics that are kept fresh."""

# ruff: noqa: ARG002 - the trainer names the arguments

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from flexnorm.integrations._watch import PopulationRenewal, ShiftWatch, base_class
from flexnorm.probe import batch_inputs

_Base: Any = base_class((("lightning.pytorch.callbacks", "Callback"), ("pytorch_lightning.callbacks", "Callback")))


def _precision(trainer: Any) -> Any:
    """The autocast of the trainer, for the hooks are called outside of it."""
    return getattr(getattr(trainer, "precision_plugin", None), "forward_context", contextlib.nullcontext)()


class LightningShiftCallback(ShiftWatch, _Base):
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

    Examples:
        >>> callback = LightningShiftCallback(every=100, sinks=["shift.csv"])
        >>> callback.records
        []
    """

    def __init__(self, probe: Any = None, *, log: bool = True, **options: Any) -> None:
        super().__init__(probe, options)
        self._log = log
        self._updates = 0

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Begin, where the probe is known."""
        self._updates = trainer.global_step
        if self._probe is not None:
            self._start(trainer, pl_module, None)

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
        """Begin with the first batch as the probe, where none was given."""
        if self.monitor is None:
            self._start(trainer, pl_module, batch)

    def _start(self, trainer: Any, module: nn.Module, batch: Any) -> None:
        if trainer.is_global_zero and self._watches(module):
            targets = ("label", "labels", "target", "targets")
            named = isinstance(batch, Mapping)
            inputs = {k: v for k, v in batch.items() if k not in targets} if named else batch_inputs(batch)
            with _precision(trainer):
                self._begin(module, inputs)

    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count a step where the batch has led to one."""
        if trainer.global_step == self._updates or self.monitor is None:
            return
        self._updates = trainer.global_step
        with _precision(trainer):
            made = self.monitor.step()
        if self._log and made:
            numbers = {
                f"shift/{record.layer}/{name}": value
                for record in made
                for name, value in record.asdict().items()
                if isinstance(value, float) and math.isfinite(value)
            }
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=trainer.global_step)

    def on_train_end(self, trainer: Any, pl_module: nn.Module, exception: BaseException | None = None) -> None:
        """Close the sinks."""
        self._end()

    on_exception = on_train_end


class LightningPopulationCallback(PopulationRenewal, _Base):
    """Renews the statistics of ``PopulationNorm*d(..., statistics="estimated")`` in a LightningModule as it trains.

    Before the first update, every ``every`` updates from then on (batches that gradient accumulation takes together are
    one), before every validation and test of the training, and at its end. See
    :class:`~flexnorm.statistics.PopulationEstimator` for the cost and for data parallelism. The counters go into the
    trainer's checkpoints, so that an interrupted training goes on exactly.

    Args:
        samples: (N, *), training inputs of the module to draw from; under data parallelism, those of the process.
        **options: ``size``, ``every``, ``chunk`` and ``seed`` of the estimator.

    Attributes:
        estimator: The estimator, once the training has begun.

    Examples:
        >>> import torch
        >>> callback = LightningPopulationCallback(torch.randn(10_000, 8), every=100)
        >>> callback.estimator is None
        True
    """

    _updates: int | None = None

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Look for the layers; where there are none, a warning says so."""
        self._begin(pl_module)
        self._updates = None

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
        """Count an update where one begins with this batch."""
        if self.estimator is not None and trainer.global_step != self._updates:
            self._updates = trainer.global_step
            with _precision(trainer):
                self.estimator()

    def on_validation_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Renew, so that the statistics follow the weights that are evaluated."""
        # Lightning validates once before the training: there is no estimator yet, and nothing to renew for.
        if self.estimator is not None:
            with _precision(trainer):
                self.estimator.renew()

    on_test_start = on_train_end = on_validation_start
