"""Population normalization: the statistics of the whole population in training too, not those of the batch.

Luo, Wang, Shao & Peng, "Towards understanding regularization in batch normalization" (ICLR 2019, arXiv 1809.00846),
sec. 2: BatchNorm equals population normalization plus a decay on gamma. The paper estimates the population statistics
from 10,000 training samples (``statistics="estimated"``, filled from outside). Deviations, all by default:

* ``statistics="running"`` estimates them along the way. The moving average is bias-corrected: after the first batch it
  equals that batch, so there is no cold start. Variances average by the exponentially weighted form of Chan's formula,
  which keeps the variance *between* batches: at batch size 1 most of the variance.
* ``max_ratio``: estimates that are renewed every few steps lag behind large steps of the weights, and training on them
  can diverge; a guard bounds how far they may be from the statistics of the batch.
* ``gradient="batch"``: the paper's statistics follow the weights, as those of weight normalization do.

Strictly population normalization, each sample alike and training the same function as evaluation, is
``statistics="estimated", gradient="none"``.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor
from torch.nn import functional

from flexnorm._messages import unknown_name
from flexnorm.engine import FlexNorm, Moments, recomputing, standardize_at_once, twin_of
from flexnorm.kernels.layout import best_by_torch
from flexnorm.kernels.tables import follow, follow_guarded, follow_weights, guard
from flexnorm.kernels.tables import standardize as standardize_in_c
from flexnorm.nn._base import Pair, Param, Shared, standardize

# Derivatives through the moments of fewer values than this are mostly noise: they project two directions out.
_FEW_VALUES = 16


def population(
    moments: Moments,  # noqa: ARG001 - a rule receives them; this one needs none, and so costs no pass over x
    mean: Tensor,
    var: Tensor,
    weight: Param = None,
    bias: Param = None,
    *,
    eps: float = 1e-5,
) -> Pair:
    """Population normalization (Luo et al. 2019, sec. 2): fixed moments of the whole population, in training too.

    ``mean`` and ``var`` are (C,). ``moments`` is not read: this rule costs one affine pass.
    """
    return standardize(mean, var, weight, bias, eps)


@twin_of(population)
def by_fixed_norm(
    x: Tensor, mean: Tensor, var: Tensor, weight: Param = None, bias: Param = None, *, eps: float = 1e-5
) -> Tensor | None:
    """Population normalization by torch's function, which has no gradient for the statistics."""
    if mean.requires_grad or var.requires_grad or mean.dim() != 1:
        return None
    return functional.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)


