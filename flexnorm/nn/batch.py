"""BatchNorm, LayerNorm, GroupNorm and InstanceNorm as rules, with torch's arguments, parameters and buffers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flexnorm.engine import FlexNorm, Moments
from flexnorm.nn import rules

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm1d",
    "LayerNorm2d",
    "LayerNorm3d",
]


class _BatchNorm(FlexNorm):
    """Batch normalization (Ioffe & Szegedy 2015) on the engine: see :class:`flexnorm.FlexNorm` for the arguments.

    Differs from ``nn.BatchNorm*`` in what users of it asked for: ``process_group`` synchronizes on any backend,
    :meth:`~flexnorm.FlexNorm.freeze` survives ``train()``, activation checkpointing updates the statistics once, a
    non-finite batch does not enter them, and they stay in float32.

    Raises:
        ValueError: In training, if there is only one value per channel (its variance is 0 whatever the input).
    """

    def rule(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Standardize with the statistics of the batch in training, with the running ones in evaluation."""
        mean, var = self.statistics(moments)
        return rules.standardize(mean, var, self.weight, self.bias, self.eps)

    def check_input(self, x: Tensor) -> None:
        """Refuse wrong shapes, and batches that have no statistics."""
        super().check_input(x)
        _refuse_single_value(self, x)


def _refuse_single_value(module: FlexNorm, x: Tensor) -> None:
    from_batch = (module.training or not module.track_running_stats) and not module.frozen
    if from_batch and module.group() is None and x.shape[0] == 1 and x.numel() == x.shape[1]:
        raise ValueError(
            f"{type(module).__name__} needs more than 1 value per channel in training, got shape {tuple(x.shape)}. "
            "Use a larger batch, freeze() the layer, or a normalization without batch statistics "
            "(PopulationNorm, GroupNorm, LayerNorm, Normalization Propagation)"
        )


class BatchNorm1d(_BatchNorm):
    """Batch normalization of (N, C) or (N, C, L) input."""

    ndims = (2, 3)


class BatchNorm2d(_BatchNorm):
    """Batch normalization of (N, C, H, W) input."""

    ndims = (4,)


class BatchNorm3d(_BatchNorm):
    """Batch normalization of (N, C, D, H, W) input."""

    ndims = (5,)


class GroupNorm(FlexNorm):
    """Group normalization (Wu & He 2018): each sample by the moments of groups of its channels.

    Args:
        num_groups: Number of groups of neighbouring channels; must divide ``num_channels``.
        num_channels: Number of channels C of the input (N, C) or (N, C, *spatial).
        eps: Added to the variance.
        affine: Whether to learn ``weight`` and ``bias``, each (C,).
        bias: ``False`` leaves out the bias only.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: If ``num_groups`` does not divide ``num_channels``.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(f"num_groups must divide num_channels, got {num_groups} and {num_channels}")
        super().__init__(num_channels, eps, None, affine, False, bias=bias, device=device, dtype=dtype)
        self.num_groups = num_groups
        self.num_channels = num_channels

    def rule(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Standardize each sample with the moments of its groups."""
        return rules.group(moments, self.weight, self.bias, groups=self.num_groups, eps=self.eps)

    def extra_repr(self) -> str:
        """Show the constructor arguments as torch does."""
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}"


class _LayerNorm(FlexNorm):
    """Layer normalization over channels and positions (Ba et al. 2016), with one weight and bias per channel.

    The same function as ``nn.GroupNorm`` with one group. (``nn.LayerNorm`` learns one weight per position too.)

    Args:
        num_features: Number of channels C of the input (N, C) or (N, C, *spatial).
        eps: Added to the variance.
        affine: Whether to learn ``weight`` and ``bias``, each (C,).
        bias: ``False`` leaves out the bias only.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, None, affine, False, bias=bias, device=device, dtype=dtype)

    def rule(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Standardize each sample with its own moments."""
        return rules.layer(moments, self.weight, self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        """Show the constructor arguments."""
        return f"{self.num_features}, eps={self.eps}, affine={self.affine}"


class LayerNorm1d(_LayerNorm):
    """Layer normalization over channels and positions of (N, C) or (N, C, L) input."""

    ndims = (2, 3)


class LayerNorm2d(_LayerNorm):
    """Layer normalization over channels and positions of (N, C, H, W) input."""

    ndims = (4,)


class LayerNorm3d(_LayerNorm):
    """Layer normalization over channels and positions of (N, C, D, H, W) input."""

    ndims = (5,)


class _InstanceNorm(FlexNorm):
    """Instance normalization (Ulyanov et al. 2016): each channel of each sample by its own moments.

    Args:
        num_features: Number of channels C of the input (N, C, *spatial).
        eps: Added to the variance.
        momentum: Weight of the new batch in the running statistics; ``None`` for the cumulative average.
        affine: Whether to learn ``weight`` and ``bias``, each (C,). Off by default, as in torch.
        track_running_stats: Whether to use running statistics in evaluation. Off by default, as in torch. They average
            the instances' moments, not those of the batch.
        process_group: Average the running statistics over this group.
        device: Device of parameters and buffers.
        dtype: Type of the parameters.

    Raises:
        ValueError: In training, if there is only one position per channel.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        *,
        process_group: ProcessGroup | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            process_group=process_group,
            device=device,
            dtype=dtype,
        )

    def rule(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Standardize each channel of each sample with its own moments."""
        if self.running_mean is not None and self.running_var is not None and (self.frozen or not self.training):
            return rules.standardize(*self.kept_statistics(), self.weight, self.bias, self.eps)
        own = moments.detach() if self.training and self.running_mean is not None else None
        if own is not None and (own.mean.shape[0] or own.process_group is not None):
            averaged = Moments(own.mean, torch.zeros_like(own.mean), 1, process_group=own.process_group).pool("batch")
            spread = Moments(own.var, torch.zeros_like(own.var), 1, process_group=own.process_group).pool("batch")
            self.track(Moments(averaged.mean, spread.mean, own.count))
        return rules.instance(moments, self.weight, self.bias, eps=self.eps)

    def check_input(self, x: Tensor) -> None:
        """Refuse wrong shapes, and inputs whose instances have no statistics."""
        super().check_input(x)
        if self.training and not self.frozen and x.numel() and x.numel() == x.shape[0] * x.shape[1]:
            raise ValueError(
                f"{type(self).__name__} needs more than 1 position per channel in training, got shape {tuple(x.shape)}"
            )


class InstanceNorm1d(_InstanceNorm):
    """Instance normalization of (N, C, L) input."""

    ndims = (3,)


class InstanceNorm2d(_InstanceNorm):
    """Instance normalization of (N, C, H, W) input."""

    ndims = (4,)


class InstanceNorm3d(_InstanceNorm):
    """Instance normalization of (N, C, D, H, W) input."""

    ndims = (5,)
