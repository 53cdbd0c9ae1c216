"""Learning dynamics of a teacher-student perceptron under BN, WN and SGD: equations of motion, where they rest.

Luo et al. 2019, Sec. 3, Propositions 1 to 4 and Table 1. The teacher is ``g(w*^T x)`` with ``||w*||^2 = N`` and
``x ~ N(0, I/N)``. Order parameters: gamma, the overlap ``R`` of student and teacher, ``L^2 = w^T w / N``. Time is
samples seen divided by N. For Gaussian inputs the local fields ``v`` of the teacher and ``u`` of the student are
jointly Gaussian with ``E v^2 = 1``, ``E u^2 = gamma^2`` and ``E u v = gamma R``. With ``delta = g'(u) (g(v) - g(u))``
the equations of motion (Eq. 6) need ``I1 = E[delta u]``, ``I2 = E[delta^2]`` and ``I3 = E[delta v]`` (the paper writes
``delta^2 x^T x``; ``x^T x -> 1`` when the number of inputs grows).

Conventions and deviations: ``lr`` is the paper's eta, which multiplies half the gradient of ``(g - g*)^2 + zeta
gamma^2``. For the limit of Eq. 6 to exist, the step of gamma must be ``lr / N`` and not ``lr`` as the update of Eq. 5
reads. What the printed propositions leave out (docs/theory.md): with zeta > 0, I2 at the "fixed point" is not zero, so
L keeps growing and R = 1 is approached only as the effective learning rate falls to zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from flexnorm._messages import optional, unknown_name

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


METHODS: tuple[str, ...] = ("bn", "wn", "sgd")
"""The students: weight normalization with gamma decay (the model of BN), weight normalization, plain SGD."""


class FixedPoint(NamedTuple):
    """A fixed point of gamma and R.

    Attributes:
        gamma: ``1/(2 zeta + 1)`` for a ReLU student, ``1/(zeta + 1)`` for a linear one, 1 without decay.
        R: 1, the direction of the teacher.
        L: The length given; for ``"sgd"`` it is 1.
        drift: ``dL/dt`` there. Zero without decay; positive with decay, where only gamma rests and L grows for ever.
    """

    gamma: float
    R: float
    L: float
    drift: float


@dataclass(frozen=True)
class Student:
    """A student, how it is trained and where it starts. Its methods are the theory; `solve`, `simulate` let it learn.

    Args:
        method: ``"bn"``: ``g(sqrt(N) gamma w^T x / ||w||)`` with the decay ``zeta gamma^2`` (BN as weight normalization
            plus gamma decay). ``"wn"``: the same without decay. ``"sgd"``: ``g(w^T x)``; its gamma is its length ``L``.
        activation: g: ``"identity"``, ``"relu"``, another name of `ACTIVATIONS`, or a smooth function of a tensor.
        lr: The paper's eta, in units where one sample moves the weights by ``lr``.
        zeta: Gamma decay of ``"bn"``, for instance ``1/(4M)`` for ReLU at batch size M; 0 for the others.
        gamma0: Start of gamma, positive; not used by ``"sgd"``, whose gamma starts at `L0`.
        R0: Start of the overlap, in (-1, 1].
        L0: Start of the length, positive.

    Raises:
        ValueError: For an unknown name, a learning rate that is not positive, a zeta that is negative or does not
            belong, a start out of range.
        TypeError: If the activation is neither a name nor a function.

    Examples:
        >>> student = Student("bn", "relu", lr=0.5, zeta=0.125)
        >>> student.fixed_point().gamma  # 1 / (1 + 2 zeta)
        0.8
        >>> round(student.max_learning_rate(), 6)  # 2 + 4 zeta
        2.5
    """

    method: str = "bn"
    activation: Activation = "relu"
    lr: float = 0.1
    zeta: float = 0.0
    gamma0: float = 0.5
    R0: float = 0.1
    L0: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(unknown_name("method", self.method, METHODS))
        activation_function(self.activation)
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not self.zeta >= 0:
            raise ValueError(f"zeta must not be negative, got {self.zeta}")
        if self.zeta and self.method != "bn":
            raise ValueError(
                f"zeta is the gamma decay that stands for BN; method {self.method!r} has none, got zeta={self.zeta}"
            )
        gamma0, R0, L0 = self.gamma0, self.R0, self.L0
        if not (gamma0 > 0 and L0 > 0 and -1 < R0 <= 1):
            raise ValueError(f"the start must have gamma0 > 0, L0 > 0 and -1 < R0 <= 1, got {gamma0=}, {L0=}, {R0=}")

    @property
    def start(self) -> tuple[float, float, float]:
        """gamma, R and L at the start."""
        return (float(self.L0 if self.method == "sgd" else self.gamma0), float(self.R0), float(self.L0))

    def rates(self, state: Sequence[float]) -> NDArray[np.float64]:
        """Return ``d(gamma, R, L)/dt``, Eq. 6 of the paper; for ``"sgd"`` the like equations of docs/theory.md.

        Args:
            state: gamma, R, L. For ``"sgd"`` gamma is not used: it is L.
        """
        gamma, R, L = (float(value) for value in state)
        lr = self.lr
        if self.method == "sgd":
            m = averages(L, R, self.activation)
            growth = lr * m.i1 / L + lr**2 * m.i2 / (2 * L)
            return np.array([growth, lr * m.i3 / L - R * growth / L, growth])
        m = averages(gamma, R, self.activation)
        growth = (lr * gamma) ** 2 * m.i2 / (2 * L**3)
        turn = lr * gamma * m.i3 / L**2 - lr * R * m.i1 / L**2 - R * growth / L
        return np.array([lr * m.i1 / gamma - lr * self.zeta * gamma, turn, growth])

    def fixed_point(self, L: float = 1.0) -> FixedPoint:
        """Return the fixed point in the direction of the teacher (Prop. 1).

        Args:
            L: Length of the weights; free for BN and WN, not used for SGD.

        Raises:
            ValueError: If the activation has no closed form and ``I1(gamma, 1) = zeta gamma^2`` no root in (0, 1].
        """
        L = 1.0 if self.method == "sgd" else L
        gamma = 1.0 if self.zeta == 0 else self._decayed_gamma()
        return FixedPoint(gamma, 1.0, L, float(self.rates([gamma, 1.0, L])[2]))

    def _decayed_gamma(self) -> float:
        zeta, low = self.zeta, 1e-3
        if self.activation in ("relu", "identity"):
            return 1.0 / ((2.0 if self.activation == "relu" else 1.0) * zeta + 1.0)

        def pull(gamma: float) -> float:
            return averages(gamma, 1.0, self.activation).i1 / gamma - zeta * gamma

        if pull(low) <= 0:
            raise ValueError(f"gamma decays to zero: no fixed point above {low} for zeta={zeta} with this activation")
        optimize = optional("scipy.optimize", "the fixed point of an activation without closed form", "lab")
        return float(optimize.brentq(pull, low, 1.0, xtol=1e-14))

    def jacobian(self, L: float = 1.0) -> NDArray[np.float64]:
        """Return the Jacobian of `rates` at the fixed point, (3, 3) in the order gamma, R, L.

        For ``"sgd"`` gamma is L, so that row and column are left out: (2, 2) in the order R, L. The derivative by R is
        from below.

        Args:
            L: Length of the weights at which to look (BN, WN).
        """
        point, lr = self.fixed_point(L), self.lr
        g, R, L = point.gamma, 1.0, point.L
        m = averages(g, R, self.activation)
        by_gamma, by_R = derivatives(g, R, self.activation)
        if self.method == "sgd":  # here gamma = L = 1 and I1 = I2 = I3 = 0, so only their derivatives remain
            dL_R, dL_L = (lr * d.i1 + lr**2 * d.i2 / 2 for d in (by_R, by_gamma))
            return np.array([[lr * by_R.i3 - dL_R, lr * by_gamma.i3 - dL_L], [dL_R, dL_L]])
        c, k = lr / L**2, lr**2 * g / (2 * L**4)
        return np.array(
            [
                [lr * (by_gamma.i1 / g - m.i1 / g**2) - lr * self.zeta, lr * by_R.i1 / g, 0.0],
                [
                    c * (m.i3 + g * by_gamma.i3 - by_gamma.i1) - k * (2 * m.i2 + g * by_gamma.i2),
                    c * (g * by_R.i3 - m.i1 - by_R.i1) - k * g * (m.i2 + by_R.i2),
                    -2 * c * (g * m.i3 - m.i1) / L + 4 * k * g * m.i2 / L,
                ],
                [k * L * (2 * m.i2 + g * by_gamma.i2), k * L * g * by_R.i2, -3 * k * g * m.i2],
            ]
        )

    def eigenvalues(self, L: float = 1.0) -> NDArray[np.complex128]:
        """Return the eigenvalues of the Jacobian at the length ``L``, (3,) or (2,), ascending by real part.

        The point is stable where no real part is positive; without decay BN and WN have one zero eigenvalue, that of
        the free L.
        """
        values = np.linalg.eigvals(self.jacobian(L)).astype(np.complex128)
        return np.asarray(values[np.argsort(values.real)])

    def printed_eigenvalue(self, L: float = 1.0) -> float:
        """Return lambda_R of Prop. 2 at the length ``L``: ``(dI2/dR) (lr gamma0 / (2 L^2)) (bound - effective rate)``.

        The bound is `max_learning_rate`. It equals the diagonal entry of R of the Jacobian without decay, and up to
        ``lr^2 gamma0^2 I2 / (2 L^4) = O(zeta^2)`` with it.
        """
        point = self.fixed_point(L)
        slope = derivatives(point.gamma, 1.0, self.activation)[1].i2
        gap = self.max_learning_rate() - self.effective_learning_rate(point.gamma, point.L)
        return float(slope * self.lr * point.gamma / (2 * point.L**2) * gap)

    def max_learning_rate(self) -> float:
        """Return the largest effective learning rate at which the teacher's direction is stable (Table 1, Prop. 3).

        To be compared with `effective_learning_rate`, not with the learning rate itself, on which it does not depend.
        For ReLU: ``2 + 4 zeta`` for BN, 2 for WN and SGD, so BN gains ``4 zeta`` (Prop. 4 says at least ``2 zeta``).
        For the identity: 2 for WN and SGD, ``2 + 2 zeta`` for BN.
        """
        gamma = self.fixed_point().gamma
        slope = derivatives(gamma, 1.0, self.activation)[1]
        return float(((gamma * slope.i3 - slope.i1) / gamma - self.zeta * gamma) / (slope.i2 / 2))

    def effective_learning_rate(self, gamma: Any = 1.0, L: Any = 1.0) -> Any:
        """Return the effective learning rate (Table 1): ``lr gamma / L^2`` for BN, ``lr / L^2`` for WN, ``lr`` for SGD.

        Args:
            gamma: Scale of the student, a number or an array.
            L: Length of its weights over sqrt(N), alike.
        """
        if self.method == "sgd":
            return np.full_like(L, self.lr, dtype=np.float64)[()]
        return self.lr * (gamma if self.method == "bn" else np.ones_like(gamma)) / L**2


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
