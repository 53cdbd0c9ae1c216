"""Students that learn: the equations of motion integrated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexnorm._messages import optional
from flexnorm.theory.dynamics.averages import averages
from flexnorm.theory.dynamics.student import Student

DIVERGED = 1e6  # a trajectory whose gamma or L passes this value is cut there and called diverged


class Trajectory(NamedTuple):
    """The way of the order parameters, solved or simulated (:mod:`flexnorm.lab.simulations`). Arrays are (T,).

    Attributes:
        method: ``"bn"``, ``"wn"`` or ``"sgd"``.
        time: Samples seen divided by the number of inputs N.
        gamma: Scale of the student's field (for ``"sgd"`` equal to `L`).
        R: Overlap of student and teacher, in [-1, 1].
        L: Length of the weight vector, ``||w|| / sqrt(N)``.
        error: Generalization error ``E[(g(v) - g(u))^2]``.
        effective_lr: Effective learning rate at each time, see `Student.effective_learning_rate`.
        diverged: Whether it left all bounds; the arrays then end before that point or, of a
            simulation, hold NaN after it.
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


def solve(student: Student, *, times: Sequence[float] | float = 50.0) -> Trajectory:
    """Integrate the equations of motion (Luo et al. 2019, Eq. 6). Needs scipy.

    Args:
        student: Who learns.
        times: The times at which to report, ascending from 0, in samples per input; or the last one, for 201 even
            steps.

    Returns:
        The trajectory. If it diverges, it ends at the last reported time before.

    Raises:
        ValueError: If the times do not ascend from 0.
        ImportError: If scipy is not installed.

    Examples:
        >>> path = solve(Student("bn", "relu", lr=0.5, zeta=0.125), times=200.0)
        >>> round(float(path.gamma[-1]), 2)  # 1 / (1 + 2 zeta)
        0.8
    """
    integrate = optional("scipy.integrate", "theory.dynamics.solve", "lab")
    grid = time_grid(times)

    def escaped(_: float, state: NDArray[np.float64]) -> float:
        return float(DIVERGED - max(abs(state[0]), state[2]))

    escaped.terminal = True  # type: ignore[attr-defined]  # how solve_ivp wants it

    def motion(_: float, state: NDArray[np.float64]) -> NDArray[np.float64]:
        return student.rates([state[0], min(1.0, max(-1.0, state[1])), state[2]])

    answer = integrate.solve_ivp(
        motion, (0.0, grid[-1]), student.start, method="LSODA", t_eval=grid, rtol=1e-8, atol=1e-10, events=escaped
    )
    gamma, R, L = answer.y
    R = np.clip(R, -1.0, 1.0)
    error = np.array([averages(g, r, student.activation).error for g, r in zip(gamma, R, strict=True)])
    rate = student.effective_learning_rate(gamma, L)
    return Trajectory(student.method, answer.t, gamma, R, L, error, rate, bool(answer.status != 0), {})


def time_grid(times: Sequence[float] | float) -> NDArray[np.float64]:
    """The times to report at, as `solve` takes them."""
    grid = np.atleast_1d(np.asarray(times, dtype=np.float64))
    if np.ndim(times) == 0:
        grid = np.linspace(0.0, grid[0], 201)
    if grid.size < 2 or grid[0] != 0 or np.any(np.diff(grid) <= 0):
        raise ValueError(f"times must be a positive number or ascend from 0, got {times}")
    return grid
