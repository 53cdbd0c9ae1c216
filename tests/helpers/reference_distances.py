"""Slow, obvious versions of the distances, straight from the definitions in float64, for tests and readers."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def marginal(x: Tensor, y: Tensor, p: float = 1, x_mass: Tensor | None = None, y_mass: Tensor | None = None) -> Tensor:
    """W_p of each coordinate, (d,), by walking along both sorted lists and moving as much mass as fits."""
    a = torch.ones(len(x)) if x_mass is None else x_mass
    b = torch.ones(len(y)) if y_mass is None else y_mass
    return torch.tensor([_walk(u, v, p, a, b) for u, v in zip(x.T, y.T, strict=True)], dtype=torch.float64)


def sliced(x: Tensor, y: Tensor, directions: Tensor, p: float = 1) -> Tensor:
    """The mean of W_p^p over the columns of ``directions`` (d, k), to the power 1/p."""
    unit = directions.double() / directions.double().norm(dim=0)
    return marginal(x.double() @ unit, y.double() @ unit, p).pow(p).mean() ** (1 / p)


def exact(x: Tensor, y: Tensor, p: float = 1) -> Tensor:
    """W_p of equally many points by trying all assignments; for up to about 7 points."""
    cost = (x.double().unsqueeze(1) - y.double()).norm(dim=-1) ** p
    rows = torch.arange(len(x))
    best = min(float(cost[rows, list(order)].mean()) for order in itertools.permutations(range(len(y))))
    return torch.tensor(best ** (1 / p), dtype=torch.float64)


def _walk(u: Tensor, v: Tensor, p: float, a: Tensor, b: Tensor) -> float:
    left = sorted(zip(u.tolist(), (a.double() / a.double().sum()).tolist(), strict=True))
    right = sorted(zip(v.tolist(), (b.double() / b.double().sum()).tolist(), strict=True))
    total, i, j = 0.0, 0, 0
    have, want = left[0][1], right[0][1]
    while i < len(left) and j < len(right):
        mass = min(have, want)
        total += mass * abs(left[i][0] - right[j][0]) ** p
        have, want = have - mass, want - mass
        if have <= 0:
            i += 1
            have = left[i][1] if i < len(left) else 0.0
        if want <= 0:
            j += 1
            want = right[j][1] if j < len(right) else 0.0
    return float(total ** (1 / p))
