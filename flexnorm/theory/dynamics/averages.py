"""The averages over the inputs that drive the teacher-student dynamics.

A teacher ``g(v)`` is learned by a student ``g(u)``; for Gaussian inputs the local fields ``v`` and ``u`` are jointly
Gaussian with ``E v^2 = 1``, ``E u^2 = gamma^2`` and ``E u v = gamma R``. With ``delta = g'(u) (g(v) - g(u))`` the
equations of motion (Luo et al. 2019, Eq. 6) need ``I1 = E[delta u]``, ``I2 = E[delta^2]`` and ``I3 = E[delta v]`` (the
paper writes ``delta^2 x^T x``; ``x^T x -> 1`` when the number of inputs grows).

Closed forms for the identity and for ReLU (the arc-cosine kernels); any smooth activation by Gauss-Hermite quadrature.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from flexnorm._messages import unknown_name

Activation = str | Callable[[torch.Tensor], torch.Tensor]
"""A name of `ACTIVATIONS`, or any differentiable function of a float64 tensor."""

_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "erf": lambda x: torch.erf(x * 0.5**0.5),
    "softplus": torch.nn.functional.softplus,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
}

ACTIVATIONS: tuple[str, ...] = tuple(_FUNCTIONS)
"""Names of the activations that students take; a callable is taken too."""

NODES = 80  # exact for polynomials of degree 159; smooth activations at gamma <= 2 reach 1e-8 or better
_STEP = 1e-4  # of the finite differences used where no closed form is known; their error is of order _STEP^2


class Averages(NamedTuple):
    """Gaussian averages at one point (gamma, R) of the dynamics.

    Attributes:
        i1: ``E[delta u]``, the drift of gamma.
        i2: ``E[delta^2]``, the noise of the steps, which makes the weight norm grow.
        i3: ``E[delta v]``, the pull towards the teacher.
        error: ``E[(g(v) - g(u))^2]``, the generalization error.
    """

    i1: float
    i2: float
    i3: float
    error: float


def activation_function(activation: Activation) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function behind a name of `ACTIVATIONS`; a callable is returned as it is."""
    if isinstance(activation, str):
        if activation not in _FUNCTIONS:
            raise ValueError(unknown_name("activation", activation, ACTIVATIONS))
        return _FUNCTIONS[activation]
    if not callable(activation):
        raise TypeError(f"activation must be a name or a function of a tensor, got {type(activation).__name__}")
    return activation


def averages(gamma: float, R: float, activation: Activation = "relu") -> Averages:
    """Return I1, I2, I3 and the generalization error for a student of norm gamma and overlap R with the teacher.

    Args:
        gamma: Standard deviation of the student's field, at least 0.
        R: Correlation of the student's and the teacher's field, in [-1, 1]; clipped to it.
        activation: ``"identity"`` and ``"relu"`` use closed forms; every other one uses quadrature, so it should be
            smooth.

    Returns:
        The four averages, as floats.

    Raises:
        ValueError: If the name of the activation is not known.

    Examples:
        >>> round(averages(1.0, 1.0, "relu").i2, 12)
        0.0
    """
    R = min(1.0, max(-1.0, float(R)))
    if activation == "identity":
        error = 1.0 - 2.0 * gamma * R + gamma**2
        return Averages(gamma * (R - gamma), error, 1.0 - gamma * R, error)
    if activation == "relu":
        a, b = _relu_kernels(R)
        return Averages(
            gamma * (b - gamma / 2),
            a - 2 * gamma * b + gamma**2 / 2,
            a - gamma * R / 2,
            0.5 - 2 * gamma * b + gamma**2 / 2,
        )
    return _quadrature(gamma, R, activation)


def derivatives(gamma: float, R: float, activation: Activation) -> tuple[Averages, Averages]:
    """Return the derivatives of the averages with respect to gamma and to R (one-sided at R = 1)."""
    R = min(1.0, max(-1.0, float(R)))
    if activation == "identity":
        by_gamma = Averages(R - 2 * gamma, 2 * (gamma - R), -R, 2 * (gamma - R))
        return by_gamma, Averages(gamma, -2 * gamma, -gamma, -2 * gamma)
    if activation == "relu":
        _, b = _relu_kernels(R)
        theta = np.arccos(R)
        da, db = float(np.sin(theta) / np.pi), float((np.pi - theta) / (2 * np.pi))
        by_gamma = Averages(b - gamma, gamma - 2 * b, -R / 2, gamma - 2 * b)
        return by_gamma, Averages(gamma * db, da - 2 * gamma * db, da - gamma / 2, -2 * gamma * db)

    def difference(weights: tuple[float, ...], points: list[Averages]) -> Averages:
        return Averages(*(float(np.dot(weights, values)) for values in zip(*points, strict=True)))

    step = 0.5 / _STEP
    by_gamma = difference((step, -step), [averages(gamma + sign * _STEP, R, activation) for sign in (1, -1)])
    # Second order from one side, so that it works at R = 1 (and, mirrored, at R = -1) where the other side does not
    # exist.
    h = -_STEP if R > 0 else _STEP
    sides = [averages(gamma, R + k * h, activation) for k in range(3)]
    return by_gamma, difference((-1.5 / h, 2.0 / h, -0.5 / h), sides)


def _relu_kernels(R: float) -> tuple[float, float]:
    """A = E[1(u > 0) relu(v)^2] and B = E[relu(u) relu(v)] for unit Gaussians of correlation R = cos(theta)."""
    theta, sin = np.arccos(R), np.sqrt(1 - R**2)
    return float((np.pi - theta + sin * R) / (2 * np.pi)), float((sin + (np.pi - theta) * R) / (2 * np.pi))


@lru_cache(maxsize=1)
def _nodes() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, weights = np.polynomial.hermite_e.hermegauss(NODES)
    return x, weights / np.sqrt(2 * np.pi)


def _quadrature(gamma: float, R: float, activation: Activation) -> Averages:
    x, weight = _nodes()
    a = torch.from_numpy(x)
    u, v = gamma * a, R * a[:, None] + (1 - R**2) ** 0.5 * a[None, :]
    g_u, slope = value_and_slope(activation, u)
    gap = activation_function(activation)(v) - g_u[:, None]
    delta = slope[:, None] * gap
    w = torch.from_numpy(np.outer(weight, weight))
    return Averages(*(float((w * values).sum()) for values in (delta * u[:, None], delta**2, delta * v, gap**2)))


def value_and_slope(activation: Activation, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return g(u) and g'(u), of the shape of u."""
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        value = activation_function(activation)(u)
        (slope,) = torch.autograd.grad(value.sum(), u)
    return value.detach(), slope
