"""Upper bounds of W_p: the cost of one particular coupling, or a triangle through the means."""

from __future__ import annotations

import torch

from flexnorm.transport._line import quantile_matching
from flexnorm.transport._lower import Bound
from flexnorm.transport._numerics import power_mean, safe_norm
from flexnorm.transport._view import View


def coupled(view: View) -> list[float]:
    """Row i goes to row i."""
    x, y, a, b = view.samples
    if len(x) != len(y) or (a is None) != (b is None) or (a is not None and b is not None and not torch.equal(a, b)):
        return []
    return [float(power_mean(safe_norm(x - y), view.p, a))]


def matched(view: View) -> list[float]:
    """The r-th quantile of x along the difference of the means goes to the r-th quantile of y along it."""
    x, y, a, b = view.samples
    direction = view.means[0] - view.means[1]
    if not bool(direction.any()):
        direction = torch.ones_like(direction)
    i, j, mass = quantile_matching(x @ direction, y @ direction, a, b)
    return [float(power_mean(safe_norm(x[i] - y[j]), view.p, mass))]


def triangle(view: View) -> list[float]:
    """From x to its mean, on to the mean of y, and out to y."""
    spread = (power_mean(radii, view.p, mass) for radii, mass in zip(view.radii, view.masses, strict=True))
    return [float(sum(spread)) + view.gap]


def moment(view: View) -> list[float]:
    """The triangle with E||X - EX|| <= sqrt(tr Cov X): what a normalizer that fixes two moments controls."""
    if view.p > 2:
        return []
    spread = (power_mean(radii, 2, mass) for radii, mass in zip(view.radii, view.masses, strict=True))
    return [float(sum(spread)) + view.gap]


UPPER: dict[str, Bound] = {"coupled": coupled, "matched": matched, "triangle": triangle, "moment": moment}
