"""Pooling between NormProp layers: as in the paper (no correction), or standardized under a stated correlation.

The paper pools the standardized activation and does not standardize again, because the units of a window are highly
correlated. ``correlation=1`` gives back the uncorrected pooling, exactly.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from flexnorm.engine import Checked
from flexnorm.nn.normprop.checks import Spatial, positive, sizes
from flexnorm.nn.normprop.conv import Size
from flexnorm.nn.normprop.elementwise import ActivationLike, resolve_activation
from flexnorm.nn.normprop.integrals import activation_moments, initial_affine

_NODES = 401
_LIMIT = 8.5
_AVERAGE = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_MAXIMUM = (F.max_pool1d, F.max_pool2d, F.max_pool3d)


def _check_correlation(correlation: float) -> float:
    if not 0 <= correlation <= 1:
        raise ValueError(f"correlation must lie in [0, 1], got {correlation!r}")
    return float(correlation)


def max_pool_moments(
    k: int, correlation: float = 0.0, activation: ActivationLike | None = None, gamma: float = 1.0, bias: float = 0.0
) -> tuple[float, float]:
    """Mean and variance of the maximum of k standardized units of equal pairwise correlation.

    Args:
        k: Number of units, at least 1.
        correlation: Pairwise correlation of the pre-activations, in [0, 1].
        activation: Increasing activation of the units; None for Gaussian units.
        gamma: Positive scale of the pre-activations.
        bias: Shift of the pre-activations.

    Returns:
        Mean and variance as Python floats.

    Raises:
        ValueError: For arguments out of range.

    Examples:
        >>> mean, var = max_pool_moments(4)
        >>> round(mean, 3), round(var**0.5, 3)
        (1.029, 0.701)
    """
    positive("k", k)
    rho = _check_correlation(correlation)
    if not gamma > 0:
        raise ValueError(f"gamma must be positive, got {gamma!r}; the maximum of decreasing units is a minimum")
    with torch.no_grad(), torch.device("cpu"):
        x = torch.linspace(-_LIMIT, _LIMIT, _NODES, dtype=torch.float64)
        density = torch.exp(-0.5 * x * x)
        # In logarithms: Phi(x)^(k-1) underflows for the large windows of global pooling.
        largest = torch.exp(torch.special.log_ndtr(x) * (k - 1)) * density
        common, largest = density / density.sum(), largest / largest.sum()
        z = math.sqrt(rho) * x.unsqueeze(1) + math.sqrt(1 - rho) * x
        resolved = resolve_activation(activation)
        y = z
        if resolved is not None:
            mean, var = activation_moments(resolved, gamma, bias)
            y = (resolved(gamma * z + bias) - mean) / var.sqrt()
        weight = common.unsqueeze(1) * largest
        center = float((weight * y).sum())
        return center, float((weight * (y - center).square()).sum())


def average_pool_variance(k: int, correlation: float = 0.0) -> float:
    """Return ``(1 + (k - 1) correlation) / k``, the variance of the average of k equally correlated units."""
    return (1 + (positive("k", k) - 1) * _check_correlation(correlation)) / k


@torch.no_grad()
def window_correlation(x: Tensor, kernel_size: Size) -> float:
    """Average pairwise correlation of the units inside pooling windows, measured on feature maps.

    From the variance of window averages, ``rho = (k var(average) / var - 1) / (k - 1)``, per channel and then averaged.

    Args:
        x: ``(N, C, *spatial)`` feature maps, 1 to 3 spatial axes.
        kernel_size: The window; windows do not overlap.

    Raises:
        ValueError: If the window has one unit only.
    """
    spatial = x.dim() - 2
    kernel = sizes("kernel_size", kernel_size, spatial, 1)
    k = math.prod(kernel)
    if k < 2:
        raise ValueError("a window of one unit has no pairs")
    axes = [0, *range(2, x.dim())]
    pooled = _AVERAGE[spatial - 1](x.double(), kernel)
    ratio = pooled.var(axes, correction=0) / x.double().var(axes, correction=0)
    return float(((k * ratio - 1) / (k - 1)).mean())


class PoolLayer(Spatial, Checked):
    """What average and maximum pooling share; the arguments are those of :class:`NormPropAvgPool`."""

    def __init__(
        self,
        kernel_size: Size | None = None,
        stride: Size | None = None,
        padding: Size = 0,
        *,
        ceil_mode: bool = False,
        correlation: float | None = None,
    ) -> None:
        super().__init__()
        self.over_all = kernel_size is None
        self.kernel_size = sizes("kernel_size", 1 if kernel_size is None else kernel_size, self.spatial, 1)
        self.stride = self.kernel_size if stride is None else sizes("stride", stride, self.spatial, 1)
        self.padding = sizes("padding", padding, self.spatial)
        self.ceil_mode = bool(ceil_mode)
        self.correlation = None if correlation is None else _check_correlation(correlation)

    def extra_repr(self) -> str:
        """Arguments as given."""
        if self.over_all:
            return f"kernel_size=None, correlation={self.correlation}"
        text = f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"
        return text + f", ceil_mode={self.ceil_mode}, correlation={self.correlation}"


class NormPropAvgPool(PoolLayer):
    """Average pooling of standardized units; used as ``NormPropAvgPool1d``, ``2d`` and ``3d``.

    Takes ``(N, C, *spatial)`` or ``(C, *spatial)``.

    Args:
        kernel_size: The window; None for the average over all positions.
        stride: Step; None for the window's size.
        padding: Positions outside the input on both sides; they are not counted in the average.
        ceil_mode: Round the output size up.
        correlation: None: as in the paper, no correction. A number in [0, 1]: divide by the standard deviation of the
            average of units with that pairwise correlation (0: independent units, the largest correction; 1: none).

    Raises:
        ValueError: For sizes or a correlation out of range.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the window averages, standardized if a correlation was stated."""
        if self.over_all:
            y = x.mean(tuple(range(-self.spatial, 0)), keepdim=True)
            k = math.prod(x.shape[-self.spatial :])
        else:
            # Padding is not counted: an average over fewer units keeps its mean.
            pool, k = _AVERAGE[self.spatial - 1], math.prod(self.kernel_size)
            y = pool(x, self.kernel_size, self.stride, self.padding, self.ceil_mode, count_include_pad=False)
        return y if self.correlation is None else y * average_pool_variance(k, self.correlation) ** -0.5


class NormPropMaxPool(PoolLayer):
    """Maximum pooling of standardized units; used as ``NormPropMaxPool1d``, ``2d`` and ``3d``.

    Args:
        kernel_size: As of :class:`NormPropAvgPool`, with a window.
        stride: As of :class:`NormPropAvgPool`, with a window.
        padding: As of :class:`NormPropAvgPool`, with a window.
        ceil_mode: As of :class:`NormPropAvgPool`, with a window.
        correlation: None: as in the paper, no correction. A number in [0, 1]: standardize by mean and standard
            deviation of the maximum of units with that pairwise correlation of their pre-activations
            (:func:`max_pool_moments`).
        activation: Activation of the units that are pooled; None for Gaussian units. Only used with ``correlation``.
        init: Whose gamma and bias the constants are computed for, ``"stable"`` or ``"paper"``.
    """

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        *,
        ceil_mode: bool = False,
        correlation: float | None = None,
        activation: ActivationLike | None = "relu",
        init: str = "stable",
    ) -> None:
        super().__init__(kernel_size, stride, padding, ceil_mode=ceil_mode, correlation=correlation)
        self.mean, self.std = 0.0, 1.0
        if self.correlation is not None:
            resolved = resolve_activation(activation)
            gamma, bias = initial_affine(resolved, init)
            self.mean, var = max_pool_moments(math.prod(self.kernel_size), self.correlation, resolved, gamma, bias)
            self.std = math.sqrt(var)

    def forward(self, x: Tensor) -> Tensor:
        """Return the window maxima, standardized if a correlation was stated."""
        y = _MAXIMUM[self.spatial - 1](x, self.kernel_size, self.stride, self.padding, ceil_mode=self.ceil_mode)
        return y if self.correlation is None else (y - self.mean) * (1 / self.std)


class NormPropAvgPool1d(NormPropAvgPool, spatial=1):
    """:class:`NormPropAvgPool` of signals."""


class NormPropAvgPool2d(NormPropAvgPool, spatial=2):
    """:class:`NormPropAvgPool` of images."""


class NormPropAvgPool3d(NormPropAvgPool, spatial=3):
    """:class:`NormPropAvgPool` of volumes."""


class NormPropMaxPool1d(NormPropMaxPool, spatial=1):
    """:class:`NormPropMaxPool` of signals."""


class NormPropMaxPool2d(NormPropMaxPool, spatial=2):
    """:class:`NormPropMaxPool` of images."""


class NormPropMaxPool3d(NormPropMaxPool, spatial=3):
    """:class:`NormPropMaxPool` of volumes."""
