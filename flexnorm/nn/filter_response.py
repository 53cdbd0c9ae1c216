"""Filter response normalization with its thresholded linear unit."""

from __future__ import annotations

from typing import ClassVar, Unpack

import torch
from torch import Tensor, nn

from flexnorm.engine import Moments, Segments
from flexnorm.nn._base import Pair, Param, Placed, SampleStatistics


def filter_response(moments: Moments, weight: Param = None, bias: Param = None, *, eps: float | Tensor = 1e-6) -> Pair:
    """Filter response normalization (Singh & Krishnan 2020, eq. 1-2): mean square per sample and channel.

    ``eps`` is added to the mean square; a tensor (1,) or (C,) if it is learned (its absolute value is used).
    """
    scale = (moments.mean_square + (eps.abs() if isinstance(eps, Tensor) else eps)).rsqrt()
    scale = scale if weight is None else scale * weight
    return scale, torch.zeros_like(scale) if bias is None else bias


class _FilterResponseNorm(SampleStatistics):
    """Filter response normalization with its thresholded linear unit (Singh & Krishnan 2020, arXiv 1911.09737).

    ``y = max(weight * x / sqrt(mean(x^2) + |eps|) + bias, tau)``, the mean per sample and channel over the positions.

    Args:
        threshold: Whether to learn ``tau`` (C,), initialized to 0, and apply the thresholded linear unit. ``False``
            leaves the activation to another module; the default of :func:`make_norm`.
        learn_eps: Whether eps is a parameter ``learned_eps`` (1,), which the paper advises for 1x1 activations.
        **kwargs: ``bias``, ``device``, ``dtype``; these and the others as of :class:`flexnorm.FlexNorm`.
    """

    norm_name = "frn"
    pools_positions = True
    options = ("eps", "threshold", "learn_eps")
    defaults: ClassVar = {"threshold": False}
    tau: nn.Parameter | None
    learned_eps: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        affine: bool = True,
        *,
        threshold: bool = True,
        learn_eps: bool = False,
        bias: bool = True,
        **kwargs: Unpack[Placed],
    ) -> None:
        super().__init__(num_features, eps, affine, bias=bias, **kwargs)
        self.threshold, self.learn_eps = threshold, learn_eps
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        self.tau = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype)) if threshold else None
        self.learned_eps = nn.Parameter(torch.full((1,), eps, device=device, dtype=dtype)) if learn_eps else None

    def reset_parameters(self) -> None:
        """Set weight to 1, bias and tau to 0, and the learned eps to its initial value."""
        super().reset_parameters()
        for name, value in (("tau", 0.0), ("learned_eps", self.eps)):
            if (parameter := self._parameters.get(name)) is not None:
                nn.init.constant_(parameter, value)

    def rule(self, moments: Moments) -> Pair:
        """Divide each channel of each sample by its root mean square."""
        eps = self.eps if self.learned_eps is None else self.learned_eps
        return filter_response(moments, self.weight, self.bias, eps=eps)

    def forward(self, x: Tensor, mask: Tensor | None = None, segments: Segments | Tensor | None = None) -> Tensor:
        """Normalize ``x`` and apply the thresholded linear unit; arguments as of :meth:`flexnorm.FlexNorm.forward`."""
        y = super().forward(x, mask, segments)
        if self.tau is None:
            return y
        after = 0 if self.channel_axis == -1 else x.dim() - 2
        return torch.maximum(y, self.tau.to(y.dtype).view((-1,) + (1,) * after))


class FilterResponseNorm1d(_FilterResponseNorm, ndims=(2, 3)):
    """Filter response normalization of (N, C) or (N, C, L) input."""


class FilterResponseNorm2d(_FilterResponseNorm, ndims=(4,)):
    """Filter response normalization of (N, C, H, W) input."""


class FilterResponseNorm3d(_FilterResponseNorm, ndims=(5,)):
    """Filter response normalization of (N, C, D, H, W) input."""
