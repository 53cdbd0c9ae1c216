"""What several norms share: arguments, checks, and the scale and shift of a standardization."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack

import torch
from torch import Tensor, nn

from flexnorm.engine import FlexNorm, Segments, flex_norm
from flexnorm.kernels.tables import Pair as Pair
from flexnorm.kernels.tables import Param as Param

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


MANY = 2**60
"""The unbiased and the biased variance of that many values are the same number."""


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
        if x.numel() != self.num_features or self.frozen:
            return
        if (self.training or not self.track_running_stats) and self.group() is None:
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


class LastAxes(SampleStatistics):
    """A layer in the form of ``nn.LayerNorm``: each position by itself, with parameters of the normalized shape."""

    eps: float | None  # type: ignore[assignment]

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None,
        elementwise_affine: bool,
        bias: bool,
        channel_axis: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        shape = (int(normalized_shape),) if isinstance(normalized_shape, int | Integral) else tuple(normalized_shape)
        if not shape or (channel_axis == 1 and len(shape) > 1):
            raise ValueError(
                f"normalized_shape is the size of the last axis or of the last axes, and with channel_axis=1 one "
                f"number, that of the channels; got {normalized_shape!r} with channel_axis={channel_axis}"
            )
        FlexNorm.__init__(
            self,
            math.prod(shape),
            0.0 if eps is None else eps,
            None,
            elementwise_affine,
            False,
            bias=bias,
            channel_axis=channel_axis,
            per_position=True,
            device=device,
            dtype=dtype,
        )
        self.normalized_shape, self.eps, self.elementwise_affine = shape, eps, elementwise_affine
        if len(shape) > 1:
            for name, parameter in self._parameters.items():
                if parameter is not None:
                    setattr(self, name, nn.Parameter(parameter.detach().view(shape)))

    @classmethod
    def build(cls, num_features: int, **kwargs: Any) -> Self:
        """Build the layer for channels, from the arguments that the norm's layers for samples take too.

        Args:
            num_features: Number of channels C.
            **kwargs: Arguments of the constructor, ``elementwise_affine`` also as ``affine``; ``channel_axis`` is 1
                unless given, as of those layers.
        """
        kwargs = {key: value for key, value in kwargs.items() if key != "per_position"}
        if "affine" in kwargs:
            kwargs["elementwise_affine"] = kwargs.pop("affine")
        return cls(num_features, **{"channel_axis": 1, **kwargs})

    def check_input(self, x: Tensor) -> None:
        """Refuse shapes that are not those that the layer was built for."""
        name, ours, axes = type(self).__name__, self.normalized_shape, len(self.normalized_shape)
        if self.channel_axis == -1:
            if tuple(x.shape[x.dim() - axes :]) != ours or x.dim() < axes:
                raise ValueError(f"{name} was built for the last axes {ours}, got shape {tuple(x.shape)}")
        elif x.dim() < 2 or x.shape[1] != ours[0]:
            raise ValueError(f"{name} was built for {ours[0]} channels at axis 1, got shape {tuple(x.shape)}")

    def forward(self, x: Tensor, mask: Tensor | None = None, segments: Segments | Tensor | None = None) -> Tensor:
        """Normalize ``x``.

        Args:
            x: (..., *normalized_shape), or (N, C, *spatial) with ``channel_axis=1``.
            mask: What counts, of the shape of ``x`` without the normalized axes. A token's moments are its own, so
                it only matters together with segments.
            segments: The sample of each row of ``x`` (R, C), as of :func:`flexnorm.flex_norm`; the channels and rows
                of a sample are then normalized together, as layer normalization of a graph does.

        Returns:
            A tensor of the shape, type and memory format of ``x``.
        """
        axes = len(self.normalized_shape)
        if axes == 1 and x.dim() > 1:
            return super().forward(x, mask, segments)
        self.check_input(x)
        flat = x.flatten(x.dim() - axes)
        if mask is not None:
            mask = mask.flatten(x.dim() - axes) if mask.dim() == x.dim() else mask
        rows = flat if flat.dim() > 1 else flat[None]
        made = flex_norm(rows, self.rule, channel_axis=-1, mask=mask, segments=segments)
        return made.view(x.shape)

    def flat(self, parameter: Tensor | None) -> Tensor | None:
        """A parameter as the vector (C,) that the rule takes."""
        return parameter if parameter is None or parameter.dim() == 1 else parameter.flatten()

    def function(self, training: bool) -> tuple[Any, ...]:
        """As of other layers; several axes are normalized by parameters that differ from position to position."""
        shape = self.normalized_shape
        return (*super().function(training), *((shape,) if len(shape) > 1 else ()))

    def extra_repr(self) -> str:
        """Show the constructor arguments as torch does."""
        shown = f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"
        return shown if self.channel_axis == -1 else f"{shown}, channel_axis={self.channel_axis}"


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
