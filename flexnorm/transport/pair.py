"""Pairs of sets of points in common form, their checks, the numeric guards, and optimal transport on the line.

On the line the monotone coupling is optimal for every convex cost, so

    W_p^p = integral over q in (0, 1) of |F_x^-1(q) - F_y^-1(q)|^p,

a finite sum over the merged jumps of the two quantile functions. With n = m and equal weights the jumps coincide and
only two sorts remain.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

Weights = tuple[Tensor | None, Tensor | None]


class Pair(NamedTuple):
    """Two sets of points in common form: the same leading axes, dtype and device.

    Attributes:
        x: First, (..., n, d).
        y: Second, (..., m, d).
        x_mass: (..., n) weights in float64 that sum to 1, or ``None`` for equal weights.
        y_mass: (..., m) likewise.
    """

    x: Tensor
    y: Tensor
    x_mass: Tensor | None
    y_mass: Tensor | None

    @classmethod
    def of(cls, x: Tensor, y: Tensor, weights: Weights | None = None) -> Pair:
        """Bring two sets of points to common form: leading axes broadcast, float32 at least, weights that sum to 1.

        Raises:
            TypeError: An argument is not a tensor, or is not of a real floating-point type, or weights are not a pair.
            ValueError: The shapes do not fit together, one is empty, the devices differ or hold no numbers, or
                weights are negative, not finite or sum to 0.
        """
        check_points("x", x)
        check_points("y", y)
        if x.device != y.device:
            raise ValueError(f"x and y must be on one device, got {x.device} and {y.device}")
        if x.device.type == "meta":
            raise ValueError("x and y are on the device meta, which holds no numbers; make them on a real device")
        x, y = (points.unsqueeze(-1) if points.ndim == 1 else points for points in (x, y))
        shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
        if x.ndim < 2 or y.ndim < 2 or x.shape[-1] != y.shape[-1]:
            raise ValueError(f"x and y must be (..., n, d) and (..., m, d) with one d, got {shapes}")
        if 0 in x.shape[-2:] or 0 in y.shape[-2:]:
            raise ValueError(f"each side needs at least one point and one axis, got {shapes}")
        dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        try:
            lead = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise ValueError(f"leading axes do not broadcast: {shapes}") from error
        x, y = (points.to(dtype).expand(*lead, *points.shape[-2:]) for points in (x, y))
        if weights is not None and not (isinstance(weights, (tuple, list)) and len(weights) == 2):
            raise TypeError("weights must be a pair (weights of x, weights of y), either of which may be None")
        x_mass, y_mass = weights or (None, None)
        return cls(x, y, _mass("x", x_mass, x), _mass("y", y_mass, y))

    def check_finite(self) -> None:
        """Refuse NaN and infinity, for which no coupling has a finite cost (ValueError)."""
        for name, points in (("x", self.x), ("y", self.y)):
            if bad := int((~torch.isfinite(points)).sum()):
                raise ValueError(f"{name} holds {bad} values that are NaN or infinite; their distance is not defined")


def _mass(name: str, mass: Tensor | None, points: Tensor) -> Tensor | None:
    if mass is None:
        return None
    if not isinstance(mass, Tensor):
        raise TypeError(f"the weights of {name} must be a tensor or None, got {type(mass).__name__}")
    if mass.ndim < 1 or mass.shape[-1] != points.shape[-2]:
        raise ValueError(f"{name} has {points.shape[-2]} points but weights of shape {tuple(mass.shape)}")
    if mass.device.type == "meta":
        raise ValueError(f"the weights of {name} are on the device meta, which holds no numbers")
    mass = mass.to(device=points.device, dtype=torch.float64)
    total = mass.sum(-1, keepdim=True)
    if not bool(torch.isfinite(mass).all()) or bool((mass < 0).any()) or bool((total <= 0).any()):
        raise ValueError(f"the weights of {name} must be finite, not negative, and sum to more than 0")
    return (mass / total).expand(*points.shape[:-1])


def check_points(name: str, points: object) -> None:
    """Refuse what is not a tensor (TypeError) of a real floating-point type (TypeError too)."""
    if not isinstance(points, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(points).__name__}; torch.as_tensor makes one")
    if not points.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {points.dtype}; convert it with {name}.float()")


def check_order(p: float) -> float:
    """The order p of a distance as a float; TypeError for what is no number, ValueError below 1 and for infinity."""
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"the order p must be a number, got {p!r}")
    if not (math.isfinite(p) and p >= 1):
        raise ValueError(f"the order p must be finite and at least 1, got {p!r}")
    return float(p)


def safe_norm(values: Tensor) -> Tensor:
    """Euclidean norm of ``values`` over the last axis that neither over- nor underflows and has gradient 0 at 0.

    ``sqrt(sum(v ** 2))`` of float32 values beyond 1e19 is infinite and below 1e-23 it is zero; dividing by the largest
    entry first keeps every square in range.
    """
    safe = _scale(values.detach().abs())
    norm: Tensor = torch.linalg.vector_norm(values / safe, dim=-1) * safe.squeeze(-1)
    return norm


def power_mean(values: Tensor, p: float, mass: Tensor | None = None) -> Tensor:
    r"""$(\sum_i w_i |v_i|^p)^{1/p}$ over the last axis, without overflow and with gradient 0 (not NaN) where it is 0.

    The derivative of ``t ** (1 / p)`` at 0 is infinite, and infinity times the zero inside is NaN: that would poison
    the gradient of a distance between equal points, which is the value such a loss converges to. The weights sum to 1.
    """

    def average(powers: Tensor) -> Tensor:
        return powers.mean(-1) if mass is None else (powers * mass.to(powers.dtype)).sum(-1)

    size = values.abs()
    if p == 1:
        return average(size)
    safe = _scale(size.detach())
    ratio = size / safe
    mean = average(ratio.square() if p == 2 else ratio.pow(p))
    zero = mean == 0
    root = torch.where(zero, torch.ones_like(mean), mean).pow(1 / p)
    return torch.where(zero, mean, root * safe.squeeze(-1))


def power_of_two(*tensors: Tensor) -> float:
    """The power of two next to the largest absolute entry: dividing by it is exact and brings every entry into [-1, 1].

    Squares and powers of float64 entries near 1e200 would overflow; after this division they cannot. The exponent is
    clamped to +-1000 so that neither the factor nor its inverse leaves the range of float64.
    """
    largest = max(float(values.detach().abs().max()) for values in tensors)
    if largest == 0 or not math.isfinite(largest):
        return 1.0
    return math.ldexp(1.0, max(-1000, min(1000, math.frexp(largest)[1])))


def _scale(size: Tensor) -> Tensor:
    """The largest entry of the last axis, or 1 where that is no number to divide by."""
    scale = size.amax(-1, keepdim=True)
    return torch.where((scale > 0) & torch.isfinite(scale), scale, torch.ones_like(scale))


def along_lines(pair: Pair, x: Tensor, y: Tensor, p: float) -> Tensor:
    """W_p between images (..., k, n) and (..., k, m) of a pair of sets of points, with their weights: (..., k)."""
    x_mass, y_mass = (None if mass is None else mass.unsqueeze(-2) for mass in pair[2:])
    if x_mass is None and y_mass is None:
        x, y = sort_rows(x), sort_rows(y)
        if x.shape[-1] == y.shape[-1]:
            return power_mean(x - y, p)
        i, j, mass = uniform_matching(x.shape[-1], y.shape[-1], x.device)
        return power_mean(x[..., i] - y[..., j], p, mass)
    i, j, mass = quantile_matching(x, y, x_mass, y_mass)
    return power_mean(x.gather(-1, i) - y.gather(-1, j), p, mass)


def sort_rows(values: Tensor) -> Tensor:
    """Sort along the last axis.

    NumPy sorts values alone with vector instructions, about 20 times faster than ``torch.sort``, which computes the
    permutation as well; the permutation is needed only where a gradient flows.
    """
    rows = values.contiguous()
    plain = (
        rows.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )
    if not plain or (rows.requires_grad and torch.is_grad_enabled()):
        return rows.sort(-1).values
    rows = rows.detach()
    if rows.data_ptr() == values.data_ptr():
        rows = rows.clone()
    rows.numpy().sort(axis=-1)
    return rows


def uniform_matching(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The monotone coupling of n and m equally heavy sorted points, as :func:`quantile_matching` returns it.

    Worked in integers (mass in units of 1 / (n m)), hence exact, and the same for every row.
    """
    ends_x = torch.arange(1, n + 1, device=device) * m
    ends_y = torch.arange(1, m + 1, device=device) * n
    levels = torch.cat((ends_x, ends_y)).sort().values
    mass = levels.diff(prepend=levels.new_zeros(1))
    levels, mass = levels[mass > 0], mass[mass > 0]
    return torch.searchsorted(ends_x, levels), torch.searchsorted(ends_y, levels), mass.double() / (n * m)


