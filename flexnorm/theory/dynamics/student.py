"""A perceptron that learns a teacher under BN, WN or SGD: its equations of motion, where they rest, what is stable.

Luo et al. 2019, Sec. 3, Propositions 1 to 4 and Table 1. The teacher is ``g(w*^T x)`` with ``||w*||^2 = N`` and
``x ~ N(0, I/N)``. Order parameters: gamma, the overlap ``R`` of student and teacher, ``L^2 = w^T w / N``. Time is
samples seen divided by N.

Conventions and deviations: ``lr`` is the paper's eta, which multiplies half the gradient of ``(g - g*)^2 + zeta
gamma^2``. For the limit of Eq. 6 to exist, the step of gamma must be ``lr / N`` and not ``lr`` as the update of Eq. 5
reads: the gradient with respect to gamma does not shrink with N, and with ``lr`` gamma would move by O(1) at every
sample.

What the printed propositions leave out (see docs/theory.md): with zeta > 0 the averages I2 at the "fixed point" is not
zero, so L keeps growing and R = 1 is approached only as the effective learning rate falls to zero. The printed
eigenvalue of R also drops the term with I2 itself (of order zeta^2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexnorm._messages import optional, unknown_name
from flexnorm.theory.dynamics.averages import Activation, activation_function, averages, derivatives

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
