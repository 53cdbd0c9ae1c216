r"""Bounds of the Wasserstein distance that cost far less than the distance, and the certified interval they give.

Every bound is a theorem about the two empirical distributions (Huang & Yu, arXiv 2001.02814, for the moment bounds; the
others follow from the definition in a line each, see the functions). They are evaluated in float64, and the interval is
widened by a bound on the rounding errors made on the way, so that lower <= W_p <= upper holds for the numbers and not
only for the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from flexnorm._messages import unknown_name
from flexnorm.transport.inequalities import LOWER, UPPER, Bound, PairStatistics
from flexnorm.transport.pair import Pair, Weights, check_order, power_of_two


@dataclass(frozen=True)
class ShiftBounds:
    """A certified interval around the Wasserstein distance of two sets of points, and all bounds it was made from.

    Attributes:
        lower: The largest lower bound; W_p is at least this. In the units of the points.
        upper: The smallest upper bound; W_p is at most this.
        lower_bounds: Every lower bound by name, each already lowered by the rounding slack.
        upper_bounds: Every upper bound by name, each already raised by the rounding slack.
        p: Order of the distance that is bounded.
        slack: By how much, in the units of the points, each bound was moved outwards at least, to cover rounding.

    Examples:
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> bounds = shift_bounds(x, x + 2)
        >>> 2.0 in bounds
        True
    """

    lower: float
    upper: float
    lower_bounds: dict[str, float]
    upper_bounds: dict[str, float]
    p: float
    slack: float

    @property
    def best_lower(self) -> str:
        """Name of the largest lower bound."""
        return max(self.lower_bounds, key=self.lower_bounds.__getitem__)

    @property
    def best_upper(self) -> str:
        """Name of the smallest upper bound."""
        return min(self.upper_bounds, key=self.upper_bounds.__getitem__)

    def __contains__(self, value: float) -> bool:
        return self.lower <= value <= self.upper

    def __getitem__(self, name: str) -> float:
        for table in (self.lower_bounds, self.upper_bounds):
            if name in table:
                return table[name]
        raise KeyError(unknown_name("bound", name, [*self.lower_bounds, *self.upper_bounds]))


def shift_bounds(
    x: Tensor,
    y: Tensor,
    p: float = 1,
    *,
    weights: Weights | None = None,
    projections: int = 32,
    seed: int = 0,
    include: Iterable[str] | None = None,
) -> ShiftBounds:
    r"""Every applicable bound of W_p(x, y), and the interval between the best two.

    Lower bounds (P, Q the two sets of points, u unit directions):

    * ``mean``: the distance of the means, $\|E X - E Y\|$.
    * ``marginal``: $\|(W_p(X_c, Y_c))_c\|$ over the coordinates c (2-norm for $p \le 2$, p-norm beyond): the norm is
      convex, so Jensen's inequality turns the distances of the coordinates into one of the vectors.
    * ``marginal_sum``: $\sum_c W_1(X_c, Y_c) / \sqrt d$ (p = 1; never above ``marginal``).
    * ``marginal_max``: $\max_c W_p(X_c, Y_c)$ (never above ``marginal``).
    * ``rotated``: ``marginal`` in another orthonormal basis: the principal axes of the differences X_i - Y_i.
    * ``sliced``: mean over random directions of $W_p^p(u^\top X, u^\top Y)$, to the power 1/p.
    * ``max_sliced``: the largest $W_p(u^\top X, u^\top Y)$ over random directions and the difference of the means.
    * ``radial``: $W_p(\|X - a\|, \|Y - a\|)$ with a the mean of both: the distance to a point is 1-Lipschitz.
    * ``moment_2``, ``moment_3``, ``moment_4``: from truncated absolute moments of order 2, 3, 4, see
      :func:`moment_lower_bound`.
    * ``gelbrich``: the W_2 distance G of the Gaussians with the same two moments: $W_2 \ge G$, and $W_1 \ge G^2 / D$
      with D the largest distance between a point of x and one of y (p = 1 or 2).

    Upper bounds:

    * ``coupled``: $(E\|X_i - Y_i\|^p)^{1/p}$, row i with row i (n = m): the coupling by the same input.
    * ``matched``: the same with rows matched by their rank along one direction (the difference of the means).
    * ``triangle``: $(E\|X - EX\|^p)^{1/p} + (E\|Y - EY\|^p)^{1/p} + \|EX - EY\|$.
    * ``moment``: $\sqrt{\operatorname{tr} \operatorname{Cov} X} + \sqrt{\operatorname{tr}\operatorname{Cov} Y} +
      \|EX - EY\|$ ($p \le 2$).

    Args:
        x: (n, d) points, or (n,) for points on the line.
        y: (m, d) points.
        p: Order of the distance, at least 1.
        weights: Pair of (n,) and (m,) non-negative weights, or ``None`` for equal weights.
        projections: How many random directions the sliced bounds look along.
        seed: Seed of those directions.
        include: Names of the bounds to evaluate; ``None`` for all that apply. Names that do not apply (``coupled`` with
            n != m) are left out of the result; without any upper bound left, ``upper`` is infinite, without any lower
            bound ``lower`` is 0.

    Returns:
        The interval and the bounds by name.

    Raises:
        TypeError: x or y is not a floating-point tensor.
        ValueError: Shapes that do not fit, leading batch axes, NaN or infinity, an unknown name in
            ``include``.
    """
    p = check_order(p)
    pair = Pair.of(x, y, weights)
    pair = Pair(*(None if part is None else part.detach() for part in pair))  # type: ignore[arg-type]
    if pair.x.ndim != 2:
        raise ValueError(
            f"shift_bounds takes one pair, points (n, d) and (m, d); got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    pair.check_finite()
    wanted = None if include is None else {include} if isinstance(include, str) else set(include)
    for name in wanted or ():
        if name not in LOWER and name not in UPPER:
            raise ValueError(unknown_name("bound", name, [*LOWER, *UPPER]))
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        scaled, factor = _centred(pair)
        statistics = PairStatistics(scaled, p, projections, seed)
        low, high = (_evaluated(table, wanted, statistics) for table in (LOWER, UPPER))
        error, radius = statistics.rounding, statistics.radius
    plain = len(pair.x) == len(pair.y) and pair.x_mass is None and pair.y_mass is None
    low = {name: _moved(value, p, -1, error, radius, not plain) for name, value in low.items()}
    high = {name: _moved(value, p, 1, error, radius, True) for name, value in high.items()}
    # A distance that a caller rounds to the dtype of the points must still lie inside.
    info = torch.finfo(pair.x.dtype)
    rounding, tiny = 2 * info.eps, info.tiny * info.eps
    lower = {name: max(0.0, value * factor * (1 - rounding) - tiny) for name, value in low.items()}
    upper = {name: value * factor * (1 + rounding) + tiny for name, value in high.items()}
    return ShiftBounds(
        lower=max(lower.values(), default=0.0),
        upper=min(upper.values(), default=math.inf),
        lower_bounds=lower,
        upper_bounds=upper,
        p=p,
        slack=error * radius * factor,
    )


def _evaluated(table: dict[str, Bound], wanted: set[str] | None, statistics: PairStatistics) -> dict[str, float]:
    values = {name: bound(statistics) for name, bound in table.items() if wanted is None or name in wanted}
    return {name: value for name, value in values.items() if value is not None}


def _centred(pair: Pair) -> tuple[Pair, float]:
    """Both sides in float64 on the CPU, scaled into [-1, 1] by a power of two (exact), the first point moved to 0.

    A common move changes no distance, and it takes out of the means the large common part that would cost them digits.
    """
    factor = power_of_two(pair.x, pair.y)
    x, y = (points.to("cpu", torch.float64) / factor for points in pair[:2])
    origin = x[:1].clone()
    return Pair(x - origin, y - origin, *(None if mass is None else mass.cpu() for mass in pair[2:])), factor


def _moved(value: float, p: float, outwards: int, error: float, radius: float, in_power: bool) -> float:
    """A bound of W_p moved by its rounding error: up (``outwards`` 1) or down to at least 0 (-1).

    Where the distance errs ``in_power``, in W_p^p by ``error`` relative to radius^p, the root magnifies that near 0.
    The solver of the exact distance does, and a plan of points of unequal weight, whose masses err by roundings of 1.
    """
    if p > 1 and in_power:
        top = max(value, radius)
        power = (value / top) ** p + outwards * error * (radius / top) ** p if top > 0 else 0.0
        value = top * max(power, 0.0) ** (1 / p)
    return max(value + outwards * error * radius, 0.0)
