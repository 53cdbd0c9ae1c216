"""Students trained on finitely many inputs: what the formulas are checked against.

Errors on new samples are computed exactly from the weights (Gaussian integrals), so all scatter is that of the training
sets.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexnorm._messages import unknown_name

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
    """Return inputs (P, N), labels (P,) and the teacher (N,) with ``P = round(alpha N)``.

    Args:
        alpha: Samples per input.
        noise: Variance of the labels' noise.
        N: Inputs.
        rng: Source of everything.
    """
    P = max(1, round(alpha * N))
    x = rng.standard_normal((P, N)) / np.sqrt(N)
    teacher = rng.standard_normal(N)
    teacher *= np.sqrt(N) / np.linalg.norm(teacher)
    return x, x @ teacher + np.sqrt(noise) * rng.standard_normal(P), teacher


def generalization_error(weight: Vector, teacher: Vector, activation: str = "identity", bias: float = 0.0) -> float:
    """Return ``E[(teacher^T x - g(weight^T x + bias))^2]`` over ``x ~ N(0, I/N)``, in closed form.

    Args:
        weight: (N,).
        teacher: (N,).
        activation: ``"identity"`` or ``"relu"``.
        bias: Of the student.
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
