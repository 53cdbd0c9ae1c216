"""Checks and common form of a pair of samples: shapes, types, weights."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    """Two samples in common form: (..., n, d) and (..., m, d) with the same leading axes, dtype and device.

    Attributes:
        x: First sample, (..., n, d).
        y: Second sample, (..., m, d).
        x_mass: (..., n) weights in float64 that sum to 1, or ``None`` for equal weights.
        y_mass: (..., m) likewise.
    """

    x: Tensor
    y: Tensor
    x_mass: Tensor | None
    y_mass: Tensor | None


Weights = tuple[Tensor | None, Tensor | None]


def pair(x: Tensor, y: Tensor, weights: Weights | None = None) -> Pair:
    """Bring two samples to common form: leading axes broadcast, float32 at least, weights that sum to 1.

    Raises:
        TypeError: An argument is not a tensor, or is not of a real floating-point type, or weights are not a pair.
        ValueError: The shapes do not fit together, a sample is empty, the devices differ or hold no numbers, or weights
            are negative, not finite or sum to 0.
    """
    check_sample("x", x)
    check_sample("y", y)
    if x.device != y.device:
        raise ValueError(f"x and y must be on one device, got {x.device} and {y.device}")
    if x.device.type == "meta":
        raise ValueError("x and y are on the device meta, which holds no numbers; make them on a real device")
    x, y = (sample.unsqueeze(-1) if sample.ndim == 1 else sample for sample in (x, y))
    if x.ndim < 2 or y.ndim < 2 or x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"x and y must be (..., n, d) and (..., m, d) with one d, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if 0 in x.shape[-2:] or 0 in y.shape[-2:]:
        raise ValueError(
            f"each sample needs at least one point and one axis, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    try:
        lead = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ValueError(f"leading axes do not broadcast: {tuple(x.shape)} and {tuple(y.shape)}") from error
    x, y = (sample.to(dtype).expand(*lead, *sample.shape[-2:]) for sample in (x, y))
    if weights is not None and not (isinstance(weights, (tuple, list)) and len(weights) == 2):
        raise TypeError("weights must be a pair (weights of x, weights of y), either of which may be None")
    x_mass, y_mass = (None, None) if weights is None else weights
    return Pair(x, y, _mass("x", x_mass, x), _mass("y", y_mass, y))


def check_sample(name: str, sample: object) -> None:
    """Refuse what is not a tensor of a real floating-point type.

    Raises:
        TypeError: It is not.
    """
    if not isinstance(sample, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(sample).__name__}; torch.as_tensor makes one")
    if not sample.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {sample.dtype}; convert it with {name}.float()")


def check_order(p: float) -> float:
    """Return the order p of a distance as a float.

    Raises:
        TypeError: p is not a number.
        ValueError: p is below 1 or not finite.
    """
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"the order p must be a number, got {p!r}")
    if not (math.isfinite(p) and p >= 1):
        raise ValueError(f"the order p must be finite and at least 1, got {p!r}")
    return float(p)


def check_finite(samples: Pair) -> None:
    """Refuse NaN and infinity, for which no coupling has a finite cost.

    Raises:
        ValueError: A sample holds NaN or infinity.
    """
    for name, sample in (("x", samples.x), ("y", samples.y)):
        bad = int((~torch.isfinite(sample)).sum())
        if bad:
            raise ValueError(f"{name} holds {bad} values that are NaN or infinite; their distance is not defined")


def _mass(name: str, mass: Tensor | None, sample: Tensor) -> Tensor | None:
    if mass is None:
        return None
    if not isinstance(mass, Tensor):
        raise TypeError(f"the weights of {name} must be a tensor or None, got {type(mass).__name__}")
    if mass.ndim < 1 or mass.shape[-1] != sample.shape[-2]:
        raise ValueError(f"{name} has {sample.shape[-2]} points but weights of shape {tuple(mass.shape)}")
    if mass.device.type == "meta":
        raise ValueError(f"the weights of {name} are on the device meta, which holds no numbers")
    mass = mass.to(device=sample.device, dtype=torch.float64)
    total = mass.sum(-1, keepdim=True)
    if not bool(torch.isfinite(mass).all()) or bool((mass < 0).any()) or bool((total <= 0).any()):
        raise ValueError(f"the weights of {name} must be finite, not negative, and sum to more than 0")
    return (mass / total).expand(*sample.shape[:-1])
