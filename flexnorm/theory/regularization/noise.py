"""Draws of the noise of batch statistics, for independent batches.

Noise that is independent of the sample must be compensated: ``E[1/sigma_B] > 1/sigma_P``, so that dividing by an
independent sigma_B inflates the output; at M = 32 and Gaussian values ``E[1/sigma_B^2] - 1 = 3/(M - 3) = 0.10``, six
times the ``1/(2M)`` that is to be imitated. A batch's own statistics do not inflate: their samples are in them. Here
the factor is divided by its mean, so that the noise leaves the expected output as it is and Eq. 3 of Luo et al. 2019
holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexnorm._messages import unknown_name
from flexnorm.theory.regularization.zeta import statistics_noise

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
