"""Online SGD of students of a teacher perceptron: what the equations of motion are checked against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from flexnorm.theory.dynamics import Student, Trajectory
from flexnorm.theory.dynamics.averages import Activation, activation_function, averages, value_and_slope
from flexnorm.theory.dynamics.learn import DIVERGED, time_grid


def online_sgd(
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
        times: As for `flexnorm.theory.dynamics.solve`; rounded to whole samples.
        seed: Of the samples.

    Returns:
        Means over the runs with standard errors. After a run diverged the means are NaN.

    Raises:
        ValueError: For an argument out of its range.
    """
    if N < 2 or runs < 2:
        raise ValueError(f"N and runs must be at least 2, got N={N}, runs={runs}")
    grid = time_grid(times)
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
            diverged = not np.all(np.abs(weight) < DIVERGED) or not np.all(np.abs(scale) < DIVERGED)
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
