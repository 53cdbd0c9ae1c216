"""A callback for the Trainer of Hugging Face Transformers that watches the shift of every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from flexnorm.integrations._watch import ShiftWatch, base_class
from flexnorm.probe import private_randomness
from flexnorm.shift import ShiftRecord

FILE = "shift_monitor.pt"
"""Name of the state inside a checkpoint folder of the trainer."""

_Base: Any = base_class((("transformers.trainer_callback", "TrainerCallback"),))


class TransformersShiftCallback(_Base):
    """Watches the shift of the layers of a model that a Transformers ``Trainer`` trains, on its first process.

    The training stays bit-identical. The state is kept in every checkpoint folder, as ``shift_monitor.pt``, so that a
    training that resumes from it goes on exactly.

    Args:
        probe: Inputs of the model, as for :class:`flexnorm.shift.ShiftMonitor`, most often a dictionary; ``None`` for
            the first items of the training data, put together by the trainer's own collator.
        probe_size: How many items that are.
        **options: All other arguments of :class:`flexnorm.shift.ShiftMonitor`. ``layers`` is ``"norm"`` by default,
            which finds torch's LayerNorm and RMSNorm; models with classes of their own take a pattern, for example
            ``layers="re:.*norm.*"``.

    Attributes:
        records: All measurements so far.
        monitor: The monitor, once the training has begun; ``None`` on other processes.

    Example:
        >>> callback = TransformersShiftCallback(every=100, sinks=["shift.csv"])
        >>> callback.records
        []
    """

    def __init__(self, probe: Any = None, *, probe_size: int = 16, **options: Any) -> None:
        super().__init__()
        self._watch = ShiftWatch(probe, options)
        self._size = probe_size

    @property
    def records(self) -> list[ShiftRecord]:
        """All measurements so far."""
        return self._watch.records

    @property
    def monitor(self) -> Any:
        """The monitor, once the training has begun."""
        return self._watch.monitor

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,  # noqa: ARG002
        model: nn.Module,
        train_dataloader: Any = None,
        **others: Any,  # noqa: ARG002
    ) -> None:
        """Take the probe, and the state of a checkpoint that the training resumes from."""
        if not state.is_world_process_zero:
            return
        kept = _checkpoint(args, state) / FILE
        if state.global_step > 0 and kept.is_file():
            self._watch.load_state_dict(torch.load(kept, map_location="cpu", weights_only=True))
        inputs = None if self._watch.probe is not None else self._first(train_dataloader)
        self._watch.begin(model, inputs)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:  # noqa: ARG002
        """Count an update."""
        self._watch.step()

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:  # noqa: ARG002
        """Put the state into the checkpoint that was just written."""
        folder = _checkpoint(args, state)
        if self._watch.monitor is not None and folder.is_dir():
            part = folder / f"{FILE}.part"
            torch.save(self._watch.state_dict(), part)
            part.replace(folder / FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:  # noqa: ARG002
        """Close the sinks."""
        self._watch.end()

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


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
