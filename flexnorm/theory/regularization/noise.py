"""The noise of batch statistics, sampled: what it adds to a loss, and draws of it for independent batches.

Noise that is independent of the sample must be compensated: ``E[1/sigma_B] > 1/sigma_P``, so that dividing by an
independent sigma_B inflates the output; at M = 32 and Gaussian values ``E[1/sigma_B^2] - 1 = 3/(M - 3) = 0.10``, six
times the ``1/(2M)`` that is to be imitated. A batch's own statistics do not inflate: their samples are in them. Here
the factor is divided by its mean, so that the noise leaves the expected output as it is and Eq. 3 of Luo et al. 2019
holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flexnorm._messages import unknown_name
from flexnorm.theory.regularization.zeta import PreactivationLoss, statistics_noise

_MODES = ("own", "independent", "uncompensated")
DISTRIBUTIONS: tuple[str, ...] = ("chi", "gaussian")
"""What `sample_noise` draws from."""


def inverse_std_bias(batch_size: float, kurtosis: float = 0.0) -> float:
    """Return ``E[1/sigma_B] sigma_P - 1``, the first-order inflation that uncompensated independent noise causes.

    For the gamma distribution of ``sigma_B^2`` with the mean and the variance ``(rho + 2)/M`` that the batch variance
    has to leading order; about ``3 (rho + 2)/(8 M)``.

    Args:
        batch_size: M, large enough for the variance ``(rho + 2)/M`` of ``sigma_B^2`` to be below 1.
        kurtosis: Excess kurtosis.

    Raises:
        ValueError: If the batch is too small for the moments to exist.

    Examples:
        >>> round(inverse_std_bias(32), 4)
        0.0242
    """
    return float(_mean_inverse(torch.tensor(_shape(batch_size, kurtosis + 2.0), dtype=torch.float64))) - 1.0


def _shape(batch_size: float, square_variance: float) -> float:
    statistics_noise(batch_size)
    shape = batch_size / max(square_variance, 1e-6)
    if shape <= 1.0:
        raise ValueError(
            f"batch_size {batch_size} is too small: the relative variance of the batch variance is {1 / shape:.3g}, "
            "not below 1"
        )
    return shape


def _mean_inverse(shape: Tensor) -> Tensor:
    """E[s^(-1/2)] for s ~ Gamma(shape) / shape."""
    return (torch.lgamma(shape - 0.5) - torch.lgamma(shape)).exp() * shape.sqrt()


def sample_noise(
    mean_variance: Tensor,
    square_variance: Tensor,
    batch_size: float,
    *,
    distribution: str = "chi",
    compensate: bool = True,
    rows: int = 1,
) -> tuple[Tensor, Tensor]:
    """Draw the factor r and the shift s of ``u -> r u + s``: what the statistics of an independent batch do to u.

    Args:
        mean_variance: V(m) of every channel, (C,): 1 for inputs (N, C).
        square_variance: V(q), (C,): ``rho + 2`` for inputs (N, C).
        batch_size: M.
        distribution: ``"chi"``: ``r = sigma_P / sigma_B`` with ``sigma_B^2`` gamma distributed (exactly that of
            Gaussian values up to the degrees of freedom M for M - 1) and ``s = -a r``. ``"gaussian"``: the expansion
            itself, ``r = 1 - b``, ``s = -a``.
        compensate: Whether r is divided by its mean (``"gaussian"`` has mean 1 as it is).
        rows: Number of independent draws.

    Returns:
        r and s, (rows, C) each, from torch's global random state.

    Raises:
        ValueError: For an unknown distribution or a batch that is too small.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(unknown_name("distribution", distribution, DISTRIBUTIONS))
    tables = mean_variance.expand(rows, -1)
    a = torch.randn_like(tables) * (mean_variance / batch_size).sqrt()
    if distribution == "gaussian":
        return 1.0 - torch.randn_like(tables) * (square_variance / (4.0 * batch_size)).sqrt(), -a
    _shape(batch_size, float(square_variance.max()))
    shape = batch_size / square_variance.clamp_min(1e-6)
    s = torch.distributions.Gamma(shape, shape).sample((rows,))
    r = s.rsqrt()
    if compensate:
        r = r / _mean_inverse(shape)
    return r, -a * r


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
