"""Pairs of sets of points in common form, their checks, and the numeric guards, each with the reason why it exists."""

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
