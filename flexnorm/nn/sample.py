"""Normalizations of single samples by their mean square: RMS and filter response normalization."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flexnorm.engine import FlexNorm, Moments
from flexnorm.nn import rules

__all__ = [
    "FilterResponseNorm1d",
    "FilterResponseNorm2d",
    "FilterResponseNorm3d",
    "RMSNorm1d",
    "RMSNorm2d",
    "RMSNorm3d",
]


class _RMSNorm(FlexNorm):
    """Root mean square normalization (Zhang & Sennrich 2019) over channels and positions, no mean subtracted.

    Args:
        num_features: Number of channels C of the input.
        eps: Added to the mean square.
        affine: Whether to learn ``weight`` (C,).
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, None, affine, False, bias=False, device=device, dtype=dtype)

    def rule(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Divide each sample by its root mean square."""
        return rules.rms(moments, self.weight, eps=self.eps)

    def extra_repr(self) -> str:
        """Show the constructor arguments."""
        return f"{self.num_features}, eps={self.eps}, affine={self.affine}"


class RMSNorm1d(_RMSNorm):
    """Root mean square normalization of (N, C) or (N, C, L) input."""

    ndims = (2, 3)


class RMSNorm2d(_RMSNorm):
    """Root mean square normalization of (N, C, H, W) input."""

    ndims = (4,)


class RMSNorm3d(_RMSNorm):
    """Root mean square normalization of (N, C, D, H, W) input."""

    ndims = (5,)


class _FilterResponseNorm(FlexNorm):
    """Filter response normalization with its thresholded linear unit (Singh & Krishnan 2020, arXiv 1911.09737).

    ``y = max(weight * x / sqrt(mean(x^2) + |eps|) + bias, tau)``, the mean per sample and channel over the positions.

    Args:
        num_features: Number of channels C of the input.
        eps: Added to the mean square.
        affine: Whether to learn ``weight`` and ``bias``, each (C,).
        threshold: Whether to learn ``tau`` (C,), initialized to 0, and apply the thresholded linear unit. ``False``
            leaves the activation to another module.
        learn_eps: Whether eps is a parameter ``learned_eps`` (1,), which the paper advises for 1x1 activations.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, None, affine, False, device=device, dtype=dtype)
        self.tau = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype)) if threshold else None
        self.learned_eps = nn.Parameter(torch.full((1,), eps, device=device, dtype=dtype)) if learn_eps else None

    def reset_parameters(self) -> None:
        """Set weight to 1, bias and tau to 0, and the learned eps to its initial value."""
        super().reset_parameters()
        if self._parameters.get("tau") is not None:
            nn.init.zeros_(self._parameters["tau"])  # type: ignore[arg-type]
        if self._parameters.get("learned_eps") is not None:
            nn.init.constant_(self._parameters["learned_eps"], self.eps)  # type: ignore[arg-type]

    def rule(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Divide each channel of each sample by its root mean square."""
        eps = self.eps if self.learned_eps is None else self.learned_eps
        return rules.filter_response(moments, self.weight, self.bias, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` and apply the thresholded linear unit."""
        y = super().forward(x)
        if self.tau is None:
            return y
        return torch.maximum(y, self.tau.to(y.dtype).view((1, -1) + (1,) * (x.dim() - 2)))

    def extra_repr(self) -> str:
        """Show the constructor arguments."""
        return (
            f"{self.num_features}, eps={self.eps}, affine={self.affine}, threshold={self.tau is not None}, "
            f"learn_eps={self.learned_eps is not None}"
        )


class FilterResponseNorm1d(_FilterResponseNorm):
    """Filter response normalization of (N, C) or (N, C, L) input."""

    ndims = (2, 3)


class FilterResponseNorm2d(_FilterResponseNorm):
    """Filter response normalization of (N, C, H, W) input."""

    ndims = (4,)


class FilterResponseNorm3d(_FilterResponseNorm):
    """Filter response normalization of (N, C, D, H, W) input."""

    ndims = (5,)
