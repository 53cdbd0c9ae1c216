"""A perceptron of one layer under batch normalization and by the population: what the noise of a batch costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flexnorm._messages import unknown_name
from flexnorm.theory.regularization import PreactivationLoss

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
