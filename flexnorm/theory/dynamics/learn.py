"""Students that learn: the equations of motion integrated, and the online SGD that they are checked against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from flexnorm._messages import optional
from flexnorm.theory.dynamics.averages import Activation, activation_function, averages, value_and_slope
from flexnorm.theory.dynamics.student import Student

_DIVERGED = 1e6  # a trajectory whose gamma or L passes this value is cut there and called diverged


class Trajectory(NamedTuple):
    """The way of the order parameters, from `solve` or `simulate`. All arrays have shape (T,).

    Attributes:
        method: ``"bn"``, ``"wn"`` or ``"sgd"``.
        time: Samples seen divided by the number of inputs N.
        gamma: Scale of the student's field (for ``"sgd"`` equal to `L`).
        R: Overlap of student and teacher, in [-1, 1].
        L: Length of the weight vector, ``||w|| / sqrt(N)``.
        error: Generalization error ``E[(g(v) - g(u))^2]``.
        effective_lr: Effective learning rate at each time, see `Student.effective_learning_rate`.
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
    grid = _time_grid(times)

    def escaped(_: float, state: NDArray[np.float64]) -> float:
        return float(_DIVERGED - max(abs(state[0]), state[2]))

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


def simulate(
    student: Student,
    *,
    N: int = 500,
    runs: int = 16,
    times: Sequence[float] | float = 10.0,
    seed: int = 0,
) -> Trajectory:
    """Run the online SGD itself (Eq. 5, with ``lr / N`` for gamma): one fresh sample per step, ``times[-1] * N`` steps.

    Several independent runs go side by side, so that every reported value has a standard error.

    Args:
        student: Who learns.
        N: Number of inputs, at least 2.
        runs: Independent runs, at least 2; values are their means.
        times: As for `solve`; rounded to whole samples.
        seed: Of the samples.

    Returns:
        Means over the runs with standard errors. After a run diverged the means are NaN.

    Raises:
        ValueError: For an argument out of its range.
    """
    if N < 2 or runs < 2:
        raise ValueError(f"N and runs must be at least 2, got N={N}, runs={runs}")
    grid = _time_grid(times)
    gamma, R, L = student.start  # every run starts exactly there
    rng = np.random.default_rng(seed)
    teacher, other = _directions(rng, N, runs)
    weight = L * (R * teacher + np.sqrt(1 - R**2) * other)
    scale = np.full(runs, gamma)
    record = np.full((grid.size, runs, 3), np.nan)
    record[0] = (gamma, R, L)
    step, diverged = 0, False
    for index, stop in enumerate(np.rint(grid * N).astype(int)[1:], start=1):
        # Drawing many samples at once is what makes this fast; the steps themselves are sequential by nature.
        while step < stop and not diverged:
            block = min(stop - step, 64)
            for x in rng.standard_normal((block, runs, N)) / np.sqrt(N):
                _step(student, weight, scale, x, teacher)
            step += block
            diverged = not np.all(np.abs(weight) < _DIVERGED) or not np.all(np.abs(scale) < _DIVERGED)
        if diverged:
            break
        length = np.linalg.norm(weight, axis=1)
        overlap = np.sum(weight * teacher, axis=1) / (length * np.sqrt(N))
        size = length / np.sqrt(N)
        record[index] = np.stack([size if student.method == "sgd" else scale, overlap, size], axis=1)
    error = np.full(record.shape[:2], np.nan)
    for place in np.ndindex(*error.shape):
        if np.isfinite(record[place]).all():
            error[place] = averages(record[(*place, 0)], record[(*place, 1)], student.activation).error
    values = {"gamma": record[..., 0], "R": record[..., 1], "L": record[..., 2], "error": error}
    mean = {name: value.mean(axis=1) for name, value in values.items()}
    errors = {name: value.std(axis=1, ddof=1) / np.sqrt(runs) for name, value in values.items()}
    rate = student.effective_learning_rate(mean["gamma"], mean["L"])
    return Trajectory(student.method, grid, **mean, effective_lr=rate, diverged=diverged, standard_error=errors)


def _directions(rng: np.random.Generator, N: int, runs: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Teachers (runs, N) of length sqrt(N), and as many vectors of that length orthogonal to them."""
    teacher = rng.standard_normal((runs, N))
    teacher *= np.sqrt(N) / np.linalg.norm(teacher, axis=1, keepdims=True)
    other = rng.standard_normal((runs, N))
    other -= teacher * np.sum(other * teacher, axis=1, keepdims=True) / N
    other *= np.sqrt(N) / np.linalg.norm(other, axis=1, keepdims=True)
    return teacher, other


def _step(
    student: Student,
    weight: NDArray[np.float64],
    scale: NDArray[np.float64],
    x: NDArray[np.float64],
    teacher: NDArray[np.float64],
) -> None:
    """One sample for every run, in place. weight, x, teacher: (runs, N); scale: (runs,)."""
    N, lr = x.shape[1], student.lr
    field = np.einsum("rn,rn->r", weight, x)
    target = np.einsum("rn,rn->r", teacher, x)
    if student.method == "sgd":
        weight += (lr * _delta(field, target, student.activation))[:, None] * x
        return
    norm = np.sqrt(np.einsum("rn,rn->r", weight, weight))
    unit = np.sqrt(N) * field / norm  # the student's field before gamma
    delta = _delta(scale * unit, target, student.activation)
    pull = lr * delta * scale
    weight += (pull * np.sqrt(N) / norm)[:, None] * x - (pull * unit / norm**2)[:, None] * weight
    scale += lr / N * (delta * unit - student.zeta * scale)


def _delta(u: NDArray[np.float64], v: NDArray[np.float64], activation: Activation) -> NDArray[np.float64]:
    """g'(u) (g(v) - g(u)) for every run."""
    if activation == "identity":
        return v - u
    if activation == "relu":
        return np.asarray((u > 0) * (np.maximum(v, 0) - np.maximum(u, 0)))
    value, slope = value_and_slope(activation, torch.from_numpy(u))
    return np.asarray((slope * (activation_function(activation)(torch.from_numpy(v)) - value)).numpy())


def _time_grid(times: Sequence[float] | float) -> NDArray[np.float64]:
    grid = np.atleast_1d(np.asarray(times, dtype=np.float64))
    if np.ndim(times) == 0:
        grid = np.linspace(0.0, grid[0], 201)
    if grid.size < 2 or grid[0] != 0 or np.any(np.diff(grid) <= 0):
        raise ValueError(f"times must be a positive number or ascend from 0, got {times}")
    return grid
