"""Unitized batch normalization: outputs of bounded norm, so that internal covariate shift is bounded without noise.

Huang & Yu, "Internal covariate shift bounding by unitizing layer outputs" (CVPR 2020, arXiv 2001.02814), the layer as
released by the authors, with these deviations:

* The biased variance enters the forward (the released code divides by m - 1 - eps there too); running variances are
  unbiased, as everywhere in torch.
* The inference branch uses running statistics and the sample's own norm, as the code intends but fails to do.
* eps defaults to torch's 1e-5 and momentum to torch's 0.1 (Keras: 1e-3 and 0.99, which torch calls 0.01).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flexnorm._messages import unknown_name
from flexnorm.engine import FlexNorm, Moments
from flexnorm.nn import rules
from flexnorm.nn.batch import _refuse_single_value

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["UnitizedBatchNorm1d", "UnitizedBatchNorm2d", "UnitizedBatchNorm3d"]


class _UnitizedBatchNorm(FlexNorm):
    """Unitized batch normalization (Huang & Yu 2020): batch normalization, then each sample towards unit norm.

    ``y = weight * xhat * (alpha / sqrt(s_n + eps) + 1 - alpha) + bias`` with xhat the standardized input and ``s_n``
    one squared norm per sample. ``alpha`` (C,) starts at 0, so that the layer starts as exact BatchNorm and learns how
    far to unitize. At alpha = 1, ``||y - bias||`` of a sample is at most ``max|weight|`` times P positions (times
    ``sqrt(C P)`` for ``norm="rms"``), whatever the noise of the batch statistics: the Earth Mover distance between two
    of its output distributions is at most the sum of the two bounds and of the distance of the biases.

    Args:
        num_features: Number of channels C of the input.
        eps: Added to variances and squared norms.
        momentum: Weight of the new batch in the running statistics; ``None`` for the cumulative average.
        affine: Whether to learn ``weight`` and ``bias``, each (C,). ``alpha`` is learned in any case.
        track_running_stats: Whether to keep running statistics for evaluation.
        norm: ``"paper"``: ``s_n = ||xhat_n||^2 / P^2`` for P positions. ``"rms"``: ``||xhat_n||^2 / (C P)``, which is
            about 1 whatever the shape, so that alpha does not rescale the layer.
        constrain_alpha: Clamp alpha to [0, 1] in the forward (the paper's code does not).
        bias: ``False`` leaves out the bias only.
        process_group: Pool the batch statistics over the processes of this group (any backend).
        device: Device of parameters and buffers.
        dtype: Type of the parameters.

    Raises:
        ValueError: For an unknown ``norm``; in training, if there is only one value per channel.
    """

    alpha: nn.Parameter

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        norm: str = "paper",
        constrain_alpha: bool = False,
        bias: bool = True,
        process_group: ProcessGroup | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if norm not in ("paper", "rms"):
            raise ValueError(unknown_name("norm of UnitizedBatchNorm", norm, ["paper", "rms"]))
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            bias=bias,
            process_group=process_group,
            device=device,
            dtype=dtype,
        )
        self.norm = norm
        self.constrain_alpha = constrain_alpha
        self.alpha = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Set weight to 1, bias and alpha to 0, and reset the running statistics."""
        super().reset_parameters()
        if "alpha" in self._parameters:
            nn.init.zeros_(self.alpha)

    def rule(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Standardize with batch (or running) statistics, then move each sample towards unit norm by alpha."""
        mean, var = self.statistics(moments)
        alpha = self.alpha.clamp(0, 1) if self.constrain_alpha else self.alpha
        return rules.unitize(moments, mean, var, self.weight, self.bias, alpha, eps=self.eps, norm=self.norm)

    def check_input(self, x: Tensor) -> None:
        """Refuse wrong shapes, and batches that have no statistics."""
        super().check_input(x)
        _refuse_single_value(self, x)

    def extra_repr(self) -> str:
        """Show the constructor arguments."""
        return f"{super().extra_repr()}, norm={self.norm!r}" + (
            ", constrain_alpha=True" if self.constrain_alpha else ""
        )


class UnitizedBatchNorm1d(_UnitizedBatchNorm):
    """Unitized batch normalization of (N, C) or (N, C, L) input."""

    ndims = (2, 3)


class UnitizedBatchNorm2d(_UnitizedBatchNorm):
    """Unitized batch normalization of (N, C, H, W) input."""

    ndims = (4,)


class UnitizedBatchNorm3d(_UnitizedBatchNorm):
    """Unitized batch normalization of (N, C, D, H, W) input."""

    ndims = (5,)
