r"""The strength zeta of the regularization that batch statistics exert, as printed and in general.

Luo et al. 2019, Eq. 3. With ``u = (h - mu_P) / sigma_P`` and the noise ``a = (mu_B - mu_P) / sigma_P``, ``b = sigma_B /
sigma_P - 1`` of the batch statistics, the normalized pre-activation moves from ``gamma u + beta`` by ``d = -gamma (a +
u b)`` to first order. The loss gains ``E[l'' d^2] / 2 = zeta gamma^2`` with

    zeta = E[l''] Var(a) / 2 + E[l'' u^2] Var(b) / 2 + E[l'' u] Cov(a, b)
    Var(a) = 1 / M,   Var(b) = (rho + 2) / (4 M),   Cov(a, b) = skewness / (2 M)

where ``l''`` is the curvature of the loss at the normalized pre-activation and rho the excess kurtosis of h. The
printed form has ``l'' = sigmoid`` in the first term, ``E[l'' u^2] = I(gamma)`` in the second and no third one (it is
zero for symmetric h). Derivation and the limits of the expansion: docs/theory.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flexnorm._messages import unknown_name

PreactivationLoss = Callable[[Tensor, Tensor], Tensor]
"""``loss(h_hat, u)``: the loss of every sample, shape (P,), from the normalized pre-activation h_hat and the
standardized pre-activation u, both (P,); u may carry the label."""

CURVATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": torch.ones_like,
    "sigmoid": torch.sigmoid,
    "relu": lambda h: (h > 0).to(h.dtype),
}
"""Curvature of a negative log-likelihood whose mean function is the identity, softplus (the paper's smoothed ReLU), or
ReLU."""


class StatisticsNoise(NamedTuple):
    """Second moments of the noise of batch statistics, in units of the population's standard deviation.

    Attributes:
        mean: ``Var(mu_B) / sigma_P^2``.
        std: ``Var(sigma_B) / sigma_P^2``.
        covariance: ``Cov(mu_B, sigma_B) / sigma_P^2``.
    """

    mean: float
    std: float
    covariance: float = 0.0


class Curvature(NamedTuple):
    """Curvature of the loss with respect to a shared shift and a shared scale of the normalized pre-activation.

    Attributes:
        shift: ``E[l'']``; as a Fisher information that of beta, ``I(beta)``.
        scale: ``E[l'' u^2]``; as a Fisher information that of gamma, ``I(gamma)``.
        cross: ``E[l'' u]``.
    """

    shift: float
    scale: float
    cross: float = 0.0


def statistics_noise(batch_size: float, kurtosis: float = 0.0, skewness: float = 0.0) -> StatisticsNoise:
    """Return the noise of the mean and the standard deviation of ``batch_size`` independent values, to leading order.

    The paper prints ``Var(sigma_B) = (rho + 2)/(4M)``; it holds in units of ``sigma_P^2`` and with rho the EXCESS
    kurtosis.

    Args:
        batch_size: M, at least 2; may be an effective number of values.
        kurtosis: Excess kurtosis rho of h, at least -2; 0 for a Gaussian.
        skewness: Of h; 0 for anything symmetric.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> statistics_noise(32).std == 1 / 64
        True
    """
    if not batch_size >= 2:
        raise ValueError(f"batch_size must be at least 2, got {batch_size}")
    if not kurtosis >= -2:
        raise ValueError(f"excess kurtosis cannot be below -2, got {kurtosis}")
    return StatisticsNoise(1.0 / batch_size, (kurtosis + 2.0) / (4.0 * batch_size), skewness / (2.0 * batch_size))


def zeta(curvature: Curvature, noise: StatisticsNoise, *, mean: bool = True, variance: bool = True) -> float:
    """Return zeta, the strength of the gamma decay that the noise of the batch statistics amounts to.

    Args:
        curvature: Of the loss, see `curvature` for a perceptron and `layer_strength` for a network.
        noise: Of the statistics.
        mean: Whether the batch mean is used (False for variance-only BN).
        variance: Whether the batch variance is used (False for mean-only BN).

    Returns:
        The factor of ``gamma^2`` in the expected loss.

    Examples:
        >>> zeta(Curvature(1.0, 1.0), statistics_noise(32), mean=False)  # linear student, half the square
        0.0078125
    """
    alone = 0.5 * curvature.shift * noise.mean * mean + 0.5 * curvature.scale * noise.std * variance
    return alone + curvature.cross * noise.covariance * (mean and variance)


def zeta_printed(
    preactivation: Tensor,
    batch_size: float,
    *,
    score: Tensor | None = None,
    kurtosis: float = 0.0,
    curvature: str = "sigmoid",
    gamma: float = 1.0,
    beta: float = 0.0,
) -> Tensor:
    """Return zeta(h) as Eq. 3 prints it: ``(rho + 2)/(8M) I(gamma) + mean(sigmoid(h))/(2M)``.

    Args:
        preactivation: ``h_bar = gamma (h - mu_P)/sigma_P + beta`` of P samples, shape (P, *).
        batch_size: M, at least 2.
        score: ``d loss / d gamma`` of every sample, of the shape of `preactivation`; its mean square is I(gamma). By
            default I(gamma) is taken as ``mean(curvature (h_bar - beta)^2 / gamma^2)``, its expected value.
        kurtosis: Excess kurtosis rho of h.
        curvature: ``"sigmoid"`` as printed; ``"relu"``, its unsmoothed limit, and ``"identity"`` for special values.
        gamma: Scale in h_bar; needed without `score`, as is `beta`.
        beta: Shift in h_bar.

    Returns:
        Shape (*): the mean is over the first axis, so trailing axes may hold channels.

    Raises:
        ValueError: If the batch size, the kurtosis or the name of the curvature is not valid.
    """
    noise = statistics_noise(batch_size, kurtosis)
    if curvature not in CURVATURES:
        raise ValueError(unknown_name("curvature", curvature, CURVATURES))
    bend = CURVATURES[curvature](preactivation)
    information = ((preactivation - beta) / gamma).square() * bend if score is None else score.square()
    return 0.5 * noise.std * information.mean(0) + 0.5 * noise.mean * bend.mean(0)


def special_zeta(activation: str, batch_size: float) -> float:
    """Return the zeta of the paper's students: ``1/(2M)`` for a linear one, ``1/(4M)`` for ReLU.

    For Gaussian h, the loss ``(y - y_hat)^2`` without one half, and the batch variance only.

    Args:
        activation: ``"identity"`` or ``"relu"``.
        batch_size: M, at least 2.

    Raises:
        ValueError: For another activation or a batch size below 2.
    """
    known = {"identity": 2.0, "relu": 4.0}
    if activation not in known:
        raise ValueError(unknown_name("activation", activation, known))
    statistics_noise(batch_size)
    return 1.0 / (known[activation] * batch_size)


def curvature(loss: PreactivationLoss, u: Tensor, gamma: float = 1.0, beta: float = 0.0) -> Curvature:
    """Return the curvature of a loss of a single-layer perceptron, averaged over its standardized pre-activation.

    Args:
        loss: ``loss(h_hat, u)``, shape (P,) each, twice differentiable almost everywhere. A kink contributes only where
            the slope jumps, which autograd does not see; ``(y - relu(h))^2`` has none on average if ``E[y | h = 0] =
            0``.
        u: Standardized pre-activations, shape (P,), float64 for an accurate answer.
        gamma: Scale.
        beta: Shift.

    Returns:
        The averages of ``l''``, ``l'' u^2`` and ``l'' u``.
    """
    _, bend = _slope_and_curvature(loss, u, gamma, beta)
    return Curvature(float(bend.mean()), float((bend * u.square()).mean()), float((bend * u).mean()))


def own_batch_term(
    loss: PreactivationLoss,
    u: Tensor,
    batch_size: float,
    gamma: float = 1.0,
    beta: float = 0.0,
    *,
    mean: bool = True,
    variance: bool = True,
) -> float:
    r"""Return the first-order term that Eq. 3 leaves out: a sample pulls its own batch's statistics.

    ``E[d | u] = gamma [u (3 (rho + 2)/8 - u^2/2) + skewness/2] / M`` is not zero, so that the expected loss over real
    batches is

        E[loss(BN)] - loss(PN) = zeta gamma^2 + E[l' E[d | u]] + O(1/M^2)

    For a label that is linear in a Gaussian h it does nothing but rescale gamma by ``E[sigma_B] / sigma_P``; see
    docs/theory.md.

    Args:
        loss: As for `curvature`.
        u: Standardized pre-activations, shape (P,); kurtosis and skewness are taken from them.
        batch_size: M, at least 2.
        gamma: Scale.
        beta: Shift.
        mean: Whether the batch mean is used; if not, ``E[d | u] = gamma u (3 (rho + 2)/8 + 1 - u^2/2) / M``.
        variance: Whether the batch variance is used; if not, ``E[d | u] = -gamma u / M``.

    Returns:
        The term, to be added to ``zeta gamma^2``.
    """
    statistics_noise(batch_size)
    slope, _ = _slope_and_curvature(loss, u, gamma, beta)
    pull = torch.zeros_like(u)
    if variance:
        pull = pull + u * (0.375 * (u.pow(4).mean() - 1.0) + 1.0 - 0.5 * u.square())
    if mean:
        pull = pull - u
    if mean and variance:
        pull = pull + 0.5 * u.pow(3).mean()
    return float((slope * pull).mean()) * gamma / batch_size


def _slope_and_curvature(loss: PreactivationLoss, u: Tensor, gamma: float, beta: float) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        h = (gamma * u.detach() + beta).requires_grad_()
        (slope,) = torch.autograd.grad(loss(h, u).sum(), h, create_graph=True)
        if not slope.requires_grad:
            return slope, torch.zeros_like(u)
        (bend,) = torch.autograd.grad(slope.sum(), h, allow_unused=True)
    return slope.detach(), torch.zeros_like(u) if bend is None else bend
