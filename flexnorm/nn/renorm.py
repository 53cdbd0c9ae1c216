"""Batch renormalization: batch statistics corrected towards the running ones, for small or uneven batches.

Ioffe, "Batch renormalization" (NeurIPS 2017, arXiv 1702.03275). Deviation: the running variance is kept and its root
taken, where the paper keeps a running standard deviation.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from flexnorm.engine import Moments, recomputing
from flexnorm.nn._base import BatchStatistics, Pair, Param, Shared, standardize


def renorm(
    moments: Moments,
    mean: Tensor,
    var: Tensor,
    weight: Param = None,
    bias: Param = None,
    *,
    r_max: float | Tensor,
    d_max: float | Tensor,
    eps: float = 1e-5,
) -> Pair:
    """Batch renormalization (Ioffe 2017, alg. 1): batch statistics, corrected towards the running ones.

    ``y = weight * (r * (x - mu_B) / sigma_B + d) + bias`` with ``r = sigma_B / sigma`` clipped to [1/r_max, r_max] and
    ``d = (mu_B - mean) / sigma`` clipped to [-d_max, d_max], both constant in the backward. ``mean`` and ``var`` (C,)
    are the running ones. ``r_max=1`` with ``d_max=0`` is batch normalization.
    """
    pooled = moments.pool("batch")
    return renormalize(pooled.mean, pooled.var, mean, var, weight, bias, r_max=r_max, d_max=d_max, eps=eps)


def renormalize(
    batch_mean: Tensor,
    batch_var: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Param = None,
    bias: Param = None,
    *,
    r_max: float | Tensor,
    d_max: float | Tensor,
    eps: float = 1e-5,
) -> Pair:
    """Batch statistics (1, C) corrected towards others (C,): :func:`renorm` on given statistics of the batch.

    Without limits (``r_max = d_max = inf``) the values are those of ``mean`` and ``var``, and the derivatives those of
    the batch statistics: population normalization whose statistics follow the weights.
    """
    inverse = (batch_var + eps).rsqrt()
    with torch.no_grad():
        population = (var + eps).rsqrt()
        r = population / inverse
        d = (batch_mean - mean) * population
        if not isinstance(r_max, float) or r_max != float("inf"):
            upper = torch.as_tensor(r_max, dtype=inverse.dtype, device=inverse.device)
            r = r.clamp(upper.reciprocal(), upper)
        if not isinstance(d_max, float) or d_max != float("inf"):
            reach = torch.as_tensor(d_max, dtype=inverse.dtype, device=inverse.device)
            d = d.clamp(-reach, reach)
    scale = inverse * r
    shift = d - batch_mean * scale
    if weight is not None:
        scale, shift = scale * weight, shift * weight
    return scale, shift if bias is None else shift + bias


class _BatchRenorm(BatchStatistics):
    """Batch renormalization (Ioffe 2017, alg. 1): in training the output follows the running statistics too.

    Args:
        momentum: Weight of the new batch in the running statistics; the paper uses 0.01.
        r_max: Largest factor by which a batch standard deviation is corrected.
        d_max: Largest shift by which a batch mean is corrected, in running standard deviations.
        warmup: Number of batches as plain batch normalization before the corrections begin (5,000 in the paper).
        ramp: Number of batches over which they then grow: r_max over all of it, d_max over the first 4/7, which with
            the default are the 40,000 and 25,000 steps of the paper.
        **kwargs: These and the others as of :class:`flexnorm.FlexNorm`.

    Raises:
        ValueError: For ``r_max`` below 1, a negative ``d_max``, ``warmup`` or ``ramp``.
    """

    norm_name = "renorm"
    positions_matter = False
    options = ("eps", "r_max", "d_max", "warmup", "ramp")
    torch_layer = "batch"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup: int = 5000,
        ramp: int = 35000,
        **kwargs: Unpack[Shared],
    ) -> None:
        if r_max < 1 or d_max < 0 or warmup < 0 or ramp < 0:
            raise ValueError(
                f"r_max must be at least 1, d_max, warmup and ramp not negative; got {r_max}, {d_max}, {warmup}, {ramp}"
            )
        super().__init__(num_features, eps, momentum, affine, True, **kwargs)
        self.r_max, self.d_max, self.warmup, self.ramp = r_max, d_max, warmup, ramp
        self._used: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def limits(self) -> Pair:
        """Return r_max and d_max at the present step, as scalar tensors."""
        assert self.num_batches_tracked is not None
        since = (self.num_batches_tracked - self.warmup).float()
        grown = (since / max(self.ramp, 1)).clamp(0, 1)
        grown_d = (since / max(self.ramp * 4 / 7, 1)).clamp(0, 1)
        return 1 + (self.r_max - 1) * grown, self.d_max * grown_d

    def same_as(self, training: bool) -> str:
        """Without corrections, and in evaluation, it is batch normalization."""
        return "batch" if not training or (self.r_max == 1 and self.d_max == 0) else "renorm"

    def rule(self, moments: Moments) -> Pair:
        """Renormalize in training; standardize with the running statistics in evaluation."""
        assert self.running_mean is not None
        assert self.running_var is not None
        if self.frozen or not self.training:
            return standardize(*self.kept_statistics(), self.weight, self.bias, self.eps)
        if recomputing() and self._used is not None:
            # Activation checkpointing repeats the last forward: by the statistics and limits that it had.
            r_max, d_max, mean, var = self._used
        else:
            r_max, d_max = self.limits()
            # The running statistics of before this batch, as in the paper; they are about to be updated in place.
            mean, var = self.running_mean.clone(), self.running_var.clone()
            if not torch.compiler.is_compiling():
                self._used = (r_max, d_max, mean, var)
        self.track(moments.pool("batch"))
        return renorm(moments, mean, var, self.weight, self.bias, r_max=r_max, d_max=d_max, eps=self.eps)


class BatchRenorm1d(_BatchRenorm, ndims=(2, 3)):
    """Batch renormalization of (N, C) or (N, C, L) input."""


class BatchRenorm2d(_BatchRenorm, ndims=(4,)):
    """Batch renormalization of (N, C, H, W) input."""


class BatchRenorm3d(_BatchRenorm, ndims=(5,)):
    """Batch renormalization of (N, C, D, H, W) input."""
