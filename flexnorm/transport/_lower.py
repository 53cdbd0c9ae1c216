"""Lower bounds of W_p, each a pure function from a view of two samples to the named values that apply to it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flexnorm.transport._numerics import power_mean, safe_norm
from flexnorm.transport._view import View
from flexnorm.transport.gaussian import gelbrich
from flexnorm.transport.moments import truncated_moment

Bound = Callable[[View], list[float]]

LARGEST_BASIS = 512


def mean(view: View) -> list[float]:
    """The mean is 1-Lipschitz under every coupling: ||E(X - Y)|| <= E||X - Y||."""
    return [view.gap]


def marginal(view: View) -> list[float]:
    """E||X - Y|| >= ||(E|X_c - Y_c|)_c|| by Jensen (Minkowski for p > 1); each coordinate costs at least its W_p."""
    return [_combine(view.marginals, view.p)]


def marginal_sum(view: View) -> list[float]:
    """The 1-norm of a vector is at most sqrt(d) times its 2-norm."""
    return [float(view.marginals.sum()) / math.sqrt(view.d)] if view.p == 1 else []


def marginal_max(view: View) -> list[float]:
    """One coordinate is a 1-Lipschitz map."""
    return [float(view.marginals.max())]


def rotated(view: View) -> list[float]:
    """``marginal`` along the axes in which the samples differ: distances are the same in every orthonormal basis.

    A partial basis is enough, since leaving out a direction only lowers the sum.
    """
    x, y = view.samples[:2]
    paired = x.shape == y.shape
    if view.d == 1 or (min(len(x), view.d) if paired else view.d) > LARGEST_BASIS:
        return []
    if paired:
        basis = torch.linalg.svd(x - y, full_matrices=False).Vh
    else:
        # Without pairs, the change of the second moment about a common point tells where mass has moved.
        basis = torch.linalg.eigh(_second_moment(view, True) - _second_moment(view, False)).eigenvectors.mT
    return [_combine(view.lines(basis @ x.mT, basis @ y.mT), view.p)]


def sliced(view: View) -> list[float]:
    """Each projection is 1-Lipschitz, hence so is the mean over them."""
    along = view.slices[:-1]
    return [float(along.pow(view.p).mean() ** (1 / view.p))]


def max_sliced(view: View) -> list[float]:
    """The best of the projections."""
    return [float(view.slices.max())]


def radial(view: View) -> list[float]:
    """The distance to a fixed point is 1-Lipschitz."""
    centre = (view.means[0] + view.means[1]) / 2
    distances = (safe_norm(sample - centre).unsqueeze(0) for sample in view.samples[:2])
    return [float(view.lines(*distances))]


def moment(order: int) -> Bound:
    """The bound from truncated absolute moments of one order, truncated at the largest value and at its half."""

    def bound(view: View) -> list[float]:
        centre = (view.means[0] + view.means[1]) / 2
        x, y = ((sample - centre).abs() for sample in view.samples[:2])
        reach = torch.maximum(x.amax(0), y.amax(0))
        best = 0.0
        for limit in (reach, reach / 2):
            change = view.average(True, truncated_moment(x, order, limit)) - view.average(
                False, truncated_moment(y, order, limit)
            )
            best = max(best, float(safe_norm(change)))
        return [best]

    return bound


def gaussian(view: View) -> list[float]:
    """W_2 >= Gelbrich's distance; W_2^2 <= D W_1 for points at most D apart, as E||X - Y||^2 <= D E||X - Y||."""
    if view.p not in (1, 2):
        return []
    distance = gelbrich(view)
    if view.p == 2:
        return [distance]
    reach = float(view.radii[0].max() + view.radii[1].max()) + view.gap
    return [distance * (distance / reach) if reach > 0 else 0.0]


LOWER: dict[str, Bound] = {
    "mean": mean,
    "marginal": marginal,
    "marginal_sum": marginal_sum,
    "marginal_max": marginal_max,
    "rotated": rotated,
    "sliced": sliced,
    "max_sliced": max_sliced,
    "radial": radial,
    "moment_2": moment(2),
    "moment_3": moment(3),
    "moment_4": moment(4),
    "gelbrich": gaussian,
}


def _combine(parts: Tensor, p: float) -> float:
    # For p > 2 the 2-norm of the parts may exceed W_p; their p-norm does not, as ||v||_2 >= ||v||_p.
    return float(safe_norm(parts)) if p <= 2 else float(power_mean(parts, p)) * len(parts) ** (1 / p)


def _second_moment(view: View, first: bool) -> Tensor:
    sample = view.samples.x if first else view.samples.y
    mass = view.masses[0 if first else 1]
    moved = sample - view.means[0]
    return moved.mT @ (moved / len(moved) if mass is None else moved * mass.unsqueeze(-1))