def quantile_matching(
    x: Tensor, y: Tensor, x_mass: Tensor | None, y_mass: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The monotone coupling of weighted points (..., n) and (..., m) in any order, row by row.

    Returns (..., n + m) indices into x, the same into y, and the mass of each pair in float64.
    """
    order_x, ends_x = _cumulative(x, x_mass)
    order_y, ends_y = _cumulative(y, y_mass)
    levels = torch.cat((ends_x, ends_y), -1).sort(-1).values
    mass = levels.diff(dim=-1, prepend=torch.zeros_like(levels[..., :1]))
    # Rounding may leave a last level beyond one of the two totals: its sliver of mass belongs to the last point.
    i = torch.searchsorted(ends_x.detach().contiguous(), levels.detach()).clamp_(max=x.shape[-1] - 1)
    j = torch.searchsorted(ends_y.detach().contiguous(), levels.detach()).clamp_(max=y.shape[-1] - 1)
    return order_x.gather(-1, i), order_y.gather(-1, j), mass


def _cumulative(values: Tensor, mass: Tensor | None) -> tuple[Tensor, Tensor]:
    order = values.detach().argsort(-1)
    if mass is None:
        ends = torch.arange(1, values.shape[-1] + 1, device=values.device, dtype=torch.float64) / values.shape[-1]
        return order, ends.expand(values.shape)
    total = mass.expand(values.shape).gather(-1, order).cumsum(-1)
    return order, total / total[..., -1:]
