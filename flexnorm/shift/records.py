"""One measurement as a plain object, and the function that makes it from two clouds of points."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor

from flexnorm.transport import safe_norm, shift_bounds, wasserstein

FAST_BOUNDS = ("mean", "marginal", "max_sliced", "radial", "coupled", "triangle")
"""The bounds that a monitor evaluates: cheap beside the exact distance at its sample sizes."""

_COLUMNS = {"anchor": "reference", "anchor_step": "reference_step"}


@dataclass(frozen=True)
class Record:
    """What every record of a monitor says: where it was made, of which layer or weight, and measured from where.

    Attributes:
        step: Optimizer steps done when the record was made.
        layer: Name of the layer or weight.
        anchor: What the shift is measured from: ``"previous"`` (``lag`` steps earlier) or ``"initial"`` (the first step
            that the monitor saw).
        anchor_step: Optimizer steps done when the anchor was taken.
    """

    step: int
    layer: str
    anchor: str
    anchor_step: int

    def asdict(self) -> dict[str, Any]:
        """All numbers in one flat dictionary, metrics last; the anchor is called ``reference``, as in every file."""
        values = {_COLUMNS.get(f.name, f.name): getattr(self, f.name) for f in fields(self)}
        return values | dict(values.pop("metrics", {}))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`asdict`."""
        names = {_COLUMNS.get(f.name, f.name): f.name for f in fields(cls)}
        own: dict[str, Any] = {names[name]: value for name, value in values.items() if name in names}
        metrics = {name: value for name, value in values.items() if name not in names}
        return cls(**(own | {"metrics": metrics} if metrics else own))


@dataclass(frozen=True)
class Shift:
    """How far one distribution moved, in the units of the activations and relative to its own spread.

    Attributes:
        lower: Certified lower bound of ``w1``.
        w1: Wasserstein-1 distance of the two sets of points, exact.
        upper: Certified upper bound of ``w1``.
        spread: Mean Euclidean distance of the points before to their mean, E||X - EX||: what ``w1`` is measured
            against, so that a layer does not look steady by shrinking its output.
        relative_lower: ``lower / spread``.
        relative: ``w1 / spread``. With a spread of 0: 0 where nothing moved, else infinite.
        relative_upper: ``upper / spread``.
    """

    lower: float
    w1: float
    upper: float
    spread: float
    relative_lower: float
    relative: float
    relative_upper: float


def measure_shift(before: Tensor, after: Tensor, *, include: Iterable[str] | None = FAST_BOUNDS) -> Shift:
    """Wasserstein-1 distance between two sets of points, its certified interval, and both relative to the spread.

    Rows that come from the same input in both give a close upper bound, and keep the bias of empirical
    transport in high dimension out: two independent draws from one 64-dimensional Gaussian are about 9 apart.

    Args:
        before: (n, d) points.
        after: (m, d) points; row i from the input of row i of ``before`` where n = m.
        include: Bounds to evaluate, see :func:`flexnorm.shift.shift_bounds`; ``None`` for all.

    Returns:
        The shift; every number is NaN if a point is not finite.

    Raises:
        TypeError: A side is not a floating-point tensor.
        ValueError: Shapes that do not fit.

    Examples:
        >>> x = torch.tensor([[-1.0], [1.0]])
        >>> shift = measure_shift(x, x + 0.5)
        >>> shift.w1, shift.spread, shift.relative
        (0.5, 1.0, 0.5)
    """
    if not bool(torch.isfinite(before).all()) or not bool(torch.isfinite(after).all()):
        return Shift(*[math.nan] * len(fields(Shift)))
    before, after = before.detach().double(), after.detach().double()
    bounds = shift_bounds(before, after, include=include)
    w1 = float(wasserstein(before, after, "exact"))
    spread = float(safe_norm(before - before.mean(0)).mean())
    return Shift(bounds.lower, w1, bounds.upper, spread, *(_ratio(v, spread) for v in (bounds.lower, w1, bounds.upper)))


@dataclass(frozen=True)
class ShiftRecord(Shift, Record):
    """The shift of one layer between two steps, with what else was asked for.

    The attributes are those of :class:`Record` (to the layer's name ``#2`` and so on is appended for further calls of
    it within one forward), of :class:`Shift`, and:

    Attributes:
        metrics: Further numbers by name, as the monitor's ``metrics`` ask for.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)


def _ratio(value: float, spread: float) -> float:
    if spread > 0:
        return value / spread
    return 0.0 if value == 0 else math.inf
