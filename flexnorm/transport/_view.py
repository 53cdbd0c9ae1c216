"""What several bounds share about a pair of samples, computed once: means, radii, distances of the coordinates."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from flexnorm.transport._line import line_wasserstein
from flexnorm.transport._numerics import safe_norm
from flexnorm.transport._samples import Pair
from flexnorm.transport.distances import directions


class View:
    """A pair of float64 samples and quantities derived from it on demand.

    Args:
        samples: (n, d) and (m, d), float64, on the CPU.
        p: Order of the distance that is bounded.
        projections: How many random directions to look along.
        seed: Seed of those directions.
    """

    def __init__(self, samples: Pair, p: float, projections: int, seed: int) -> None:
        self.samples = samples
        self.p = p
        self.projections = projections
        self.seed = seed

    @property
    def d(self) -> int:
        """Dimension of the points."""
        return self.samples.x.shape[-1]

    @property
    def masses(self) -> tuple[Tensor | None, Tensor | None]:
        """Weights of both samples."""
        return self.samples.x_mass, self.samples.y_mass

    def average(self, first: bool, values: Tensor) -> Tensor:
        """Weighted mean over the points of one sample, along axis 0."""
        mass = self.samples.x_mass if first else self.samples.y_mass
        return values.mean(0) if mass is None else torch.tensordot(mass, values, dims=([0], [0]))

    def lines(self, x: Tensor, y: Tensor) -> Tensor:
        """W_p between rows: x (k, n), y (k, m) -> (k,)."""
        return line_wasserstein(x, y, self.p, *self.masses)

    @cached_property
    def means(self) -> tuple[Tensor, Tensor]:
        """(d,) means of both samples."""
        return self.average(True, self.samples.x), self.average(False, self.samples.y)

    @cached_property
    def gap(self) -> float:
        """Distance of the means."""
        return float(safe_norm(self.means[0] - self.means[1]))

    @cached_property
    def radii(self) -> tuple[Tensor, Tensor]:
        """(n,) and (m,) distances of the points to the mean of their own sample."""
        return safe_norm(self.samples.x - self.means[0]), safe_norm(self.samples.y - self.means[1])

    @cached_property
    def marginals(self) -> Tensor:
        """(d,) distances W_p of the coordinates."""
        return self.lines(self.samples.x.mT, self.samples.y.mT)

    @cached_property
    def slices(self) -> Tensor:
        """(k + 1,) distances W_p along k random directions and, last, along the difference of the means."""
        rows = directions(self.samples, self.projections, self.seed, mean_difference=True).mT
        return self.lines(rows @ self.samples.x.mT, rows @ self.samples.y.mT)

    @cached_property
    def radius(self) -> float:
        """Largest distance of a point from the origin."""
        return max(float(safe_norm(sample).max()) for sample in self.samples[:2])

    @cached_property
    def rounding(self) -> float:
        """A bound on the rounding error of every bound, and of the exact distance, relative to ``radius``.

        Sums of n terms err by at most n roundings of the mean size of a term, an inner product of length d by d
        roundings, a combination over d coordinates by another factor sqrt(d), the dual variables of the assignment by n
        roundings of the largest cost. The constant 8 covers a few such steps in a row.
        """
        n, m = self.samples.x.shape[0], self.samples.y.shape[0]
        return 8 * (n + m + self.d * math.sqrt(self.d) + 8) * torch.finfo(torch.float64).eps
