r"""How fast weights turn: angular update and effective learning rate of each weight.

A weight vector w that feeds a normalization has no length that matters: only its direction is learned, and a gradient
step of rate $\eta$ moves the direction like a step of rate $\eta / \|w\|^2$ on the unit sphere would (van Laarhoven,
arXiv 1706.05350; Arora, Li & Lyu, arXiv 1812.03981). Weight decay therefore sets that effective rate, and the angle per
step is what shows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flexnorm.probe import Selection, select_parameters, unwrap
from flexnorm.shift._stepping import Reference, Snapshot, Stepper
from flexnorm.shift.schedules import Schedule


@dataclass(frozen=True)
class WeightRecord:
    """How far the vectors of one weight turned between two steps.

    Attributes:
        step: Optimizer steps done when the weight was looked at.
        layer: Name of the weight.
        reference: ``"previous"`` or ``"initial"``.
        reference_step: Optimizer steps done at the look before.
        norm: Root mean square length of the weight vectors (rows of output units), now.
        angle: Mean angle between the vectors before and now, in radians.
        largest_angle: Largest of these angles.
        learning_rate: The optimizer's rate for this weight now; NaN without an optimizer.
        effective_rate: ``learning_rate`` times the mean over the vectors of 1 / length^2.
    """

    step: int
    layer: str
    reference: str
    reference_step: int
    norm: float
    angle: float
    largest_angle: float
    learning_rate: float
    effective_rate: float

    def asdict(self) -> dict[str, Any]:
        """All fields as a dictionary."""
        return asdict(self)


class WeightMonitor(Stepper[WeightRecord]):
    """Watches the direction and length of weights; needs no forward pass.

    Args:
        model: Any module, also compiled or wrapped.
        optimizer: Where to read learning rates; ``None`` to do without.
        weights: Which parameters, as in :func:`flexnorm.probe.select_parameters` (names, patterns, modules, classes of
            modules that hold them, ..., or a list of these), or the report of
            :func:`flexnorm.optim.scale_invariant_weights`; ``None`` for all parameters with two or more axes. Angles
            mean most for scale-invariant weights.
        every: When to measure: a number of steps, a list of steps, or a schedule.
        lag: Optimizer steps between the two looks that are compared.
        reference: Compare with ``"previous"`` (``lag`` steps earlier), with ``"initial"`` (the start), or ``"both"``.
        sinks: Where else to put each record, as for :class:`ShiftMonitor`.

    Attributes:
        records: All measurements so far, a list of :class:`WeightRecord`.
        steps: Optimizer steps seen so far.
        weights: Names of the weights that are watched.

    Raises:
        ValueError: A name matches no weight with two or more axes.

    Examples:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> with WeightMonitor(model, every=1) as monitor, torch.no_grad():
        ...     model.weight *= 3
        ...     (record,) = monitor.step()
        >>> record.angle < 1e-6
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        weights: Selection | Mapping[str, Any] | None = None,
        *,
        every: int | Schedule | Iterable[int] = 100,
        lag: int = 1,
        reference: Reference = "previous",
        sinks: Iterable[Any] = (),
    ) -> None:
        # Here and below, not above: optimizers bring in the compiler, which would double the time to import this room.
        from flexnorm.optim.rows import RowLayout

        super().__init__(every, lag, reference, sinks)
        self._optimizer = optimizer
        self._parameters = _matching(unwrap(model), weights)
        self._layouts = {
            name: RowLayout.of(parameter, *_row_axis(unwrap(model), parameter))
            for name, parameter in self._parameters.items()
        }

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the weights that are watched."""
        return tuple(self._parameters)

    def look(self) -> Snapshot:
        """Copies of the weights, by name."""
        return {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    def _compare(self, kind: str, taken: int, before: Snapshot, now: Snapshot) -> list[WeightRecord]:
        from flexnorm.optim.manifold import angle
        from flexnorm.optim.rows import to_rows

        records = []
        for name, weight in now.items():
            old, new = (
                to_rows(values.double(), self._layouts[name]) for values in (before[name].to(weight.device), weight)
            )
            angles = angle(old, new)
            square = new.square().sum(-1)
            rate = self._rate(self._parameters[name])
            records.append(
                WeightRecord(
                    step=self.steps,
                    layer=name,
                    reference=kind,
                    reference_step=taken,
                    norm=float(square.mean().sqrt()),
                    angle=float(angles.mean()),
                    largest_angle=float(angles.max()),
                    learning_rate=rate,
                    effective_rate=rate * float(square[square > 0].reciprocal().mean())
                    if bool((square > 0).any())
                    else 0.0,
                )
            )
        return records

    def _rate(self, parameter: Tensor) -> float:
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        return next((float(g["lr"]) for g in groups if any(p is parameter for p in g["params"])), float("nan"))

    def _config(self) -> dict[str, Any]:
        return {"weights": list(self._parameters), "lag": self._lag, "reference": self._reference}

    @staticmethod
    def _record(values: Mapping[str, Any]) -> WeightRecord:
        return WeightRecord(**values)


def _matching(model: nn.Module, weights: Selection | Mapping[str, Any] | None) -> dict[str, nn.Parameter]:
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    if weights is None:
        return parameters
    chosen = select_parameters(model, parameters, getattr(weights, "selected", weights), "weights", "weight")
    return {name: parameters[name] for name in chosen}


def _row_axis(model: nn.Module, parameter: nn.Parameter) -> tuple[int, int]:
    """Axis of the output units and number of groups: transposed convolutions have them elsewhere."""
    for module in model.modules():
        if any(own is parameter for own in module.parameters(recurse=False)):
            transposed = bool(getattr(module, "transposed", False)) and parameter.ndim >= 3
            return (1, int(getattr(module, "groups", 1))) if transposed else (0, 1)
    return 0, 1  # pragma: no cover - every parameter of a model belongs to one of its modules
