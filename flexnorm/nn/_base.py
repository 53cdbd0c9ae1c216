"""What several norms share: arguments, checks, and the scale and shift of a standardization."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict, Unpack

import torch
from torch import Tensor

from flexnorm.engine import FlexNorm
from flexnorm.kernels.tables import Pair as Pair
from flexnorm.kernels.tables import Param as Param

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Placed(TypedDict, total=False):
    """Keyword arguments of every layer, as of :class:`flexnorm.FlexNorm`."""

    device: torch.device | str | None
    dtype: torch.dtype | None
    channel_axis: int
    per_position: bool | None


class Shared(Placed, total=False):
    """Keyword arguments of the layers with running statistics, as of :class:`flexnorm.FlexNorm`."""

    bias: bool
    process_group: ProcessGroup | str | None


class BatchStatistics(FlexNorm):
    """A layer that normalizes a training batch by its own statistics, and refuses one that has none."""

    def check_input(self, x: Tensor) -> None:
        """Refuse wrong shapes, and batches that have no statistics."""
        super().check_input(x)
        from_batch = (self.training or not self.track_running_stats) and not self.frozen
        if from_batch and self.group() is None and x.numel() == self.num_features:
            raise ValueError(
                f"{type(self).__name__} needs more than 1 value per channel in training, got shape {tuple(x.shape)}. "
                "Use a larger batch, freeze() the layer, or a normalization without batch statistics "
                "(PopulationNorm, GroupNorm, LayerNorm, Normalization Propagation)"
            )


class SampleStatistics(FlexNorm):
    """A layer that normalizes each sample by its own statistics, in training and in evaluation alike."""

    statistics_from = "sample"

    def __init__(
        self, num_features: int, eps: float = 1e-5, affine: bool = True, *, bias: bool = True, **kwargs: Unpack[Placed]
    ) -> None:
        super().__init__(num_features, eps, None, affine, False, bias=bias, **kwargs)


def all_equal(parameter: Tensor, value: float) -> bool:
    """Whether all values of a parameter are the given one, as far as is known: on the meta device they are."""
    return parameter.is_meta or bool((parameter == value).all())


def standardize(mean: Tensor, var: Tensor, weight: Param = None, bias: Param = None, eps: float = 1e-5) -> Pair:
    """Return the scale and shift of ``weight * (x - mean) / sqrt(var + eps) + bias``.

    Args:
        mean: Means, any shape that broadcasts to (N, C).
        var: Biased variances, of the shape of ``mean``.
        weight: (C,), or ``None`` for 1.
        bias: (C,), or ``None`` for 0.
        eps: Added to the variance.

    Examples:
        >>> scale, shift = standardize(torch.tensor([2.0]), torch.tensor([4.0]), eps=0.0)
        >>> scale.item(), shift.item()
        (0.5, -1.0)
    """
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    return scale, -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
