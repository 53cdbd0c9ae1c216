"""Unitized batch normalization: outputs of bounded norm, so that internal covariate shift is bounded without noise.

Huang & Yu, "Internal covariate shift bounding by unitizing layer outputs" (CVPR 2020, arXiv 2001.02814), the layer as
released by the authors, with these deviations:

* The biased variance enters the forward (the released code divides by m - 1 - eps there too); running variances are
  unbiased, as everywhere in torch.
* The inference branch uses running statistics and the sample's own norm, as the code intends but fails to do.
* eps defaults to torch's 1e-5 and momentum to torch's 0.1 (Keras: 1e-3 and 0.99, which torch calls 0.01).
"""

from __future__ import annotations

from typing import ClassVar, Unpack

from torch import Tensor, nn

from flexnorm._messages import unknown_name
from flexnorm.engine import Moments
from flexnorm.kernels import tables
from flexnorm.kernels.layout import token_layout_of
from flexnorm.kernels.tokens import column_moments
from flexnorm.kernels.unitize import unitize_tokens
from flexnorm.nn._base import BatchStatistics, Pair, Param, Shared, all_equal


def unitize(
    moments: Moments,
    mean: Tensor,
    var: Tensor,
    weight: Param,
    bias: Param,
    alpha: Tensor,
    *,
    eps: float = 1e-5,
    unit_norm: str = "paper",
) -> Pair:
    """Unitization on top of given statistics: ``y = weight * xhat * (alpha / sqrt(s_n + eps) + 1 - alpha) + bias``.

    As of :class:`~flexnorm.nn.UnitizedBatchNorm2d`, with xhat = (x - mean) / sqrt(var + eps). The squared norms ``s_n``
    need no pass: ``||xhat_n||^2 = P * sum_c (var[n,c] + (mean[n,c] - mean_c)^2) / (var_c + eps)`` for P positions.
    ``mean`` and ``var`` are (C,) or (1, C); ``alpha`` (C,) of 0 is the plain standardization, of 1 full unitization.
    """
    divisor = moments.count if unit_norm == "paper" else mean.shape[-1]
    return tables.unitize(moments.tables, (mean, var), weight, bias, alpha, eps, divisor, moments.backend)


def unitized(
    moments: Moments, weight: Param, bias: Param, alpha: Tensor, *, eps: float = 1e-5, unit_norm: str = "paper"
) -> Pair:
    """Unitized batch normalization: :func:`unitize` on the statistics of the batch."""
    pooled = moments.pool("batch")
    return unitize(moments, pooled.mean, pooled.var, weight, bias, alpha, eps=eps, unit_norm=unit_norm)


class _UnitizedBatchNorm(BatchStatistics):
    """Unitized batch normalization (Huang & Yu 2020): batch normalization, then each sample towards unit norm.

    ``y = weight * xhat * (alpha / sqrt(s_n + eps) + 1 - alpha) + bias`` with xhat the standardized input and ``s_n``
    one squared norm per sample. ``alpha`` (C,) starts at 0, so that the layer starts as exact BatchNorm and learns how
    far to unitize. At alpha = 1, ``||y - bias||`` of a sample is at most ``max|weight|`` times P positions (times
    ``sqrt(C P)`` for ``unit_norm="rms"``), whatever the noise of the batch statistics: the Earth Mover distance between
    two of its output distributions is at most the sum of the two bounds and of the distance of the biases.

    Args:
        unit_norm: ``"paper"``: ``s_n = ||xhat_n||^2 / P^2`` for P positions. ``"rms"``: ``||xhat_n||^2 / (C P)``, which
            is about 1 whatever the shape, so that alpha does not rescale the layer.
        constrain_alpha: Clamp alpha to [0, 1] in the forward (the paper's code does not).
        norm: Former name of ``unit_norm``, which it overrides.
        **kwargs: These and the others as of :class:`flexnorm.FlexNorm`.

    Raises:
        ValueError: For an unknown ``unit_norm``; in training, if there is only one value per channel.
    """

    norm_name = "unitized"
    options = ("eps", "unit_norm", "constrain_alpha")
    torch_layer = "batch"
    learned: ClassVar = {"alpha": (None, 0.0)}
    no_decay = ("alpha",)  # it would pull the layer back to batch normalization
    alpha: nn.Parameter

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        unit_norm: str = "paper",
        constrain_alpha: bool = False,
        norm: str | None = None,
        **kwargs: Unpack[Shared],
    ) -> None:
        if norm is not None and unit_norm not in ("paper", norm):
            raise ValueError(f"norm is the old name of unit_norm: got norm={norm!r} and unit_norm={unit_norm!r}")
        unit_norm = unit_norm if norm is None else norm
        if unit_norm not in ("paper", "rms"):
            raise ValueError(unknown_name("unit_norm of UnitizedBatchNorm", unit_norm, ["paper", "rms"]))
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **kwargs)
        self.unit_norm = unit_norm
        self.constrain_alpha = constrain_alpha

    def same_as(self, training: bool) -> str:  # noqa: ARG002
        """At alpha = 0 it is batch normalization."""
        return "batch" if all_equal(self.alpha, 0) else "unitized"

    twin_at_any_size = True

    def twin(self, x: Tensor) -> Tensor | None:
        """Normalize tokens in one node."""
        layout = token_layout_of(x, -1) if x.dim() == 2 and self.group() is None else None
        if layout is None or layout.backend != "c" or layout.order != "cols":
            return None
        of_batch = self.running_mean is None or (self.training and not self.frozen)
        if of_batch:
            kept = column_moments(x.detach(), layout)
            if self.training:
                self.track(Moments(*kept, x.shape[0], backend=layout.backend))
        else:
            kept = self.kept_statistics()
        alpha = self.alpha.clamp(0, 1) if self.constrain_alpha else self.alpha
        divisor = 1.0 if self.unit_norm == "paper" else float(self.num_features)
        return unitize_tokens(x, kept, of_batch, self.weight, self.bias, alpha, self.eps, divisor)

    def rule(self, moments: Moments) -> Pair:
        """Standardize with batch (or running) statistics, then move each sample towards unit norm by alpha."""
        _ = moments.tables  # needed in any case: asked for first, those of the batch are pooled from them
        mean, var = self.batch_or_running(moments)
        alpha = self.alpha.clamp(0, 1) if self.constrain_alpha else self.alpha
        return unitize(moments, mean, var, self.weight, self.bias, alpha, eps=self.eps, unit_norm=self.unit_norm)


class UnitizedBatchNorm1d(_UnitizedBatchNorm, ndims=(2, 3)):
    """Unitized batch normalization of (N, C) or (N, C, L) input."""


class UnitizedBatchNorm2d(_UnitizedBatchNorm, ndims=(4,)):
    """Unitized batch normalization of (N, C, H, W) input."""


class UnitizedBatchNorm3d(_UnitizedBatchNorm, ndims=(5,)):
    """Unitized batch normalization of (N, C, D, H, W) input."""
