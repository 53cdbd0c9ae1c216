r"""The closed form for Gaussians, $W_2^2=\|m_1-m_2\|^2+\mathrm{tr}(C_1+C_2-2 (C_1^{1/2} C_2 C_1^{1/2})^{1/2})$.

Gelbrich (1990): for any two distributions with these moments the same expression is a lower bound of W_2^2.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from flexnorm.transport.pair import check_points, safe_norm


def gaussian_wasserstein(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor) -> Tensor:
    r"""W_2 between two Gaussians, from their means and covariances.

    Computed in float64 (float32 on devices without it) and returned in the dtype of the arguments: the traces cancel
    where the two are close, and the root magnifies what is left. The trace of the square root is the sum of the
    singular values of $L_1^\top L_2$ with $C = L L^\top$: no square root of a matrix, and gradients that stay finite
    where eigenvalues coincide.

    Args:
        mean_x: (..., d).
        cov_x: (..., d, d) covariance, or (..., d) variances of independent coordinates.
        mean_y: (..., d).
        cov_y: Like ``cov_x``.

    Returns:
        (...).

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: Shapes or devices that do not fit, NaN or infinity, or a covariance that is not symmetric positive
            semi-definite.

    Examples:
        >>> zero = torch.zeros(2)
        >>> gaussian_wasserstein(zero, torch.eye(2), zero + 3, torch.eye(2))
        tensor(4.2426)
    """
    named = {"mean_x": mean_x, "cov_x": cov_x, "mean_y": mean_y, "cov_y": cov_y}
    for name, value in named.items():
        check_points(name, value)
    if len({value.device for value in named.values()}) > 1 or mean_x.device.type == "meta":
        where = ", ".join(f"{name} on {value.device}" for name, value in named.items())
        raise ValueError(f"means and covariances must be on one device that holds numbers, got {where}")
    for name, value in named.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} holds NaN or infinity")
    d = mean_x.shape[-1:]
    if mean_x.ndim < 1 or mean_y.shape[-1:] != d:
        raise ValueError(f"the means must have one length, got {tuple(mean_x.shape)} and {tuple(mean_y.shape)}")
    dtype = functools.reduce(torch.promote_types, (value.dtype for value in named.values()), torch.float32)
    wide = torch.float32 if mean_x.device.type == "mps" else torch.float64
    with torch.autocast(mean_x.device.type, enabled=False):
        return _distance(*(value.to(wide) for value in named.values())).to(dtype)


def _distance(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor) -> Tensor:
    d = mean_x.shape[-1:]
    gap = safe_norm(mean_x - mean_y)
    if cov_x.ndim == mean_x.ndim and cov_y.ndim == mean_y.ndim and cov_x.shape[-1:] == cov_y.shape[-1:] == d:
        if bool((cov_x < 0).any()) or bool((cov_y < 0).any()):
            raise ValueError("variances must not be negative")
        bures = (_root(cov_x) - _root(cov_y)).square().sum(-1)
    elif cov_x.shape[-2:] == cov_y.shape[-2:] == (*d, *d):
        cross = torch.linalg.svdvals(_factor(cov_x).mT @ _factor(cov_y)).sum(-1)
        traces = cov_x.diagonal(dim1=-2, dim2=-1).sum(-1) + cov_y.diagonal(dim1=-2, dim2=-1).sum(-1)
        bures = (traces - 2 * cross).clamp_min(0)
    else:
        raise ValueError(
            f"covariances must both be (..., {d[0]}, {d[0]}) or both (..., {d[0]}), "
            f"got {tuple(cov_x.shape)} and {tuple(cov_y.shape)}"
        )
    return _root(gap.square() + bures)


def _root(values: Tensor) -> Tensor:
    # The slope of the root at 0 is infinite; 0 times it would be NaN.
    zero = values == 0
    root: Tensor = torch.where(zero, values, torch.where(zero, torch.ones_like(values), values).sqrt())
    return root


def _factor(covariance: Tensor) -> Tensor:
    """L with L L^T = C: Cholesky's where C is positive definite, else from its eigenvectors."""
    if not torch.allclose(covariance, covariance.mT, atol=1e-6 * float(covariance.detach().abs().max())):
        raise ValueError("a covariance is not symmetric")
    lower: Tensor
    lower, info = torch.linalg.cholesky_ex(covariance)
    if not bool(info.any()):
        return lower
    values, vectors = torch.linalg.eigh(covariance)
    if bool((values < -1e-5 * values.abs().amax(-1, keepdim=True)).any()):
        raise ValueError(
            f"a covariance is not positive semi-definite; its smallest eigenvalue is {float(values.min()):.3g}"
        )
    factor: Tensor = vectors * _root(values.clamp_min(0)).unsqueeze(-2)
    return factor
