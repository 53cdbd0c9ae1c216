r"""Generalization error of a perceptron that learns a noisy linear teacher, in the limit of many inputs.

Luo et al. 2019, Sec. 4. P = alpha N samples ``x ~ N(0, I/N)`` with labels ``y = w*^T x + s``, ``||w*||^2 = N``, noise
variance S. The error is ``E[(w*^T x - f(x))^2]`` on new samples without noise; predicting 0 has error 1.

Conventions and findings (docs/theory.md): zeta in G is a ridge beside the SUM of squares, ``sum (y - w x)^2 + zeta
||w||^2``, while the gamma decay of Eq. 2 stands beside their MEAN, ``mean (y - w x)^2 + zeta gamma^2``.
`ridge_strength` converts; the paper inserts ``1/(2M)`` without it. `sgd_relu` is exact for a linear regression on the
samples with positive label and only an approximation of a ReLU student, which does not diverge at alpha = 2.

In all functions ``alpha`` are the samples per input, positive, and ``noise`` is the variance S of the labels' noise,
not negative; a ``ValueError`` tells if an argument is out of range.
"""

from __future__ import annotations

import math


def _check(alpha: float, noise: float) -> None:
    if not alpha > 0:
        raise ValueError(f"alpha = samples / inputs must be positive, got {alpha}")
    if not noise >= 0:
        raise ValueError(f"noise is a variance and must not be negative, got {noise}")


def sgd_linear(alpha: float, noise: float = 0.0) -> float:
    """Return the error of a linear student trained by SGD from zero to the end: least squares of minimal norm.

    ``1 - alpha + alpha S/(1 - alpha)`` below alpha = 1 and ``S/(alpha - 1)`` above, infinite at 1 if there is noise.

    Examples:
        >>> sgd_linear(2.0, 0.25)
        0.25
    """
    _check(alpha, noise)
    if alpha < 1:
        return 1.0 - alpha + alpha * noise / (1.0 - alpha)
    if alpha == 1:
        return math.inf if noise else 0.0
    return noise / (alpha - 1.0)


def sgd_relu(alpha: float, noise: float = 0.0) -> float:
    """Return the printed error of a ReLU student under SGD, ``1 - alpha/4 + alpha S/(2 (2 - alpha))`` below alpha = 2.

    It is exact for ``relu(w^T x)`` with w the least squares fit of minimal norm to the samples with positive label. A
    ReLU student under gradient descent also learns from negative labels that its field must be negative there: its
    error is lower (:mod:`flexnorm.lab.simulations`), finite at alpha = 2 and close to 1/2 beyond. From alpha = 2 on the
    printed value is infinite if there is noise, else 1/2.
    """
    _check(alpha, noise)
    if alpha >= 2:
        return math.inf if noise else 0.5
    return 1.0 - alpha / 4.0 + alpha * noise / (2.0 * (2.0 - alpha))


def resolvent(alpha: float, zeta: float) -> float:
    """Return ``G = trace (X^T X + zeta)^-1 / N``, the function G of the paper (Marchenko-Pastur).

    ``G = [1 - alpha - zeta + sqrt(zeta + (1 + sqrt(alpha))^2) sqrt(zeta + (1 - sqrt(alpha))^2)] / (2 zeta)`` with the
    ridge ``zeta``, positive.
    """
    _check(alpha, 0.0)
    if not zeta > 0:
        raise ValueError(f"zeta must be positive, got {zeta}")
    high, low = zeta + (1 + math.sqrt(alpha)) ** 2, zeta + (1 - math.sqrt(alpha)) ** 2
    return (1.0 - alpha - zeta + math.sqrt(high * low)) / (2.0 * zeta)


def gamma_decay_linear(alpha: float, zeta: float, noise: float = 0.0) -> float:
    """Return the error of a linear student under WN and gamma decay: ``S d(zeta G)/d zeta - zeta^2 dG/d zeta``.

    Args:
        alpha: Samples per input.
        zeta: Decay in the convention of G, a ridge beside the sum of squares; for a gamma decay beside the mean, such
            as the ``1/(2M)`` of BN, give ``ridge_strength(zeta, alpha)``. Positive; the limit 0 is `sgd_linear`.
        noise: Variance S.
    """
    _check(alpha, noise)
    g = resolvent(alpha, zeta)
    high, low = zeta + (1 + math.sqrt(alpha)) ** 2, zeta + (1 - math.sqrt(alpha)) ** 2
    root_slope = (high + low) / (2.0 * math.sqrt(high * low))
    slope = (root_slope - 1.0) / (2.0 * zeta) - g / zeta
    return noise * (g + zeta * slope) - zeta**2 * slope


def ridge_strength(zeta: float, alpha: float) -> float:
    """Return the ridge beside the sum of squares that a gamma decay beside their mean amounts to: ``alpha zeta``.

    ``mean (y - w x)^2 + zeta ||w||^2 / N`` times P is ``sum (y - w x)^2 + alpha zeta ||w||^2``.
    """
    return alpha * zeta


def optimum(noise: float) -> float:
    """Return the zeta (in the convention of G) with the least error, at every alpha: the variance of the noise.

    That is so for a teacher of unit variance per weight.
    """
    _check(1.0, noise)
    return noise
