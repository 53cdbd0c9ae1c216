"""The experiments that the formulas of :mod:`flexnorm.theory` are checked against (Luo et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flexnorm._messages import unknown_name
from flexnorm.theory.dynamics import (
    DIVERGED,
    Activation,
    Student,
    Trajectory,
    activation_function,
    averages,
    time_grid,
    value_and_slope,
)
from flexnorm.theory.regularization import PreactivationLoss

__all__ = ["STUDENTS", "Estimate", "Simulated", "bn_gap", "generalization_error"]
__all__ += ["online_sgd", "train_students", "training_set"]

STUDENTS: tuple[str, ...] = ("sgd", "gamma_decay", "batchnorm", "positive")
"""``"sgd"``: gradient descent from a small start to the end. ``"gamma_decay"``: WN with population variance and decay.
``"batchnorm"``: real BN with mini-batches. ``"positive"``: least squares on the samples with positive label, through
ReLU.
"""

Vector = NDArray[np.floating[Any]]
Rng = np.random.Generator


class Simulated(NamedTuple):
    """Means over independent runs.

    Attributes:
        error: Generalization error.
        standard_error: Of the error; NaN for a single run.
        training_loss: Mean squared error on the training set, evaluated with population statistics.
        errors: The error of every run.
    """

    error: float
    standard_error: float
    training_loss: float
    errors: tuple[float, ...]


def training_set(alpha: float, noise: float, N: int, rng: Rng) -> tuple[Vector, Vector, Vector]:
    """Return inputs (P, N), labels (P,) and the teacher (N,) with ``P = round(alpha N)``, drawn from ``rng``.

    Labels have ``noise`` of that variance.
    """
    P = max(1, round(alpha * N))
    x = rng.standard_normal((P, N)) / np.sqrt(N)
    teacher = rng.standard_normal(N)
    teacher *= np.sqrt(N) / np.linalg.norm(teacher)
    return x, x @ teacher + np.sqrt(noise) * rng.standard_normal(P), teacher


def generalization_error(weight: Vector, teacher: Vector, activation: str = "identity", bias: float = 0.0) -> float:
    """Return ``E[(teacher^T x - g(weight^T x + bias))^2]`` over ``x ~ N(0, I/N)``, in closed form.

    ``weight`` and ``teacher`` are (N,); the ``activation`` g is ``"identity"`` or ``"relu"``.
    """
    N = len(teacher)
    if activation == "identity":
        return float(np.sum((teacher - weight) ** 2) / N + bias**2)
    length = float(np.linalg.norm(weight) / np.sqrt(N))
    if length == 0.0:
        return float(teacher @ teacher / N) + max(bias, 0.0) ** 2
    z = bias / length
    above = 0.5 * (1.0 + math.erf(z / math.sqrt(2)))
    density = math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    overlap = float(weight @ teacher) / N * above
    square = (length**2 + bias**2) * above + bias * length * density
    return float(teacher @ teacher) / N - 2.0 * overlap + square


def train_students(
    student: str,
    alpha: float,
    noise: float = 0.0,
    *,
    activation: str = "identity",
    zeta: float = 0.0,
    N: int = 256,
    runs: int = 8,
    batch_size: int = 32,
    epochs: int = 100,
    lr: float = 0.02,
    start: float = 0.1,
    seed: int = 0,
) -> Simulated:
    """Train a student on ``alpha N`` samples of a noisy linear teacher and return its generalization error.

    Args:
        student: One of `STUDENTS`.
        alpha: Samples per input, positive.
        noise: Variance of the labels' noise.
        activation: ``"identity"`` or ``"relu"`` (the teacher stays linear, as in the paper).
        zeta: For ``"gamma_decay"``: the decay beside the MEAN squared error, ``1/(2M)`` or ``1/(4M)`` to imitate BN;
            its linear case is solved exactly (ridge regression with `ridge_strength`).
        N: Inputs, at least 2.
        runs: Independent training sets.
        batch_size: M of ``"batchnorm"``.
        epochs: Passes of ``"batchnorm"``; of the descents of a ReLU student, steps are 20 times this number.
        lr: Learning rate of ``"batchnorm"`` for the mean squared error of a batch; it falls to zero along a cosine. The
            weights use N times as much, which makes the motion independent of N.
        start: Standard deviation of the initial weights of ``"batchnorm"`` and of a ReLU student.
        seed: Of everything.

    Returns:
        The error with its standard error.

    Raises:
        ValueError: If a name is unknown or an argument is out of range.
    """
    if student not in STUDENTS:
        raise ValueError(unknown_name("student", student, STUDENTS))
    if activation not in ("identity", "relu"):
        raise ValueError(unknown_name("activation", activation, ["identity", "relu"]))
    if not alpha > 0 or not noise >= 0 or not zeta >= 0 or N < 2 or runs < 1:
        raise ValueError(
            "alpha must be positive, noise and zeta not negative, N at least 2, runs at least 1; got "
            f"alpha={alpha}, noise={noise}, zeta={zeta}, N={N}, runs={runs}"
        )
    if student == "batchnorm" and not 2 <= batch_size <= round(alpha * N):
        raise ValueError(f"batch_size must lie between 2 and the {round(alpha * N)} samples, got {batch_size}")
    if student == "positive":
        activation = "relu"
    relu = activation == "relu"
    errors, losses = [], []
    for run in range(runs):
        rng = np.random.default_rng([seed, run])
        x, y, teacher = training_set(alpha, noise, N, rng)
        bias = 0.0
        if student == "batchnorm":
            weight, bias = _batchnorm(x, y, relu, batch_size, epochs, lr, start, rng)
        elif student == "positive":
            weight = np.linalg.lstsq(x[y > 0], y[y > 0], rcond=None)[0]
        elif relu:
            weight = _relu_descent(x, y, zeta if student == "gamma_decay" else 0.0, 20 * epochs, start, rng)
        elif student == "gamma_decay" and zeta:
            weight = np.linalg.solve(x.T @ x + len(y) / N * zeta * np.eye(N), x.T @ y)
        else:
            weight = np.linalg.lstsq(x, y, rcond=None)[0]
        output = x @ weight + bias
        losses.append(float(np.mean((y - (np.maximum(output, 0) if relu else output)) ** 2)))
        errors.append(generalization_error(weight, teacher, activation, bias))
    standard_error = float(np.std(errors, ddof=1) / np.sqrt(runs)) if runs > 1 else math.nan
    return Simulated(float(np.mean(errors)), standard_error, float(np.mean(losses)), tuple(errors))


def _relu_descent(x: Vector, y: Vector, zeta: float, steps: int, start: float, rng: Rng) -> Vector:
    """Full-batch gradient descent of mean (y - relu(x w))^2 + zeta ||w||^2 / N.

    Its minima are those over (gamma, w / ||w||) of WN with gamma decay: gamma^2 = ||w||^2 / N.
    """
    P, N = x.shape
    weight: Vector = np.asarray(start * rng.standard_normal(N))
    rate = 1.0 / (1.0 + np.sqrt(P / N)) ** 2  # below 2 / (largest eigenvalue of x^T x): descent for any activity
    for _ in range(steps):
        field = x @ weight
        weight -= rate * (x.T @ ((np.maximum(field, 0) - y) * (field > 0)) + P / N * zeta * weight)
    return weight


def _batchnorm(
    x: Vector, y: Vector, relu: bool, size: int, epochs: int, lr: float, start: float, rng: Rng
) -> tuple[Vector, float]:
    """SGD through real batch normalization; returns the weights and bias it amounts to with population statistics."""
    P, N = x.shape
    weight: Vector = np.asarray(start * rng.standard_normal(N))
    gamma, beta = 1.0, 0.0
    step, steps = 0, epochs * (P // size)
    for _ in range(epochs):
        order = rng.permutation(P)
        for first in range(0, P - size + 1, size):
            index = order[first : first + size]
            batch, label = x[index], y[index]
            field = batch @ weight
            centred = field - field.mean()
            sigma = math.sqrt(float(centred @ centred) / size + 1e-20)
            unit = centred / sigma
            out = gamma * unit + beta
            gap = 2.0 / size * ((np.maximum(out, 0) - label) * (out > 0) if relu else out - label)
            back = gamma / sigma * (gap - gap.mean() - unit * (gap @ unit) / size)
            rate = 0.5 * lr * (1.0 + math.cos(math.pi * step / steps))
            weight -= rate * N * (batch.T @ back)
            gamma -= rate * float(gap @ unit)
            beta -= rate * float(gap.sum())
            step += 1
    field = x @ weight
    scale = gamma / float(field.std())
    return np.asarray(scale * weight), beta - scale * float(field.mean())


def online_sgd(
    student: Student, *, N: int = 500, runs: int = 16, times: Sequence[float] | float = 10.0, seed: int = 0
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


def _directions(rng: np.random.Generator, N: int, runs: int) -> tuple[Vector, Vector]:
    """Teachers (runs, N) of length sqrt(N), and as many vectors of that length orthogonal to them."""
    teacher = rng.standard_normal((runs, N))
    teacher *= np.sqrt(N) / np.linalg.norm(teacher, axis=1, keepdims=True)
    other = rng.standard_normal((runs, N))
    other -= teacher * np.sum(other * teacher, axis=1, keepdims=True) / N
    other *= np.sqrt(N) / np.linalg.norm(other, axis=1, keepdims=True)
    return teacher, other


def _step(student: Student, weight: Vector, scale: Vector, x: Vector, teacher: Vector) -> None:
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


def _delta(u: Vector, v: Vector, activation: Activation) -> Vector:
    """g'(u) (g(v) - g(u)) for every run."""
    if activation == "identity":
        return v - u
    if activation == "relu":
        return np.asarray((u > 0) * (np.maximum(v, 0) - np.maximum(u, 0)))
    value, slope = value_and_slope(activation, torch.from_numpy(u))
    return np.asarray((slope * (activation_function(activation)(torch.from_numpy(v)) - value)).numpy())


