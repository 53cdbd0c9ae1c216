"""Numeric guards of the room, each with the reason why it exists. Callers carry no epsilons of their own."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def safe_norm(values: Tensor) -> Tensor:
    """Euclidean norm over the last axis that neither overflows nor underflows and has gradient 0 at 0.

    ``sqrt(sum(v ** 2))`` of float32 values beyond 1e19 is infinite and below 1e-23 it is zero; dividing by the largest
    entry first keeps every square in range.

    Args:
        values: (..., d).

    Returns:
        (...).
    """
    scale = values.detach().abs().amax(-1, keepdim=True)
    safe = torch.where((scale > 0) & torch.isfinite(scale), scale, torch.ones_like(scale))
    norm: Tensor = torch.linalg.vector_norm(values / safe, dim=-1) * safe.squeeze(-1)
    return norm


def power_mean(values: Tensor, p: float, mass: Tensor | None = None) -> Tensor:
    r"""$(\sum_i w_i |v_i|^p)^{1/p}$ over the last axis, without overflow and with gradient 0 (not NaN) where it is 0.

    The derivative of ``t ** (1 / p)`` at 0 is infinite, and infinity times the zero inside is NaN: that would poison
    the gradient of a distance between equal samples, which is the value such a loss converges to.

    Args:
        values: (..., n).
        p: Order, at least 1.
        mass: (..., n) weights that sum to 1; ``None`` for the plain mean.

    Returns:
        (...).
    """
    size = values.abs()
    if p == 1:
        return _average(size, mass)
    scale = size.detach().amax(-1, keepdim=True)
    safe = torch.where((scale > 0) & torch.isfinite(scale), scale, torch.ones_like(scale))
    ratio = size / safe
    mean = _average(ratio.square() if p == 2 else ratio.pow(p), mass)
    zero = mean == 0
    root = torch.where(zero, torch.ones_like(mean), mean).pow(1 / p)
    return torch.where(zero, mean, root * safe.squeeze(-1))


def power_of_two(*samples: Tensor) -> float:
    """The power of two next to the largest absolute entry: dividing by it is exact and brings every entry into [-1, 1].

    Squares and powers of float64 entries near 1e200 would overflow; after this division they cannot. The exponent is
    clamped to +-1000 so that neither the factor nor its inverse leaves the range of float64.
    """
    largest = max(float(sample.detach().abs().max()) for sample in samples)
    if largest == 0 or not math.isfinite(largest):
        return 1.0
    return math.ldexp(1.0, max(-1000, min(1000, math.frexp(largest)[1])))


def _average(values: Tensor, mass: Tensor | None) -> Tensor:
    return values.mean(-1) if mass is None else (values * mass.to(values.dtype)).sum(-1)