class _PopulationNorm(FlexNorm):
    """Population normalization (Luo et al. 2019, sec. 2): the statistics of the population in training too.

    Training works at any batch size, 1 included. With ``statistics="estimated"`` every sample is normalized alike,
    whatever else is in its batch, and training and evaluation are the same function as long as the guard does not act;
    the default ``"running"`` lets each batch enter the statistics first, with the weight ``momentum``, and normalizes
    the very first batch by itself.

    Args:
        momentum: Weight of the new batch in the bias-corrected moving average of the statistics; ``None`` for the
            cumulative average. Smaller batches want smaller values: about ``0.1 * batch / 64``.
        statistics: ``"running"``: each training batch enters the statistics before it is normalized. ``"estimated"``:
            they change only from outside (recalibration, an estimator).
        gradient: The population statistics are functions of the weights before this layer, and their derivative is part
            of the gradient. ``"batch"``: the derivative of the batch statistics stands for it (batch renormalization
            without limits: the value is that of the population, the derivative that of the batch). With fewer than 16
            values per channel, or ``"none"``: the statistics are constants, as if they did not follow the weights; the
            gradient of a sample is then its own, and scale-invariant weights drift (use a smaller learning rate, or
            an optimizer on the sphere).
        max_ratio: Guard: in training the standard deviation used lies within this factor of the batch's own, and the
            mean within ``max_ratio - 1`` batch standard deviations of the batch's. ``None`` switches it off. It never
            acts in evaluation, on a batch with one value per channel, or on estimated statistics as constants
            (``gradient="none"``, or fewer than 16 values), which promise that no sample depends on the others.
        **kwargs: These and the others as of :class:`flexnorm.FlexNorm`.

    Attributes:
        clipped: Scalar buffer: share of the channels on which the guard acted in the last training batch.

    Raises:
        ValueError: For an unknown ``statistics`` or ``gradient``, or a ``max_ratio`` below 1.
    """

    norm_name = "population"
    positions_matter = False
    statistics_from = "population"
    options = ("eps", "momentum", "statistics", "gradient", "max_ratio")
    torch_layer = "batch"
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    clipped: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        statistics: str = "running",
        gradient: str = "batch",
        max_ratio: float | None = 3.0,
        **kwargs: Unpack[Shared],
    ) -> None:
        if statistics not in ("running", "estimated"):
            raise ValueError(unknown_name("statistics of PopulationNorm", statistics, ["running", "estimated"]))
        if gradient not in ("batch", "none"):
            raise ValueError(unknown_name("gradient of PopulationNorm", gradient, ["batch", "none"]))
        if max_ratio is not None and max_ratio < 1:
            raise ValueError(f"max_ratio must be at least 1 or None (no guard), got {max_ratio}")
        super().__init__(num_features, eps, momentum, affine, True, **kwargs)
        self.statistics = statistics
        self.gradient = gradient
        self.max_ratio = max_ratio
        self._values = 0
        self.register_buffer("clipped", torch.zeros((), device=kwargs.get("device")), persistent=False)

    def same_as(self, training: bool) -> str:
        """Its evaluation is that of batch normalization."""
        return "population" if training else "batch"

    twin_at_any_size = True

    def twin(self, x: Tensor) -> Tensor | None:
        """Normalize as the rule does, in one node."""
        same = self.weight is None or self.weight.dtype == x.dtype
        if self.group() is not None or not same or self.running_mean.dtype != x.dtype:
            return None
        if self.frozen or not self.training:
            if not best_by_torch(x):
                return None
            return by_fixed_norm(x, *self.kept_statistics(), self.weight, self.bias, eps=self.eps)
        if self.gradient != "batch" or self._values < _FEW_VALUES:
            return None
        return standardize_at_once(x, self.weight, self.bias, self.eps, self._keep)

    @torch.no_grad()
    def _keep(self, batch: Pair) -> tuple[Pair, Pair]:
        """Let a batch enter the statistics; return those to normalize it with, and scale and shift."""
        weight, bias, running = self.weight, self.bias, self.statistics == "running"
        if "track" in vars(self) or type(self).track is not _PopulationNorm.track:  # somebody else keeps them
            pooled = Moments(*batch, self._values, backend="c")
            if running:
                self.track(pooled)
            kept = self._bounded(pooled)
            return kept, standardize_in_c(kept, weight, bias, self.eps)
        statistics, counted = (self.running_mean, self.running_var), running and not recomputing()
        options = (self.momentum, counted, self.max_ratio, self.clipped, weight, bias, self.eps)
        return follow_guarded(batch, statistics, self.num_batches_tracked, *options)

    def rule(self, moments: Moments) -> Pair:
        """Standardize with the population statistics, in training too."""
        if self.frozen or not self.training:
            return standardize(*self.kept_statistics(), self.weight, self.bias, self.eps)
        # With a process group the choice must not depend on the local batch: all processes communicate alike.
        few = moments.process_group is None and self._values < _FEW_VALUES
        through = self.gradient == "batch" and not few
        if not through and self.statistics == "estimated":
            return standardize(*self.kept_statistics(), self.weight, self.bias, self.eps)
        pooled = moments.pool("batch") if through else moments.detach().pool("batch")
        if self.statistics == "running":
            self.track(pooled)
        kept = self._bounded(pooled)
        if not through:
            return standardize(*kept, self.weight, self.bias, self.eps)
        return follow_weights(pooled.tables, kept, self.weight, self.bias, self.eps, pooled.backend)

    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the running variance to 1, the counter and ``clipped`` to 0."""
        super().reset_running_stats()
        if self._buffers.get("clipped") is not None:
            self.clipped.zero_()

    def check_input(self, x: Tensor) -> None:
        """Refuse wrong shapes; remember the number of values per channel, masked or not: it decides on the gradient."""
        super().check_input(x)
        self._values = x.numel() // max(self.num_features, 1)

    @torch.no_grad()
    def _bounded(self, pooled: Moments) -> Pair:
        """Return the statistics within the guard about those of the batch."""
        mean, var = self.running_mean, self.running_var
        if self.max_ratio is None or (isinstance(pooled.count, int) and pooled.count < 2):
            # Later batches change the buffers in place, before this one's backward has used its values.
            return mean.clone(), var.clone()
        bounded, moved = guard(pooled.tables, (mean, var), self.eps, self.max_ratio, pooled.backend)
        self.clipped.fill_(moved)
        return bounded

    @torch.no_grad()
    def track(self, pooled: Moments) -> None:
        """Let batch moments enter the bias-corrected moving average, between-batch variance included."""
        if self.frozen or recomputing() or (isinstance(pooled.count, int) and pooled.count == 0):
            return
        kept = self.running_mean, self.running_var
        follow(pooled.tables, kept, self.num_batches_tracked, self.momentum, pooled.backend, pooled.count)


class PopulationNorm1d(_PopulationNorm, ndims=(2, 3)):
    """Population normalization of (N, C) or (N, C, L) input."""


class PopulationNorm2d(_PopulationNorm, ndims=(4,)):
    """Population normalization of (N, C, H, W) input."""


class PopulationNorm3d(_PopulationNorm, ndims=(5,)):
    """Population normalization of (N, C, D, H, W) input."""
