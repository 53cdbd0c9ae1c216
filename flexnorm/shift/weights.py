"""How far weights move from step to step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from flexnorm.probe import (
    Selection,
    select_parameters,
)
from flexnorm.shift.base import Monitor, MonitorOptions, Snapshot
from flexnorm.shift.records import Record


@dataclass(frozen=True)
class WeightRecord(Record):
    """How far the vectors of one weight turned between two steps.

    The attributes are those of :class:`flexnorm.shift.records.Record` and:

    Attributes:
        norm: Root mean square length of the weight vectors (rows of output units), now.
        angle: Mean angle between the vectors before and now, in radians.
        largest_angle: Largest of these angles.
        learning_rate: The optimizer's rate for this weight now; NaN without an optimizer.
        effective_rate: ``learning_rate`` times the mean over the vectors of 1 / length^2.
    """

    norm: float
    angle: float
    largest_angle: float
    learning_rate: float
    effective_rate: float


class WeightMonitor(Monitor[WeightRecord]):
    r"""Watches how fast weights turn, and their length; needs no forward pass.

    A weight vector w that feeds a normalization has no length that matters: only its direction is learned, and a
    gradient step of rate $\eta$ moves the direction like a step of rate $\eta / \|w\|^2$ on the unit sphere would (van
    Laarhoven, arXiv 1706.05350; Arora, Li & Lyu, arXiv 1812.03981). Weight decay therefore sets that effective rate,
    and the angle per step is what shows it.

    Args:
        model: Any module, also compiled or wrapped.
        optimizer: Where to read learning rates; ``None`` to do without.
        weights: Which parameters, as in :func:`flexnorm.probe.select_parameters` (names, patterns, modules, classes of
            modules that hold them, ..., or a list of these), or the report of
            :func:`flexnorm.optim.scale_invariant_weights`; ``None`` for all parameters with two or more axes. Angles
            mean most for scale-invariant weights.
        **options: ``every``, ``lag``, ``anchor`` and ``sinks``, as for :class:`ShiftMonitor`, with its defaults.

    Attributes:
        records: All measurements so far, a list of :class:`WeightRecord`.
        steps: Optimizer steps seen so far.
        weights: Names of the weights that are watched.

    Raises:
        ValueError: A name, or all that is chosen, matches no weight with two or more axes.

    Examples:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> with WeightMonitor(model, every=1) as monitor, torch.no_grad():
        ...     model.weight *= 3
        ...     (record,) = monitor.step()
        >>> record.angle < 1e-6
        True
    """

    _kind = WeightRecord

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        weights: Selection | Mapping[str, Any] | None = None,
        **options: Unpack[MonitorOptions],
    ) -> None:
        # Here and below, not above: optimizers bring in the compiler, which would double the time of the import.
        from flexnorm.optim import RowLayout, row_axis

        super().__init__(model, **options)
        self._optimizer = optimizer
        parameters = {name: p for name, p in self._model.named_parameters() if p.ndim >= 2}
        if weights is not None:
            chosen = getattr(weights, "selected", weights)
            names = select_parameters(self._model, parameters, chosen, "weights", kind="weight", required=True)
            parameters = {name: parameters[name] for name in names}
        self._parameters = parameters
        self.weights = tuple(parameters)
        modules = reversed(list(self._model.modules()))
        owners = {p: module for module in modules for p in module.parameters(recurse=False)}
        self._layouts = {name: RowLayout.of(p, *row_axis(owners[p], p)) for name, p in parameters.items()}

    def look(self) -> Snapshot:
        """Copies of the weights, by name."""
        return {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    def _compare(self, before: Snapshot, now: Snapshot) -> Iterator[tuple[str, Mapping[str, Any]]]:
        from flexnorm.optim import angle, to_rows

        for name, weight in now.items():
            old, new = (to_rows(w.to(weight.device).double(), self._layouts[name]) for w in (before[name], weight))
            angles, square = angle(old, new), new.square().sum(-1)
            alive, rate = square[square > 0], self._rate(self._parameters[name])
            numbers = {
                "norm": float(square.mean().sqrt()),
                "angle": float(angles.mean()),
                "largest_angle": float(angles.max()),
                "learning_rate": rate,
                "effective_rate": rate * float(alive.reciprocal().mean()) if len(alive) else 0.0,
            }
            yield name, numbers

    def _rate(self, parameter: Tensor) -> float:
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        return next((float(g["lr"]) for g in groups if any(p is parameter for p in g["params"])), float("nan"))

    def _config(self) -> dict[str, Any]:
        return {"weights": list(self._parameters)}
