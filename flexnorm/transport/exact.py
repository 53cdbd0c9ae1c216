"""Exact optimal transport between two clouds: an assignment for n and n equally heavy points, else a linear program."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flexnorm._messages import optional
from flexnorm.transport.pair import Pair, power_mean, power_of_two, safe_norm

if TYPE_CHECKING:
    from numpy.typing import NDArray


def exact_wasserstein(pair: Pair, p: float, max_iterations: int | None) -> Tensor:
    """W_p between two clouds; the plan is found in float64 on the CPU, its cost is differentiable in the points.

    By the envelope theorem the gradient of the optimal cost is that of the cost of the optimal plan held fixed.
    """
    pair.check_finite()
    if max_iterations is not None and (isinstance(max_iterations, bool) or max_iterations < 1):
        raise ValueError(f"max_iterations must be at least 1, or None for a limit by size, got {max_iterations!r}")
    if pair.x.numel() == 0:
        return pair.x.sum((-2, -1))
    factor = power_of_two(pair.x, pair.y)
    lead, n, m = pair.x.shape[:-2], pair.x.shape[-2], pair.y.shape[-2]
    x, y = (s.to("cpu", torch.float64).div(factor).reshape(-1, *s.shape[-2:]) for s in pair[:2])
    a, b = (None if mass is None else mass.detach().cpu().reshape(len(x), -1) for mass in pair[2:])
    values = []
    for k in range(len(x)):
        cost = torch.cdist(x[k].detach(), y[k].detach(), compute_mode="donot_use_mm_for_euclid_dist")
        cost = (cost / cost.max().clamp_min(torch.finfo(torch.float64).tiny)) ** p
        if n == m and a is None and b is None:
            i, j, mass = torch.arange(n), torch.as_tensor(assignment(cost.numpy())), None
        else:
            heavy = (
                torch.full((size,), 1 / size, dtype=torch.float64) if mass is None else mass[k]
                for mass, size in ((a, n), (b, m))
            )
            i, j, mass = _network_simplex(cost.numpy(), next(heavy), next(heavy), max_iterations)
        values.append(power_mean(safe_norm(x[k, i] - y[k, j]), p, mass))
    return torch.stack(values).mul(factor).reshape(lead).to(pair.x.device, pair.x.dtype)


def assignment(cost: NDArray[np.float64]) -> NDArray[np.intp]:
    """The column of every row in the assignment of least total cost, for a square and finite cost matrix (n, n)."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError:
        return augmenting_paths(cost)
    columns: NDArray[np.intp] = linear_sum_assignment(cost)[1]
    return columns


def augmenting_paths(cost: NDArray[np.float64]) -> NDArray[np.intp]:
    """Shortest augmenting paths (Crouse 2016, IEEE Trans. Aerospace and Electronic Systems 52(4)), O(n^3).

    A monitor measures exact distances of 128 points by default, and must do so where only torch and NumPy are
    installed: there a distance takes some 10 ms instead of 1.
    """
    n = len(cost)
    row_price, column_price = np.zeros(n), np.zeros(n)
    column_of, row_of = np.full(n, -1), np.full(n, -1)
    for start in range(n):
        distance, parent, done = np.full(n, np.inf), np.full(n, -1), np.zeros(n, dtype=bool)
        row, reached, rows = start, 0.0, []
        while True:
            rows.append(row)
            through = reached + cost[row] - row_price[row] - column_price
            shorter = ~done & (through < distance)
            distance[shorter], parent[shorter] = through[shorter], row
            column = int(np.where(done, np.inf, distance).argmin())
            reached, done[column] = distance[column], True
            if row_of[column] < 0:
                break
            row = int(row_of[column])
        row_price[start] += reached
        others = rows[1:]
        row_price[others] += reached - distance[column_of[others]]
        column_price[done] -= reached - distance[done]
        while True:
            row = int(parent[column])
            row_of[column] = row
            column_of[row], column = column, int(column_of[row])
            if row == start:
                break
    return column_of


def _network_simplex(
    cost: NDArray[np.float64], a: Tensor, b: Tensor, max_iterations: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    # Points without mass take no part, and the solver is happier without them.
    rows, columns = torch.nonzero(a).squeeze(1), torch.nonzero(b).squeeze(1)
    if len(rows) == 1 or len(columns) == 1:
        # A single point leaves only one coupling.
        i, j = (rows.expand(len(columns)), columns) if len(rows) == 1 else (rows, columns.expand(len(rows)))
        return i, j, b[columns] if len(rows) == 1 else a[rows]
    ot = optional("ot", "an exact distance between weighted or unequally many points", "lab")
    limit = max_iterations if max_iterations is not None else max(1_000_000, 50 * len(rows) * len(columns))
    sub = cost[rows.numpy()][:, columns.numpy()]
    with warnings.catch_warnings():
        # Failure is reported below, as an error.
        warnings.simplefilter("ignore")
        plan, log = ot.emd(a[rows].numpy(), b[columns].numpy(), sub, numItermax=limit, log=True)
    if log["warning"] is not None:
        raise RuntimeError(
            f"exact transport between {len(rows)} and {len(columns)} points failed after at most {limit} iterations: "
            f"{log['warning']}; raise max_iterations or use fewer points"
        )
    flow = torch.as_tensor(plan)
    i, j = torch.nonzero(flow, as_tuple=True)
    mass = flow[i, j]
    return rows[i], columns[j], mass / mass.sum()
