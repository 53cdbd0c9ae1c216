"""Callbacks for the Trainer of Hugging Face Transformers: the shift of every layer, and fresh population statistics."""

# ruff: noqa: ARG002 - the trainer names the arguments

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from flexnorm.integrations._watch import PopulationRenewal, ShiftWatch, base_class
from flexnorm.probe import private_randomness

_Base: Any = base_class((("transformers.trainer_callback", "TrainerCallback"),))


class _Checkpointed(_Base):
    """A callback whose state is a file of its own in every checkpoint folder."""

    _file: str

    def _kept(self, args: Any, state: Any) -> Any:
        """The state in the checkpoint that the training resumes from, or nothing."""
        kept = _checkpoint(args, state) / self._file
        found = state.global_step > 0 and kept.is_file()
        return torch.load(kept, map_location="cpu", weights_only=True) if found else {}

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Put the state into the checkpoint that was just written."""
        own, folder = self.state_dict(), _checkpoint(args, state)
        if own and state.is_world_process_zero and folder.is_dir():
            part = folder / f"{self._file}.part"
            torch.save(own, part)
            part.replace(folder / self._file)


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


class TransformersShiftCallback(ShiftWatch, _Checkpointed):
    """Watches the shift of the layers of a model that a Transformers ``Trainer`` trains, on its first process.

    The training stays bit-identical. The state is kept in every checkpoint folder, as ``shift_monitor.pt``, so that a
    training that resumes from it goes on exactly.

    Args:
        probe: Inputs of the model, as for :class:`flexnorm.shift.ShiftMonitor`, most often a dictionary; ``None`` for
            the first items of the training data, put together by the trainer's own collator.
        probe_size: How many items that are.
        **options: All other arguments of :class:`flexnorm.shift.ShiftMonitor`. ``layers`` is ``"norm"`` by default,
            which finds norms of whatever class; in a model without any a warning says so, and nothing is measured.

    Attributes:
        records: All measurements so far.
        monitor: The monitor, once the training has begun; ``None`` on other processes.

    Examples:
        >>> callback = TransformersShiftCallback(every=100, sinks=["shift.csv"])
        >>> callback.records
        []
    """

    _file = "shift_monitor.pt"

    def __init__(self, probe: Any = None, *, probe_size: int = 16, **options: Any) -> None:
        super().__init__(probe, options)
        self._size = probe_size

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, train_dataloader: Any = None, **others: Any
    ) -> None:
        """Take the probe, and the state of a checkpoint that the training resumes from."""
        if state.is_world_process_zero and self._watches(model):
            self.load_state_dict(self._kept(args, state))
            self._begin(model, None if self._probe is not None else self._first(train_dataloader))

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Count an update."""
        if self.monitor is not None:
            self.monitor.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Close the sinks."""
        self._end()

    def _first(self, loader: Any) -> Any:
        data, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
        if data is None or collate is None or not hasattr(data, "__getitem__"):
            raise ValueError(
                "the training data cannot be looked at without consuming it; give the callback a probe, for example "
                "one collated batch"
            )
        # Data sets and collators may draw random numbers; the training must not notice.
        with private_randomness({torch.device("cpu")}, seed=0):
            return collate([data[index] for index in range(min(self._size, len(data)))])


class TransformersPopulationCallback(PopulationRenewal, _Checkpointed):
    """Renews the statistics of ``PopulationNorm*d(..., statistics="estimated")`` in a model that a ``Trainer`` trains.

    Before the first update, every ``every`` updates from then on, before every evaluation and checkpoint, and at the
    end. See :class:`~flexnorm.statistics.PopulationEstimator` for the cost and for data parallelism. The counters are
    kept in every checkpoint folder, as ``population_estimator.pt``.

    Args:
        samples: (N, *), training inputs to draw from, the model's only argument; under data parallelism, those of the
            process.
        **options: ``size``, ``every``, ``chunk`` and ``seed`` of the estimator.

    Attributes:
        estimator: The estimator, once the training has begun.

    Examples:
        >>> callback = TransformersPopulationCallback(torch.randn(10_000, 3, 8, 8), every=100)
        >>> callback.estimator is None
        True
    """

    _file = "population_estimator.pt"

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **others: Any) -> None:
        """Look for the layers, and take up the counters of a checkpoint that the training resumes from."""
        estimator = self._begin(model)
        if estimator is not None and (kept := self._kept(args, state)):
            estimator.load_state_dict(kept)

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Count an update."""
        if self.estimator is not None:
            self.estimator()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Renew where an evaluation or a checkpoint of these weights follows."""
        if self.estimator is not None and (control.should_evaluate or control.should_save):
            self.estimator.renew()

    on_epoch_end = on_step_end

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Renew for the final weights."""
        if self.estimator is not None:
            self.estimator.renew()
