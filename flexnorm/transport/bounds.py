r"""Bounds of the Wasserstein distance that cost far less than the distance, and the certified interval they give.

Every bound is a theorem about the two empirical distributions, with its reason beside it. The moment bounds are those
of Huang & Yu (arXiv 2001.02814): $f(t) = \min(|t|, B)^k / (k B^{k-1})$ has slope at most 1, so by
Kantorovich-Rubinstein duality $|E f(X) - E f(Y)| \le W_1(X, Y)$: unequal moments of order k > 2 keep W_1 away from 0
however well the first two, which a normalizer fixes, agree. All are evaluated in float64, and the interval is widened
by a bound on the rounding errors made on the way, so that lower <= W_p <= upper holds for the numbers and not only for
the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from flexnorm._messages import unknown_name
from flexnorm.transport.distances import directions
from flexnorm.transport.pair import (
    Pair,
    Weights,
    along_lines,
    check_order,
    check_points,
    power_mean,
    power_of_two,
    quantile_matching,
    safe_norm,
)

_LARGEST_BASIS = 512


def truncated_moment(size: Tensor, order: float, limit: Tensor) -> Tensor:
    r"""The 1-Lipschitz function $\min(s, B)^k / (k B^{k-1})$ of absolute values s (n, d), with B (d,) at least 0."""
    safe = torch.where(limit > 0, limit, torch.ones_like(limit))
    return torch.minimum(size, limit).div(safe).pow(order) * limit / order


def moment_lower_bound(x: Tensor, y: Tensor, order: float = 4, limit: Tensor | float | None = None) -> Tensor:
    r"""Lower bound of W_1 of every coordinate from truncated absolute moments about 0.

    $W_1(X_c, Y_c) \ge |E \min(|X_c|, B)^k - E \min(|Y_c|, B)^k| / (k B^{k-1})$. The Euclidean norm of the result is a
    lower bound of W_1 of the vectors. The smaller B is, while still reaching beyond where the two distributions differ,
    the tighter the bound.

    Args:
        x: (n, d) points; centre them first if moments about the mean are meant.
        y: (m, d) points.
        order: The order k, at least 1.
        limit: The truncation B, one positive number or (d,); ``None`` for the largest absolute value of each coordinate
            on both sides.

    Returns:
        (d,) in the units of the points.

    Raises:
        TypeError: x or y is not a floating-point tensor.
        ValueError: Shapes or devices that do not fit, ``order`` below 1, or a limit that is not positive.

    Examples:
        >>> x = torch.tensor([[-1.0], [1.0]])
        >>> moment_lower_bound(x, 2 * x, order=4, limit=2.0)
        tensor([0.4688])
    """
    order = check_order(order)
    check_points("x", x)
    check_points("y", y)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or x.device != y.device or 0 in (len(x), len(y)):
        raise ValueError(
            f"x and y must be (n, d) and (m, d) with n and m at least 1 on one device, got {tuple(x.shape)} on "
            f"{x.device} and {tuple(y.shape)} on {y.device}"
        )
    x, y = x.abs(), y.abs()
    if limit is None:
        bound = torch.maximum(x.amax(0), y.amax(0))
    else:
        bound = torch.as_tensor(limit, dtype=x.dtype, device=x.device).expand(x.shape[-1:])
        if not bool((bound > 0).all()):
            raise ValueError(f"limit must be positive, got {limit!r}")
    return (truncated_moment(x, order, bound).mean(0) - truncated_moment(y, order, bound).mean(0)).abs()


class PairStatistics:
    """A pair of sets of points, (n, d) and (m, d) in float64 on the CPU, and what several bounds are made of."""

    def __init__(self, pair: Pair, p: float, projections: int, seed: int) -> None:
        self.pair, self.p, self.projections, self.seed = pair, p, projections, seed
        self.x, self.y, *masses = pair
        self.masses = tuple(masses)
        n, m, self.d = len(self.x), *self.y.shape
        self.means = self.averages(self.x, self.y)  # (d,) of both sides
        self.centre = (self.means[0] + self.means[1]) / 2
        self.gap = float(safe_norm(self.means[0] - self.means[1]))
        # (n,) and (m,) distances of the points to the mean of their own side; then the largest one from the origin.
        self.radii = safe_norm(self.x - self.means[0]), safe_norm(self.y - self.means[1])
        self.radius = max(float(safe_norm(points).max()) for points in (self.x, self.y))
        # A bound on the rounding error of every bound, and of the exact distance, relative to that radius. Sums of n
        # terms err by at most n roundings of the mean size of a term, an inner product of length d by d roundings, a
        # combination over d coordinates by another factor sqrt(d), the dual variables of the assignment by n roundings
        # of the largest cost. The constant 8 covers a few such steps in a row.
        self.rounding = 8 * (n + m + self.d * math.sqrt(self.d) + 8) * torch.finfo(torch.float64).eps

    def averages(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted means over the points of both sides, along axis 0."""
        first, second = (
            values.mean(0) if mass is None else torch.tensordot(mass, values, dims=([0], [0]))
            for values, mass in zip((x, y), self.masses, strict=True)
        )
        return first, second

    def lines(self, x: Tensor, y: Tensor) -> Tensor:
        """W_p between rows: x (k, n), y (k, m) -> (k,)."""
        return along_lines(self.pair, x, y, self.p)

    def mean_radii(self, p: float) -> float:
        """p-means of the radii of both sides, summed."""
        return float(sum(power_mean(radii, p, mass) for radii, mass in zip(self.radii, self.masses, strict=True)))

    @cached_property
    def marginals(self) -> Tensor:
        """(d,) distances W_p of the coordinates."""
        return self.lines(self.x.mT, self.y.mT)

    @cached_property
    def slices(self) -> Tensor:
        """(k + 1,) distances W_p along k random directions and, last, along the difference of the means."""
        rows = directions(self.pair, self.projections, self.seed, mean_difference=True).mT
        return self.lines(rows @ self.x.mT, rows @ self.y.mT)


