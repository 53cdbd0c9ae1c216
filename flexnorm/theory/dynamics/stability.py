"""Fixed points of the dynamics, the eigenvalues there, and the largest learning rate that keeps them stable.

Luo et al. 2019, Propositions 1 to 4 and Table 1.

What the printed propositions leave out (see docs/theory.md): with zeta > 0 the averages I2 at the "fixed point" is not
zero, so L keeps growing and R = 1 is approached only as the effective learning rate falls to zero. The printed
eigenvalue of R also drops the term with I2 itself (of order zeta^2); `eigenvalues` gives the printed one and the one of
the whole Jacobian.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexnorm.theory.dynamics.averages import Activation, averages, derivatives
from flexnorm.theory.dynamics.ode import check, effective, rates

__all__ = [
    "FixedPoint",
    "effective_learning_rate",
    "eigenvalues",
    "fixed_point",
    "jacobian",
    "max_learning_rate",
    "printed_eigenvalue",
]


@dataclass(frozen=True)
class FixedPoint:
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


def fixed_point(
    method: str = "bn", activation: Activation = "relu", zeta: float = 0.0, L: float = 1.0, lr: float = 0.1
) -> FixedPoint:
    """Return the fixed point in the direction of the teacher (Luo et al. 2019, Prop. 1).

    Args:
        method: ``"bn"``, ``"wn"`` or ``"sgd"``.
        activation: See `averages`. Without closed form, the root of ``I1(gamma, 1) = zeta gamma^2`` in (0, 1] is
            sought.
        zeta: Gamma decay, for ``"bn"``.
        L: Length of the weights; free for BN and WN, not used for SGD.
        lr: Learning rate; only the drift depends on it.

    Returns:
        The point and the drift of L there.

    Raises:
        ValueError: For an argument out of range, or if no root exists in (0, 1].
    """
    zeta = check(method, activation, lr, zeta)
    if method == "sgd":
        L = 1.0
    gamma = 1.0 if zeta == 0 else _decayed_gamma(activation, zeta)
    return FixedPoint(gamma, 1.0, L, float(rates([gamma, 1.0, L], method, activation, lr, zeta)[2]))


def _decayed_gamma(activation: Activation, zeta: float) -> float:
    if activation == "relu":
        return 1.0 / (2.0 * zeta + 1.0)
    if activation == "identity":
        return 1.0 / (zeta + 1.0)
    from scipy.optimize import brentq

    def pull(gamma: float) -> float:
        return averages(gamma, 1.0, activation).i1 / gamma - zeta * gamma

    low = 1e-3
    if pull(low) <= 0:
        raise ValueError(f"gamma decays to zero: no fixed point above {low} for zeta={zeta} with this activation")
    return float(brentq(pull, low, 1.0, xtol=1e-14))


def jacobian(
    method: str = "bn", activation: Activation = "relu", lr: float = 0.1, zeta: float = 0.0, L: float = 1.0
) -> NDArray[np.float64]:
    """Return the Jacobian of ``(gamma, R, L)`` at the fixed point.

    Args:
        method: ``"bn"``, ``"wn"`` or ``"sgd"``. For ``"sgd"`` gamma is L, so that row and column are left out.
        activation: See `averages`.
        lr: The paper's eta.
        zeta: Gamma decay, for ``"bn"``.
        L: Length of the weights at which to look (BN, WN).

    Returns:
        Shape (3, 3) in the order gamma, R, L; for ``"sgd"`` (2, 2) in the order R, L. The derivative by R is from
        below.

    Raises:
        ValueError: For an argument out of range.
    """
    zeta = check(method, activation, lr, zeta)
    point = fixed_point(method, activation, zeta, L, lr)
    g, R, L = point.gamma, 1.0, point.L
    m = averages(g, R, activation)
    by_gamma, by_R = derivatives(g, R, activation)
    if method == "sgd":  # here gamma = L = 1 and I1 = I2 = I3 = 0, so only their derivatives remain
        dL_R, dL_L = (lr * d.i1 + lr**2 * d.i2 / 2 for d in (by_R, by_gamma))
        return np.array([[lr * by_R.i3 - dL_R, lr * by_gamma.i3 - dL_L], [dL_R, dL_L]])
    c, k = lr / L**2, lr**2 * g / (2 * L**4)
    return np.array(
        [
            [lr * (by_gamma.i1 / g - m.i1 / g**2) - lr * zeta, lr * by_R.i1 / g, 0.0],
            [
                c * (m.i3 + g * by_gamma.i3 - by_gamma.i1) - k * (2 * m.i2 + g * by_gamma.i2),
                c * (g * by_R.i3 - m.i1 - by_R.i1) - k * g * (m.i2 + by_R.i2),
                -2 * c * (g * m.i3 - m.i1) / L + 4 * k * g * m.i2 / L,
            ],
            [k * L * (2 * m.i2 + g * by_gamma.i2), k * L * g * by_R.i2, -3 * k * g * m.i2],
        ]
    )


def eigenvalues(
    method: str = "bn", activation: Activation = "relu", lr: float = 0.1, zeta: float = 0.0, L: float = 1.0
) -> NDArray[np.complex128]:
    """Return the eigenvalues of `jacobian`, ascending by real part.

    The point is stable where no real part is positive; without decay BN and WN have one zero eigenvalue, that of the
    free L. Takes and raises what `jacobian` does. Returns shape (3,), for ``"sgd"`` (2,).
    """
    values = np.linalg.eigvals(jacobian(method, activation, lr, zeta, L)).astype(np.complex128)
    return np.asarray(values[np.argsort(values.real)])


def printed_eigenvalue(
    method: str = "bn", activation: Activation = "relu", lr: float = 0.1, zeta: float = 0.0, L: float = 1.0
) -> float:
    """Return lambda_R of Prop. 2: ``(dI2/dR) (lr gamma0 / (2 L^2)) (max_learning_rate - effective_learning_rate)``.

    Takes and raises what `jacobian` does. It equals the diagonal entry of R of the Jacobian without decay, and up to
    ``lr^2 gamma0^2 I2 / (2 L^4) = O(zeta^2)`` with it.
    """
    point = fixed_point(method, activation, zeta, L, lr)
    slope = derivatives(point.gamma, 1.0, activation)[1].i2
    gap = max_learning_rate(method, activation, zeta) - effective_learning_rate(method, lr, point.gamma, point.L)
    return float(slope * lr * point.gamma / (2 * point.L**2) * gap)


def max_learning_rate(method: str = "bn", activation: Activation = "relu", zeta: float = 0.0) -> float:
    """Return the largest effective learning rate at which the teacher's direction is stable (Table 1, Prop. 3).

    For ReLU: ``2 + 4 zeta`` for BN, 2 for WN and SGD, so BN gains ``4 zeta`` (Prop. 4 says at least ``2 zeta``). For
        the identity:
    2 for WN and SGD, ``2 + 2 zeta`` for BN.

    Args:
        method: ``"bn"``, ``"wn"`` or ``"sgd"``.
        activation: See `averages`.
        zeta: Gamma decay, for ``"bn"``.

    Returns:
        The bound, to be compared with `effective_learning_rate`, not with the learning rate itself.

    Raises:
        ValueError: For an argument out of range.
    """
    gamma = fixed_point(method, activation, zeta).gamma
    slope = derivatives(gamma, 1.0, activation)[1]
    return float(((gamma * slope.i3 - slope.i1) / gamma - zeta * gamma) / (slope.i2 / 2))


def effective_learning_rate(method: str, lr: float, gamma: float = 1.0, L: float = 1.0) -> float:
    """Return the effective learning rate (Table 1): ``lr gamma / L^2`` for BN, ``lr / L^2`` for WN, ``lr`` for SGD.

    Args:
        method: ``"bn"``, ``"wn"`` or ``"sgd"``.
        lr: The paper's eta.
        gamma: Scale of the student.
        L: Length of its weights over sqrt(N).

    Raises:
        ValueError: For an unknown method or a learning rate that is not positive.
    """
    check(method, "relu", lr, 0.0)
    return float(effective(method, lr, np.array([gamma], dtype=float), np.array([L], dtype=float))[0])
