r"""Wasserstein distances between two sets of points.

$W_p(P, Q) = \inf_{\pi} (E_\pi \|X - Y\|^p)^{1/p}$ over all couplings $\pi$ of P and Q. With p = 1 this is the
Earth-Mover distance by which Huang & Yu (CVPR 2020, arXiv 2001.02814) define internal covariate shift.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from flexnorm._messages import unknown_name
from flexnorm.transport.exact import exact_wasserstein
from flexnorm.transport.line import along_lines
from flexnorm.transport.pair import Pair, Weights, check_order, power_mean, safe_norm

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