def _combined(parts: Tensor, p: float) -> float:
    # For p > 2 the 2-norm of the parts may exceed W_p; their p-norm does not, as ||v||_2 >= ||v||_p.
    return float(safe_norm(parts)) if p <= 2 else float(power_mean(parts, p)) * len(parts) ** (1 / p)


def _rotated(s: PairStatistics) -> float | None:
    paired = s.x.shape == s.y.shape
    if s.d == 1 or (min(len(s.x), s.d) if paired else s.d) > _LARGEST_BASIS:
        return None
    if paired:
        basis = torch.linalg.svd(s.x - s.y, full_matrices=False).Vh
    else:
        # Without pairs, the change of the second moment about a common point tells where mass has moved.
        first, second = (
            moved.mT @ (moved / len(moved) if mass is None else moved * mass.unsqueeze(-1))
            for moved, mass in zip((s.x - s.means[0], s.y - s.means[0]), s.masses, strict=True)
        )
        basis = torch.linalg.eigh(first - second).eigenvectors.mT
    return _combined(s.lines(basis @ s.x.mT, basis @ s.y.mT), s.p)


def _moment(order: int, s: PairStatistics) -> float:
    x, y = ((points - s.centre).abs() for points in (s.x, s.y))
    reach = torch.maximum(x.amax(0), y.amax(0))
    best = 0.0
    for limit in (reach, reach / 2):
        first, second = s.averages(*(truncated_moment(size, order, limit) for size in (x, y)))
        best = max(best, float(safe_norm(first - second)))
    return best


def _gelbrich(s: PairStatistics) -> float | None:
    if s.p not in (1, 2):
        return None
    x, y = (
        (points - mean) * (len(points) ** -0.5 if mass is None else mass.sqrt().unsqueeze(-1))
        for points, mean, mass in zip((s.x, s.y), s.means, s.masses, strict=True)
    )
    # Nuclear norm of C_x^(1/2) C_y^(1/2) = that of x y^T; reduce each factor to at most d rows first.
    x, y = (torch.linalg.qr(rows, mode="r").R if rows.shape[0] > rows.shape[1] else rows for rows in (x, y))
    bures = float(x.square().sum() + y.square().sum() - 2 * torch.linalg.svdvals(x @ y.mT).sum())
    # The difference of traces cancels; its rounding error must not be magnified by the root.
    distance = float((s.gap**2 + max(bures - s.rounding * s.radius**2, 0.0)) ** 0.5)
    if s.p == 2:
        return distance
    reach = float(s.radii[0].max() + s.radii[1].max()) + s.gap
    return distance * (distance / reach) if reach > 0 else 0.0


def _coupled(s: PairStatistics) -> float | None:
    a, b = s.masses
    if len(s.x) != len(s.y) or (a is None) != (b is None) or (a is not None and not torch.equal(a, b)):  # type: ignore[arg-type]
        return None
    return float(power_mean(safe_norm(s.x - s.y), s.p, a))


def _matched(s: PairStatistics) -> float:
    direction = s.means[0] - s.means[1]
    if not bool(direction.any()):
        direction = torch.ones_like(direction)
    i, j, mass = quantile_matching(s.x @ direction, s.y @ direction, *s.masses)
    return float(power_mean(safe_norm(s.x[i] - s.y[j]), s.p, mass))


