r"""Wasserstein distances between two sets of points.

$W_p(P, Q) = \inf_{\pi} (E_\pi \|X - Y\|^p)^{1/p}$ over all couplings $\pi$ of P and Q. With p = 1 this is the
Earth-Mover distance by which Huang & Yu (CVPR 2020, arXiv 2001.02814) define internal covariate shift.
"""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from flexnorm._messages import optional, unknown_name
from flexnorm.transport.pair import (
    Pair,
    Weights,
    along_lines,
    check_order,
    check_points,
    power_mean,
    power_of_two,
    safe_norm,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

Method = Literal["marginal", "sliced", "max_sliced", "exact", "coupled"]


def wasserstein(
    x: Tensor,
    y: Tensor,
    method: Method = "marginal",
    p: float = 1,
    *,
    weights: Weights | None = None,
    projections: int | Tensor = 64,
    seed: int = 0,
    max_iterations: int | None = None,
) -> Tensor:
    r"""Wasserstein distance of order p between two sets of points, several ways.

    * ``marginal``, (..., d): $W_p$ of each coordinate by itself, exact; ``.norm(dim=-1)`` of it is a lower bound of
      ``exact`` for p up to 2.
    * ``sliced``, (...): $(\frac1k \sum_u W_p^p(u^\top x, u^\top y))^{1/p}$ over k unit directions u; a lower bound of
      ``exact``.
    * ``max_sliced``, (...): $\max_u W_p(u^\top x, u^\top y)$ over the same directions; a lower bound of ``exact``.
    * ``exact``, (...): $W_p$ of the two empirical distributions in $R^d$: $O(n^3)$, meant for n up to a few hundred.
    * ``coupled``, (...): $(\frac1n \sum_i \|x_i - y_i\|^p)^{1/p}$ (n = m): an upper bound of ``exact``, close when row
      i of both comes from the same input.

    All values are distances, in the units of x: the p-th root is taken (``ot.wasserstein_1d`` returns the p-th power).
    float16 and bfloat16 points are computed, and returned, in float32.

    Gradients flow to both sides, and for ``marginal``, ``sliced``, ``max_sliced`` and ``coupled`` to the weights as
    well; where a distance is 0 the gradient is 0. Directions and the transport plan are held fixed, which is exact
    almost everywhere.

    Args:
        x: (..., n, d) points, or (n,) for points on the line.
        y: (..., m, d) points; the leading axes broadcast against those of x.
        method: One of the list above.
        p: Order of the distance, at least 1.
        weights: Pair of (..., n) and (..., m) non-negative weights, each normalized to sum 1; ``None`` (for both or for
            one) means equal weights. ``coupled`` needs the same weights on both sides and takes those that are given.
        projections: For the sliced methods: how many random directions, or a (d, k) tensor whose columns are the
            directions (they are normalized). With a number, ``max_sliced`` looks along the difference of the means as
            well.
        seed: Seed of the random directions; the same seed and d give the same directions on every device.
        max_iterations: For ``exact`` with n != m or with weights: iteration limit of the network simplex; ``None`` for
            a limit that grows with the problem.

    Returns:
        The distance, shaped as the list says.

    Raises:
        TypeError: x or y is not a floating-point tensor, or p or the weights are of the wrong kind.
        ValueError: Unknown method, shapes that do not fit, points on two devices or on ``meta``, n != m for
            ``coupled``, p < 1, bad weights, or NaN or infinity for ``exact`` (the other methods pass NaN on).
        RuntimeError: The transport solver gave up.

    Examples:
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> wasserstein(x, x + torch.tensor([3.0, 4.0]), "exact")
        tensor(5.)
        >>> wasserstein(x, x + torch.tensor([3.0, 4.0]), "marginal")
        tensor([3., 4.])
    """
    p = check_order(p)
    pair = Pair.of(x, y, weights)
    # Inside autocast the projections would be rounded to half precision.
    with torch.autocast(pair.x.device.type, enabled=False):
        if method == "marginal":
            # Sorting a transposed contiguous copy is faster than sorting along a strided axis.
            return along_lines(pair, pair.x.mT, pair.y.mT, p)
        if method == "sliced":
            return power_mean(_along(pair, directions(pair, projections, seed), p), p)
        if method == "max_sliced":
            return _along(pair, directions(pair, projections, seed, mean_difference=True), p).amax(-1)
        if method == "exact":
            return exact_wasserstein(pair, p, max_iterations)
        if method == "coupled":
            return _coupled(pair, p)
    raise ValueError(unknown_name("method", method, get_args(Method)))


def directions(pair: Pair, projections: int | Tensor, seed: int, mean_difference: bool = False) -> Tensor:
    """Unit directions as columns, (..., d, k) in the dtype of the points: those given, or so many random ones.

    With ``mean_difference`` that of the difference of the means is appended to random directions.
    """
    x = pair.x
    d = x.shape[-1]
    if isinstance(projections, Tensor):
        if projections.ndim != 2 or projections.shape[0] != d or projections.shape[1] == 0:
            raise ValueError(f"projections must be (d, k) with d = {d} and k >= 1, got {tuple(projections.shape)}")
        return _unit_columns(projections.to(x.device, x.dtype))
    if isinstance(projections, bool) or not isinstance(projections, int) or projections < 1:
        raise ValueError(f"projections must be a positive number or a (d, k) tensor, got {projections!r}")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(projections, d, generator=generator, dtype=torch.float64).mT
    columns = _unit_columns(drawn.to(x.device, x.dtype))
    if not mean_difference:
        return columns
    gap = _mean(x.detach(), pair.x_mass) - _mean(pair.y.detach(), pair.y_mass)
    return torch.cat((columns.expand(*gap.shape[:-1], d, projections), _unit_columns(gap.unsqueeze(-1))), -1)


def _along(pair: Pair, columns: Tensor, p: float) -> Tensor:
    rows = columns.mT
    # A common move changes no distance; without it the rounding of a projection grows with the mean of the points.
    centre = _mean(pair.x.detach(), pair.x_mass).unsqueeze(-2)
    return along_lines(pair, rows @ (pair.x - centre).mT, rows @ (pair.y - centre).mT, p)


def _coupled(pair: Pair, p: float) -> Tensor:
    x, y, a, b = pair
    if x.shape[-2] != y.shape[-2]:
        raise ValueError(f"coupled needs the same points on both sides, got {x.shape[-2]} and {y.shape[-2]} points")
    if a is not None and b is not None and not torch.equal(a, b):
        raise ValueError("coupled needs the same weights on both sides")
    return power_mean(safe_norm(x - y), p, b if a is None else a)


def _mean(points: Tensor, mass: Tensor | None) -> Tensor:
    return points.mean(-2) if mass is None else (points * mass.detach().to(points.dtype).unsqueeze(-1)).sum(-2)


def _unit_columns(columns: Tensor) -> Tensor:
    length = safe_norm(columns.mT).unsqueeze(-2)
    return columns / torch.where(length > 0, length, torch.ones_like(length))


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
            equal = (torch.full((size,), 1 / size, dtype=torch.float64) for size in (n, m))
            heavy = [even if mass is None else mass[k] for mass, even in zip((a, b), equal, strict=True)]
            i, j, mass = _network_simplex(cost.numpy(), heavy[0], heavy[1], max_iterations)
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


def gaussian_wasserstein(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor) -> Tensor:
    r"""$W_2^2=\|m_1-m_2\|^2+\mathrm{tr}(C_1+C_2-2 (C_1^{1/2} C_2 C_1^{1/2})^{1/2})$ of two Gaussians, by its root W_2.

    Gelbrich (1990): for any two distributions with these moments the same expression is a lower bound of W_2^2.
    Computed in float64 (float32 on devices without it) and returned in the dtype of the arguments: the traces cancel
    where the two are close, and the root magnifies what is left. The trace of the square root is the sum of the
    singular values of $L_1^\top L_2$ with $C = L L^\top$: no square root of a matrix, and gradients that stay finite
    where eigenvalues coincide.

    Args:
        mean_x: (..., d).
        cov_x: (..., d, d) covariance, or (..., d) variances of independent coordinates.
        mean_y: (..., d).
        cov_y: Like ``cov_x``.

    Returns:
        (...).

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: Shapes or devices that do not fit, NaN or infinity, or a covariance that is not symmetric positive
            semi-definite.

    Examples:
        >>> zero = torch.zeros(2)
        >>> gaussian_wasserstein(zero, torch.eye(2), zero + 3, torch.eye(2))
        tensor(4.2426)
    """
    named = {"mean_x": mean_x, "cov_x": cov_x, "mean_y": mean_y, "cov_y": cov_y}
    for name, value in named.items():
        check_points(name, value)
    if len({value.device for value in named.values()}) > 1 or mean_x.device.type == "meta":
        where = ", ".join(f"{name} on {value.device}" for name, value in named.items())
        raise ValueError(f"means and covariances must be on one device that holds numbers, got {where}")
    for name, value in named.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} holds NaN or infinity")
    d = mean_x.shape[-1:]
    if mean_x.ndim < 1 or mean_y.shape[-1:] != d:
        raise ValueError(f"the means must have one length, got {tuple(mean_x.shape)} and {tuple(mean_y.shape)}")
    dtype = functools.reduce(torch.promote_types, (value.dtype for value in named.values()), torch.float32)
    wide = torch.float32 if mean_x.device.type == "mps" else torch.float64
    with torch.autocast(mean_x.device.type, enabled=False):
        mean_x, cov_x, mean_y, cov_y = (value.to(wide) for value in named.values())
        if cov_x.ndim == mean_x.ndim and cov_y.ndim == mean_y.ndim and cov_x.shape[-1:] == cov_y.shape[-1:] == d:
            if bool((cov_x < 0).any()) or bool((cov_y < 0).any()):
                raise ValueError("variances must not be negative")
            bures = (_root(cov_x) - _root(cov_y)).square().sum(-1)
        elif cov_x.shape[-2:] == cov_y.shape[-2:] == (*d, *d):
            cross = torch.linalg.svdvals(_factor(cov_x).mT @ _factor(cov_y)).sum(-1)
            traces = cov_x.diagonal(dim1=-2, dim2=-1).sum(-1) + cov_y.diagonal(dim1=-2, dim2=-1).sum(-1)
            bures = (traces - 2 * cross).clamp_min(0)
        else:
            raise ValueError(
                f"covariances must both be (..., {d[0]}, {d[0]}) or both (..., {d[0]}), "
                f"got {tuple(cov_x.shape)} and {tuple(cov_y.shape)}"
            )
        return _root(safe_norm(mean_x - mean_y).square() + bures).to(dtype)


def _root(values: Tensor) -> Tensor:
    # The slope of the root at 0 is infinite; 0 times it would be NaN.
    zero = values == 0
    root: Tensor = torch.where(zero, values, torch.where(zero, torch.ones_like(values), values).sqrt())
    return root


def _factor(covariance: Tensor) -> Tensor:
    """L with L L^T = C: Cholesky's where C is positive definite, else from its eigenvectors."""
    if not torch.allclose(covariance, covariance.mT, atol=1e-6 * float(covariance.detach().abs().max())):
        raise ValueError("a covariance is not symmetric")
    lower: Tensor
    lower, info = torch.linalg.cholesky_ex(covariance)
    if not bool(info.any()):
        return lower
    values, vectors = torch.linalg.eigh(covariance)
    if bool((values < -1e-5 * values.abs().amax(-1, keepdim=True)).any()):
        raise ValueError(
            f"a covariance is not positive semi-definite; its smallest eigenvalue is {float(values.min()):.3g}"
        )
    factor: Tensor = vectors * _root(values.clamp_min(0)).unsqueeze(-2)
    return factor
