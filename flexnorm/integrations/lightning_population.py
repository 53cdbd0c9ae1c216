"""A callback for Lightning's Trainer that keeps estimated population statistics fresh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from flexnorm.integrations._watch import base_class
from flexnorm.integrations.lightning_trainer import _precision
from flexnorm.statistics import PopulationEstimator

_Base: Any = base_class((("lightning.pytorch.callbacks", "Callback"), ("pytorch_lightning.callbacks", "Callback")))


class LightningPopulationCallback(_Base):
    """Renews the statistics of ``PopulationNorm*d(..., statistics="estimated")`` in a LightningModule as it trains.

    Before the first update, every ``every`` updates from then on (batches that gradient accumulation takes together are
    one), before every validation and test of the training, and at its end. Under data parallelism each process hands
    over its part of the samples, and the statistics are those of all. The cost is that of
    :class:`~flexnorm.statistics.PopulationEstimator`; ``callback.estimator.cost`` has it in seconds per update. The
    counters go into the trainer's checkpoints, so that an interrupted training goes on exactly.

    Args:
        samples: (N, *), training inputs of the module to draw from.
        **options: All other arguments of :class:`~flexnorm.statistics.PopulationEstimator`: ``size``, ``every``,
            ``chunk``, ``seed``.

    Attributes:
        estimator: The estimator, once the training has begun.

    Example:
        >>> import torch
        >>> callback = LightningPopulationCallback(torch.randn(10_000, 8), every=100)
        >>> callback.estimator is None
        True
    """

    def __init__(self, samples: Tensor, **options: Any) -> None:
        super().__init__()
        self.estimator: PopulationEstimator | None = None
        self._samples, self._options = samples, options
        self._state: Mapping[str, Any] = {}
        self._updates: int | None = None

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:  # noqa: ARG002
        """Look for the layers; an error here says what is missing."""
        self.estimator = PopulationEstimator(pl_module, self._samples, **self._options)
        if self._state:
            self.estimator.load_state_dict(dict(self._state))
        self._updates = None

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Count an update where one begins with this batch."""
        if self.estimator is not None and trainer.global_step != self._updates:
            self._updates = trainer.global_step
            with _precision(trainer):
                self.estimator()

    def on_validation_start(self, trainer: Any, pl_module: nn.Module) -> None:  # noqa: ARG002
        """Renew, so that the statistics follow the weights that are evaluated."""
        self._renew(trainer)

    def on_test_start(self, trainer: Any, pl_module: nn.Module) -> None:  # noqa: ARG002
        """As before a validation."""
        self._renew(trainer)

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:  # noqa: ARG002
        """Renew for the final weights."""
        self._renew(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The counters of the estimator."""
        return dict(self._state) if self.estimator is None else dict(self.estimator.state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state when the training begins."""
        self._state = dict(state_dict)

    def _renew(self, trainer: Any) -> None:
        # Lightning validates once before the training: there is no estimator yet, and nothing to renew for.
        if self.estimator is not None:
            with _precision(trainer):
                self.estimator.renew()
