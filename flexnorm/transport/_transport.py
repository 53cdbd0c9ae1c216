"""Exact optimal transport between two clouds: an assignment for n and n equally heavy points, else a linear program."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flexnorm._messages import optional
from flexnorm.transport._assignment import assignment
from flexnorm.transport._numerics import power_mean, power_of_two, safe_norm
from flexnorm.transport._samples import Pair, check_finite

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def exact_wasserstein(samples: Pair, p: float, max_iterations: int | None) -> Tensor:
    """W_p between two clouds; the plan is found in float64 on the CPU, its cost is differentiable in the points.

    By the envelope theorem the gradient of the optimal cost is that of the cost of the optimal plan held fixed.

    Args:
        samples: (..., n, d) and (..., m, d).
        p: Order, at least 1.
        max_iterations: Limit of the network simplex, ``None`` for one that grows with the problem.

    Returns:
        (...) in the dtype and on the device of the samples.
    """
    check_finite(samples)
    if max_iterations is not None and (isinstance(max_iterations, bool) or max_iterations < 1):
        raise ValueError(f"max_iterations must be at least 1, or None for a limit by size, got {max_iterations!r}")
    if samples.x.numel() == 0:
        return samples.x.sum((-2, -1))
    factor = power_of_two(samples.x, samples.y)
    x, y = (sample.to("cpu", torch.float64).div(factor).flatten(0, -3) for sample in _with_batch(samples))
    n, m = x.shape[-2], y.shape[-2]
    masses = [
        None if mass is None else mass.detach().cpu().reshape(x.shape[0], -1)
        for mass in (samples.x_mass, samples.y_mass)
    ]
    values = []
    for k in range(x.shape[0]):
        a, b = (None if mass is None else mass[k] for mass in masses)
        cost = torch.cdist(x[k].detach(), y[k].detach(), compute_mode="donot_use_mm_for_euclid_dist")
        cost = (cost / cost.max().clamp_min(torch.finfo(torch.float64).tiny)) ** p
        if n == m and a is None and b is None:
            i, j, mass = torch.arange(n), torch.as_tensor(assignment(cost.numpy())), None
        else:
            i, j, mass = _network_simplex(cost.numpy(), _or_uniform(a, n), _or_uniform(b, m), max_iterations)
        values.append(power_mean(safe_norm(x[k, i] - y[k, j]), p, mass))
    result = torch.stack(values).mul(factor).reshape(samples.x.shape[:-2])
    return result.to(samples.x.device, samples.x.dtype)


def _with_batch(samples: Pair) -> tuple[Tensor, Tensor]:
    if samples.x.ndim == 2:
        return samples.x.unsqueeze(0), samples.y.unsqueeze(0)
    return samples.x, samples.y


def _or_uniform(mass: Tensor | None, n: int) -> Tensor:
    return torch.full((n,), 1 / n, dtype=torch.float64) if mass is None else mass


def _network_simplex(
    cost: NDArray[np.float64], a: Tensor, b: Tensor, max_iterations: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    ot = optional("ot", "an exact distance between weighted or unequally many points", "lab")
    # Points without mass take no part, and the solver is happier without them.
    rows, columns = torch.nonzero(a).squeeze(1), torch.nonzero(b).squeeze(1)
    if len(rows) == 1 or len(columns) == 1:
        # A single point leaves only one coupling.
        i, j = (rows.expand(len(columns)), columns) if len(rows) == 1 else (rows, columns.expand(len(rows)))
        return i, j, b[columns] if len(rows) == 1 else a[rows]
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