Bound = Callable[[PairStatistics], float | None]
"""A bound of W_p of two sets of points, or ``None`` where it does not apply."""

LOWER: dict[str, Bound] = {
    # The mean is 1-Lipschitz under every coupling: ||E(X - Y)|| <= E||X - Y||.
    "mean": lambda s: s.gap,
    # E||X - Y|| >= ||(E|X_c - Y_c|)_c|| by Jensen (Minkowski for p > 1); each coordinate costs at least its W_p.
    "marginal": lambda s: _combined(s.marginals, s.p),
    # The 1-norm of a vector is at most sqrt(d) times its 2-norm.
    "marginal_sum": lambda s: float(s.marginals.sum()) / math.sqrt(s.d) if s.p == 1 else None,
    # One coordinate is a 1-Lipschitz map.
    "marginal_max": lambda s: float(s.marginals.max()),
    # `marginal` along the axes in which the two sides differ: distances are the same in every orthonormal basis. A
    # partial basis is enough, since leaving out a direction only lowers the sum.
    "rotated": _rotated,
    # Each projection is 1-Lipschitz, hence so is the mean over them, and the best of them is a bound.
    "sliced": lambda s: float(s.slices[:-1].pow(s.p).mean() ** (1 / s.p)),
    "max_sliced": lambda s: float(s.slices.max()),
    # The distance to a fixed point is 1-Lipschitz.
    "radial": lambda s: float(s.lines(*(safe_norm(points - s.centre).unsqueeze(0) for points in (s.x, s.y)))),
    # Truncated absolute moments, at the largest value and at its half.
    "moment_2": partial(_moment, 2),
    "moment_3": partial(_moment, 3),
    "moment_4": partial(_moment, 4),
    # W_2 >= Gelbrich's distance; W_2^2 <= D W_1 for points at most D apart, as E||X - Y||^2 <= D E||X - Y||.
    "gelbrich": _gelbrich,
}

UPPER: dict[str, Bound] = {
    # The cost of one coupling: row i goes to row i.
    "coupled": _coupled,
    # The same: the r-th quantile of x along the difference of the means goes to the r-th quantile of y along it.
    "matched": _matched,
    # From x to its mean, on to the mean of y, and out to y.
    "triangle": lambda s: s.mean_radii(s.p) + s.gap,
    # The triangle with E||X - EX|| <= sqrt(tr Cov X): what a normalizer that fixes two moments controls.
    "moment": lambda s: s.mean_radii(2) + s.gap if s.p <= 2 else None,
}


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
        bounds = self.lower_bounds | self.upper_bounds
        if name not in bounds:
            raise KeyError(unknown_name("bound", name, bounds))
        return bounds[name]


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

    Lower bounds are ``mean``, ``marginal``, ``marginal_sum``, ``marginal_max``, ``rotated``, ``sliced``,
    ``max_sliced``, ``radial``, ``moment_2``, ``moment_3``, ``moment_4`` (:func:`moment_lower_bound`) and ``gelbrich``;
    upper bounds ``coupled``, ``matched``, ``triangle`` and ``moment``. docs/shift.md has the formula of each; the
    tables in this module have the reason why it is a bound.

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
    known = [*LOWER, *UPPER]
    wanted = set(known if include is None else [include] if isinstance(include, str) else include)
    for name in wanted.difference(known):
        raise ValueError(unknown_name("bound", name, known))
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        scaled, factor = _centred(pair)
        statistics = PairStatistics(scaled, p, projections, seed)
        low, high = (
            {n: value for n, bound in table.items() if n in wanted and (value := bound(statistics)) is not None}
            for table in (LOWER, UPPER)
        )
        error, radius = statistics.rounding, statistics.radius
    plain = len(pair.x) == len(pair.y) and pair.x_mass is None and pair.y_mass is None
    # A distance that a caller rounds to the dtype of the points must still lie inside.
    info = torch.finfo(pair.x.dtype)
    rounding, tiny = 2 * info.eps, info.tiny * info.eps

    def outwards(values: dict[str, float], sign: int, in_power: bool) -> dict[str, float]:
        moved = {name: _moved(value, p, sign, error, radius, in_power) for name, value in values.items()}
        return {name: max(0.0, value * factor * (1 + sign * rounding) + sign * tiny) for name, value in moved.items()}

    lower, upper = outwards(low, -1, not plain), outwards(high, 1, True)
    best = max(lower.values(), default=0.0), min(upper.values(), default=math.inf)
    return ShiftBounds(*best, lower, upper, p=p, slack=error * radius * factor)


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