_MODES = ("own", "independent", "uncompensated")


class Estimate(NamedTuple):
    """A simulated value.

    Attributes:
        value: The mean.
        standard_error: Of the mean.
    """

    value: float
    standard_error: float


def bn_gap(
    draw: Callable[[int, torch.Generator], Tensor],
    loss: PreactivationLoss,
    batch_size: int,
    *,
    gamma: float = 1.0,
    beta: float = 0.0,
    batches: int = 20_000,
    mode: str = "own",
    mean: bool = True,
    variance: bool = True,
    seed: int = 0,
) -> Estimate:
    """Simulate the expected BN loss minus the PN loss of a single-layer perceptron: the experiment behind Eq. 3.

    Args:
        draw: ``draw(n, generator)``: n independent standardized pre-activations, shape (n,), mean 0 and variance 1.
        loss: ``loss(h_hat, u)``, elementwise.
        batch_size: M, at least 4.
        gamma: Scale.
        beta: Shift.
        batches: Number of batches.
        mode: ``"own"``: a batch is normalized by its own statistics, as BN does. ``"independent"``: by those of another
            batch, as Eq. 3 supposes, with the mean of the result held at ``gamma u + beta`` (the compensation that the
            expansion needs). ``"uncompensated"``: the same without holding the mean, which adds a bias of first order.
        mean: Whether the batch mean is subtracted; else the population's.
        variance: Whether the batch standard deviation divides; else the population's.
        seed: Of the samples.

    Returns:
        The estimate of ``E[loss(BN)] - loss(PN)``.

    Raises:
        ValueError: For an unknown mode or a batch size below 4.

    Examples:
        >>> gaussian = lambda n, g: torch.randn(n, generator=g, dtype=torch.float64)
        >>> half_square = lambda h, u: h.square() / 2
        >>> gap = bn_gap(gaussian, half_square, 32, batches=4000, mode="independent")
        >>> abs(gap.value - 0.75 / 32) < 0.1 / 32
        True
    """
    if mode not in _MODES:
        raise ValueError(unknown_name("mode", mode, _MODES))
    if batch_size < 4:
        raise ValueError(f"batch_size must be at least 4, got {batch_size}")
    generator = torch.Generator().manual_seed(seed)
    u = draw(batches * batch_size, generator).reshape(batches, batch_size)
    basis = u if mode == "own" else draw(batches * batch_size, generator).reshape(batches, batch_size)
    center = basis.mean(1, keepdim=True) if mean else torch.zeros_like(u[:, :1])
    # Variance-only BN still measures deviations from the batch's mean, as torch does.
    factor = basis.std(1, keepdim=True, correction=0).reciprocal() if variance else torch.ones_like(center)
    if mode == "independent":
        shift = (center * factor).mean()
        factor, center = factor / factor.mean(), center - shift / factor.mean()
    noisy = gamma * (u - center) * factor + beta
    plain = gamma * u + beta
    gap = loss(noisy, u) - loss(plain, u)
    # Most of the scatter is of first order in the noise; what is taken out has a known mean, so the estimate stays
    # unbiased.
    with torch.enable_grad():
        h = plain.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(h, u).sum(), h)
    if mode == "independent":  # its mean is zero by construction
        gap = gap - slope * (noisy - plain)
    else:
        gap = gap + gamma * _first_order(slope, u, basis, mode == "own", mean, variance)
    per_batch = gap.mean(1)
    return Estimate(float(per_batch.mean()), float(per_batch.std() / batches**0.5))


def _first_order(slope: Tensor, u: Tensor, basis: Tensor, own: bool, mean: bool, variance: bool) -> Tensor:
    """Slope times the linear noise ``a + u b``, less its mean: that of 1/M of each sample on itself, or zero."""
    total = torch.zeros_like(u)
    size = u.shape[1]
    if mean:
        total = total + slope * basis.mean(1, keepdim=True) - (float(own) / size) * (slope * u).mean()
    if variance:
        excess = 0.5 * (basis.square().mean(1, keepdim=True) - 1.0)
        total = total + slope * u * excess - (float(own) / size) * 0.5 * (slope * u * (u.square() - 1.0)).mean()
    return total
