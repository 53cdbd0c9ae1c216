"""The equations of motion of a teacher-student perceptron under BN, WN and SGD, and their solution.

Luo et al. 2019, Sec. 3. The teacher is ``g(w*^T x)`` with ``||w*||^2 = N`` and ``x ~ N(0, I/N)``. The student is

* ``"bn"``: ``g(sqrt(N) gamma w^T x / ||w||)`` with the decay ``zeta gamma^2`` (BN as weight normalization plus gamma
  decay),
* ``"wn"``: the same without decay,
* ``"sgd"``: ``g(w^T x)``; its gamma is its own length ``L``.

Order parameters: gamma, the overlap ``R`` of student and teacher, ``L^2 = w^T w / N``. Time is samples seen divided by
N.

Conventions and deviations: ``lr`` is the paper's eta, which multiplies half the gradient of ``(g - g*)^2 + zeta
gamma^2``. For the limit of Eq. 6 to exist, the step of gamma must be ``lr / N`` and not ``lr`` as the update of Eq. 5
reads: the gradient with respect to gamma does not shrink with N, and with ``lr`` gamma would move by O(1) at every
sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexnorm._messages import unknown_name
from flexnorm.theory.dynamics.averages import Activation, activation_function, averages

__all__ = ["METHODS", "Trajectory", "rates", "solve"]

METHODS: tuple[str, ...] = ("bn", "wn", "sgd")
"""The students: weight normalization with gamma decay (the model of BN), weight normalization, plain SGD."""

DIVERGED = 1e6
"""A trajectory whose gamma or L passes this value is cut there and called diverged."""


@dataclass(frozen=True)
class Trajectory:
    """The way of the order parameters, from `solve` or `simulate`. All arrays have shape (T,).

    Attributes:
        method: ``"bn"``, ``"wn"`` or ``"sgd"``.
        time: Samples seen divided by the number of inputs N.
        gamma: Scale of the student's field (for ``"sgd"`` equal to `L`).
        R: Overlap of student and teacher, in [-1, 1].
        L: Length of the weight vector, ``||w|| / sqrt(N)``.
        error: Generalization error ``E[(g(v) - g(u))^2]``.
        effective_lr: Effective learning rate at each time, see `effective_learning_rate`.
        diverged: Whether it left all bounds; the arrays then end before that point (`solve`) or hold NaN after it
            (`simulate`).
        standard_error: For a simulation, the standard errors of gamma, R, L and error by name, each (T,); else empty.
    """

    method: str
    time: NDArray[np.float64]
    gamma: NDArray[np.float64]
    R: NDArray[np.float64]
    L: NDArray[np.float64]
    error: NDArray[np.float64]
    effective_lr: NDArray[np.float64]
    diverged: bool
    standard_error: dict[str, NDArray[np.float64]]


def check(method: str, activation: Activation, lr: float, zeta: float) -> float:
    """Validate the arguments that all functions share and return the zeta that applies to the method."""
    if method not in METHODS:
        raise ValueError(unknown_name("method", method, METHODS))
    activation_function(activation)
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr}")
    if not zeta >= 0:
        raise ValueError(f"zeta must not be negative, got {zeta}")
    if zeta and method != "bn":
        raise ValueError(f"zeta is the gamma decay that stands for BN; method {method!r} has none, got zeta={zeta}")
    return float(zeta)


def rates(
    state: Sequence[float], method: str = "bn", activation: Activation = "relu", lr: float = 0.1, zeta: float = 0.0
) -> NDArray[np.float64]:
    """Return ``d(gamma, R, L)/dt``, Eq. 6 of the paper; for ``"sgd"`` the like equations derived in docs/theory.md.

    Args:
        state: gamma, R, L. For ``"sgd"`` gamma is not used: it is L.
        method: One of `METHODS`.
        activation: See `averages`.
        lr: The paper's eta.
        zeta: Strength of the gamma decay, for ``"bn"`` only.

    Returns:
        Shape (3,).

    Raises:
        ValueError: For an unknown name, a learning rate that is not positive, a zeta that is negative or does not
            belong.
    """
    zeta = check(method, activation, lr, zeta)
    gamma, R, L = (float(value) for value in state)
    if method == "sgd":
        m = averages(L, R, activation)
        growth = lr * m.i1 / L + lr**2 * m.i2 / (2 * L)
        return np.array([growth, lr * m.i3 / L - R * growth / L, growth])
    m = averages(gamma, R, activation)
    growth = (lr * gamma) ** 2 * m.i2 / (2 * L**3)
    return np.array(
        [
            lr * m.i1 / gamma - lr * zeta * gamma,
            lr * gamma * m.i3 / L**2 - lr * R * m.i1 / L**2 - R * growth / L,
            growth,
        ]
    )


def solve(
    method: str = "bn",
    activation: Activation = "relu",
    lr: float = 0.1,
    zeta: float = 0.0,
    *,
    gamma0: float = 0.5,
    R0: float = 0.1,
    L0: float = 1.0,
    times: Sequence[float] | float = 50.0,
) -> Trajectory:
    """Integrate the equations of motion (Luo et al. 2019, Eq. 6).

    Args:
        method: ``"bn"``, ``"wn"`` or ``"sgd"``.
        activation: ``"identity"``, ``"relu"``, another name of `ACTIVATIONS`, or a smooth function of a tensor.
        lr: The paper's eta, in units where one sample moves the weights by ``lr``; default 0.1.
        zeta: Gamma decay of ``"bn"``, for instance ``1/(4M)`` for ReLU at batch size M; 0 for the others.
        gamma0: Start of gamma, positive; not used by ``"sgd"``, whose gamma starts at `L0`.
        R0: Start of the overlap, in (-1, 1].
        L0: Start of the length, positive.
        times: The times at which to report, ascending from 0, in samples per input; or the last one, for 201 even
            steps.

    Returns:
        The trajectory. If it diverges, it ends at the last reported time before.

    Raises:
        ValueError: For an argument out of its range.

    Examples:
        >>> path = solve("bn", "relu", lr=0.5, zeta=0.125, times=200.0)
        >>> round(float(path.gamma[-1]), 2)  # 1 / (1 + 2 zeta)
        0.8
    """
    from scipy.integrate import solve_ivp

    zeta = check(method, activation, lr, zeta)
    grid = time_grid(times)
    start = starting_point(method, gamma0, R0, L0)

    def escaped(_: float, state: NDArray[np.float64]) -> float:
        return float(DIVERGED - max(abs(state[0]), state[2]))

    escaped.terminal = True  # type: ignore[attr-defined]  # how solve_ivp wants it

    def motion(_: float, state: NDArray[np.float64]) -> NDArray[np.float64]:
        return rates([state[0], min(1.0, max(-1.0, state[1])), state[2]], method, activation, lr, zeta)

    answer = solve_ivp(
        motion, (0.0, grid[-1]), start, method="LSODA", t_eval=grid, rtol=1e-8, atol=1e-10, events=escaped
    )
    gamma, R, L = answer.y
    R = np.clip(R, -1.0, 1.0)
    error = np.array([averages(g, r, activation).error for g, r in zip(gamma, R, strict=True)])
    diverged = bool(answer.status != 0)
    return Trajectory(method, answer.t, gamma, R, L, error, effective(method, lr, gamma, L), diverged, {})


def effective(method: str, lr: float, gamma: NDArray[np.float64], L: NDArray[np.float64]) -> NDArray[np.float64]:
    """Table 1 of the paper: eta gamma / L^2 for BN, eta / L^2 for WN, eta for SGD."""
    if method == "sgd":
        return np.full_like(L, lr)
    return lr * (gamma if method == "bn" else np.ones_like(gamma)) / L**2


def time_grid(times: Sequence[float] | float) -> NDArray[np.float64]:
    """Return the times to report at as an ascending array that starts at 0."""
    grid = np.atleast_1d(np.asarray(times, dtype=np.float64))
    if np.ndim(times) == 0:
        grid = np.linspace(0.0, grid[0], 201)
    if grid.size < 2 or grid[0] != 0 or np.any(np.diff(grid) <= 0):
        raise ValueError(f"times must be a positive number or ascend from 0, got {times}")
    return grid


def starting_point(method: str, gamma0: float, R0: float, L0: float) -> NDArray[np.float64]:
    """Return (gamma, R, L) to start from after checking it."""
    if not (gamma0 > 0 and L0 > 0 and -1 < R0 <= 1):
        raise ValueError(
            f"the start must have gamma0 > 0, L0 > 0 and -1 < R0 <= 1, got gamma0={gamma0}, L0={L0}, R0={R0}"
        )
    return np.array([L0 if method == "sgd" else gamma0, R0, L0], dtype=np.float64)
