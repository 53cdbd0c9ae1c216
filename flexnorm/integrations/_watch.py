"""What the callbacks share: a monitor or an estimator that begins with the training, and a state that outlives it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flexnorm._messages import nothing_done
from flexnorm.nn import norm_of
from flexnorm.probe import map_tensors, normalizes
from flexnorm.shift import ShiftMonitor, ShiftRecord
from flexnorm.statistics import PopulationEstimator


class ShiftWatch:
    """A :class:`flexnorm.shift.ShiftMonitor` that is made, with its options, when the training begins."""

    def __init__(self, probe: Any, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.monitor: ShiftMonitor | None = None
        self._probe, self._options = probe, dict(options)
        self._state: Mapping[str, Any] | None = None
        self._idle = False

    @property
    def records(self) -> list[ShiftRecord]:
        """All measurements so far."""
        return [] if self.monitor is None else self.monitor.records

    def _watches(self, model: nn.Module) -> bool:
        """Whether there is something to watch; that a model has no norms is said once, and stops no training."""
        if (
            not self._idle
            and self._options.get("layers", "norm") == "norm"
            and not any(map(normalizes, model.modules()))
        ):
            self._idle = True
            said, advice = f"{type(self).__name__} measures nothing", "Choose others, by layers=."
            nothing_done(said, "normalization layers", [], advice)
        return not self._idle

    def _begin(self, model: nn.Module, inputs: Any) -> None:
        """Make the monitor, or take up the state of the one before, and look for the first time."""
        self._probe = inputs if self._probe is None else self._probe
        device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        monitor = ShiftMonitor(model, to_device(self._probe, device), **self._options)
        if self._state is not None:
            monitor.load_state_dict(self._state)
            self._state = None
        monitor.start()
        self.monitor = monitor

    def _end(self) -> None:
        """Close the sinks."""
        if self.monitor is not None:
            self.monitor.close()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to go on exactly: the probe and the state of the monitor."""
        state = self._state if self.monitor is None else self.monitor.state_dict()
        return {} if state is None else {"probe": to_device(self._probe, torch.device("cpu")), "monitor": dict(state)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state when the training begins."""
        if state_dict:
            self._probe, self._state = state_dict["probe"], state_dict["monitor"]


class PopulationRenewal:
    """A :class:`flexnorm.statistics.PopulationEstimator` that is made, with its options, when the training begins."""

    def __init__(self, samples: Tensor | Mapping[str, Tensor], **options: Any) -> None:
        super().__init__()
        self.estimator: PopulationEstimator | None = None
        self._samples, self._options = samples, options
        self._state: Mapping[str, Any] = {}

    def _begin(self, model: nn.Module) -> PopulationEstimator | None:
        """Make the estimator; a model without layers to renew goes on without one, and that is said."""
        norms = [(name, m) for name, m in model.named_modules() if norm_of(m) is not None]
        if not any(getattr(module, "statistics", "") == "estimated" for _, module in norms):
            nothing_done(
                f"{type(self).__name__} renews nothing",
                "PopulationNorm layers with estimated statistics",
                [(name, type(module).__name__) for name, module in norms],
                "flexnorm.convert(model, 'population', statistics='estimated') makes them.",
            )
            return None
        self.estimator = PopulationEstimator(model, self._samples, **self._options)
        if self._state:
            self.estimator.load_state_dict(dict(self._state))
        return self.estimator

    def state_dict(self) -> dict[str, Any]:
        """The counters of the estimator."""
        return dict(self._state) if self.estimator is None else dict(self.estimator.state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state when the training begins."""
        self._state = dict(state_dict)


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors of a probe on a device, in plain dictionaries, lists and tuples."""
    return map_tensors(lambda tensor: tensor.detach().to(device), value, plain=True)


def base_class(homes: Sequence[tuple[str, str]]) -> type:
    """The class that a framework wants its callbacks to be of: of the one in use, else the first that is installed.

    ``object`` where none of the homes (module and class, in the order of preference) is installed: it serves trainers
    that ask for methods alone.
    """
    in_use = [home for home in homes if home[0].split(".")[0] in sys.modules]
    for module, name in (*in_use, *homes):
        try:
            found: type = getattr(importlib.import_module(module), name)
        except ImportError:
            continue
        return found
    return object
