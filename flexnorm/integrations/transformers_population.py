"""A callback for the Trainer of Hugging Face Transformers that keeps estimated population statistics fresh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexnorm.integrations._watch import base_class
from flexnorm.statistics import PopulationEstimator

FILE = "population_estimator.pt"
"""Name of the state inside a checkpoint folder of the trainer."""

_Base: Any = base_class((("transformers.trainer_callback", "TrainerCallback"),))


class TransformersPopulationCallback(_Base):
    """Renews the statistics of ``PopulationNorm*d(..., statistics="estimated")`` in a model that a ``Trainer`` trains.

    Before the first update, every ``every`` updates from then on, before every evaluation and checkpoint, and at the
    end. Under data parallelism each process hands over its part of the samples, and the statistics are those of all.
    The cost is that of :class:`~flexnorm.statistics.PopulationEstimator`; ``callback.estimator.cost`` has it in seconds
    per update. The counters are kept in every checkpoint folder, as ``population_estimator.pt``.

    Args:
        samples: (N, *), training inputs to draw from; the model is called with them as its only argument.
        **options: All other arguments of :class:`~flexnorm.statistics.PopulationEstimator`: ``size``, ``every``,
            ``chunk``, ``seed``.

    Attributes:
        estimator: The estimator, once the training has begun.

    Example:
        >>> callback = TransformersPopulationCallback(torch.randn(10_000, 3, 8, 8), every=100)
        >>> callback.estimator is None
        True
    """

    def __init__(self, samples: Tensor, **options: Any) -> None:
        super().__init__()
        self.estimator: PopulationEstimator | None = None
        self._samples, self._options = samples, options

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **others: Any) -> None:  # noqa: ARG002
        """Look for the layers, and take up the counters of a checkpoint that the training resumes from."""
        self.estimator = PopulationEstimator(model, self._samples, **self._options)
        kept = _checkpoint(args, state) / FILE
        if state.global_step > 0 and kept.is_file():
            self.estimator.load_state_dict(torch.load(kept, map_location="cpu", weights_only=True))

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:  # noqa: ARG002
        """Count an update."""
        if self.estimator is not None:
            self.estimator()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:  # noqa: ARG002
        """Renew where an evaluation or a checkpoint of these weights follows."""
        if self.estimator is not None and (control.should_evaluate or control.should_save):
            self.estimator.renew()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """As at the end of a step."""
        self.on_step_end(args, state, control, **others)

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:  # noqa: ARG002
        """Put the counters into the checkpoint that was just written."""
        folder = _checkpoint(args, state)
        if self.estimator is not None and state.is_world_process_zero and folder.is_dir():
            part = folder / f"{FILE}.part"
            torch.save(self.estimator.state_dict(), part)
            part.replace(folder / FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:  # noqa: ARG002
        """Renew for the final weights."""
        if self.estimator is not None:
            self.estimator.renew()


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
