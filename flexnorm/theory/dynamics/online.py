"""Online SGD of a student with finitely many inputs: what the equations of motion are checked against.

Luo et al. 2019, Eq. 5, with the step ``lr / N`` for gamma (see `flexnorm.theory.dynamics.ode`). Several independent
runs go side by side, so that every reported value has a standard error.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from flexnorm.theory.dynamics.averages import Activation, activation_function, averages
from flexnorm.theory.dynamics.ode import DIVERGED, Trajectory, check, effective, starting_point, time_grid

__all__ = ["simulate"]


def simulate(
    method: str = "bn",
    activation: Activation = "relu",
    lr: float = 0.1,
    zeta: float = 0.0,
    *,
    N: int = 500,
    runs: int = 16,
    gamma0: float = 0.5,
    R0: float = 0.1,
    L0: float = 1.0,
    times: Sequence[float] | float = 10.0,
    seed: int = 0,
) -> Trajectory:
    """Run the actual online SGD: one fresh sample ``x ~ N(0, I/N)`` per step, ``times[-1] * N`` steps.

    Args:
        method: ``"bn"``, ``"wn"`` or ``"sgd"``.
        activation: A name of `ACTIVATIONS` or a differentiable function of a tensor.
        lr: The paper's eta.
        zeta: Gamma decay, for ``"bn"``.
        N: Number of inputs, at least 2.
        runs: Independent runs, at least 2; values are their means.
        gamma0: Start of gamma, positive.
        R0: Start of the overlap; every run starts exactly there.
        L0: Start of the length.
        times: As for `solve`; rounded to whole samples.
        seed: Of the samples.

    Returns:
        Means over the runs with standard errors. After a run diverged the means are NaN.

    Raises:
        ValueError: For an argument out of its range.
    """
    zeta = check(method, activation, lr, zeta)
    if N < 2 or runs < 2:
        raise ValueError(f"N and runs must be at least 2, got N={N}, runs={runs}")
    grid = time_grid(times)
    gamma, R, L = starting_point(method, gamma0, R0, L0)
    rng = np.random.default_rng(seed)
    teacher, weight = _start(rng, N, runs, float(R), float(L))
    scale = np.full(runs, gamma)
    stops = np.rint(grid * N).astype(int)
    record = np.full((grid.size, runs, 3), np.nan)
    record[0] = (gamma, R, L)
    step, diverged = 0, False
    for index, stop in enumerate(stops[1:], start=1):
        # Drawing many samples at once is what makes this fast; the steps themselves are sequential by nature.
        while step < stop and not diverged:
            block = min(stop - step, 64)
            samples = rng.standard_normal((block, runs, N)) / np.sqrt(N)
            for x in samples:
                _step(weight, scale, x, teacher, method, activation, lr, zeta)
            step += block
            diverged = not np.all(np.abs(weight) < DIVERGED) or not np.all(np.abs(scale) < DIVERGED)
        if diverged:
            break
        length = np.linalg.norm(weight, axis=1)
        overlap = np.sum(weight * teacher, axis=1) / (length * np.sqrt(N))
        size = length / np.sqrt(N)
        record[index] = np.stack([size if method == "sgd" else scale, overlap, size], axis=1)
    return _summary(method, grid, record, activation, lr, diverged)


def _start(
    rng: np.random.Generator, N: int, runs: int, R: float, L: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    teacher = rng.standard_normal((runs, N))
    teacher *= np.sqrt(N) / np.linalg.norm(teacher, axis=1, keepdims=True)
    other = rng.standard_normal((runs, N))
    other -= teacher * np.sum(other * teacher, axis=1, keepdims=True) / N
    other *= np.sqrt(N) / np.linalg.norm(other, axis=1, keepdims=True)
    return teacher, L * (R * teacher + np.sqrt(1 - R**2) * other)


def _step(
    weight: NDArray[np.float64],
    scale: NDArray[np.float64],
    x: NDArray[np.float64],
    teacher: NDArray[np.float64],
    method: str,
    activation: Activation,
    lr: float,
    zeta: float,
) -> None:
    """One sample for every run, in place. weight, x, teacher: (runs, N); scale: (runs,)."""
    N = x.shape[1]
    field = np.einsum("rn,rn->r", weight, x)
    target = np.einsum("rn,rn->r", teacher, x)
    if method == "sgd":
        weight += (lr * _delta(field, target, activation))[:, None] * x
        return
    norm = np.sqrt(np.einsum("rn,rn->r", weight, weight))
    unit = np.sqrt(N) * field / norm  # the student's field before gamma
    delta = _delta(scale * unit, target, activation)
    pull = lr * delta * scale
    weight += (pull * np.sqrt(N) / norm)[:, None] * x - (pull * unit / norm**2)[:, None] * weight
    scale += lr / N * (delta * unit - zeta * scale)


def _delta(u: NDArray[np.float64], v: NDArray[np.float64], activation: Activation) -> NDArray[np.float64]:
    """g'(u) (g(v) - g(u)) for every run."""
    if activation == "identity":
        return v - u
    if activation == "relu":
        return np.asarray((u > 0) * (np.maximum(v, 0) - np.maximum(u, 0)))
    g = activation_function(activation)
    with torch.enable_grad():
        field = torch.from_numpy(u).requires_grad_()
        value = g(field)
        (slope,) = torch.autograd.grad(value.sum(), field)
    return np.asarray((slope * (g(torch.from_numpy(v)) - value)).detach().numpy())


def _summary(
    method: str,
    grid: NDArray[np.float64],
    record: NDArray[np.float64],
    activation: Activation,
    lr: float,
    diverged: bool,
) -> Trajectory:
    runs = record.shape[1]
    error = np.full(record.shape[:2], np.nan)
    for index in np.ndindex(*error.shape):
        if np.isfinite(record[index]).all():
            error[index] = averages(record[(*index, 0)], record[(*index, 1)], activation).error
    values = {"gamma": record[..., 0], "R": record[..., 1], "L": record[..., 2], "error": error}
    mean = {name: value.mean(axis=1) for name, value in values.items()}
    spread = {name: value.std(axis=1, ddof=1) / np.sqrt(runs) for name, value in values.items()}
    rate = effective(method, lr, mean["gamma"], mean["L"])
    return Trajectory(method, grid, mean["gamma"], mean["R"], mean["L"], mean["error"], rate, diverged, spread)
