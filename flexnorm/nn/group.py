"""Group normalization, with torch's arguments and parameters."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor
from torch.nn import functional

from flexnorm.engine import FlexNorm, Moments, twin_of
from flexnorm.nn._base import Pair, Param, Placed, standardize


def group(moments: Moments, weight: Param = None, bias: Param = None, *, groups: int, eps: float = 1e-5) -> Pair:
    """Group normalization (Wu & He 2018): moments per sample, over positions and the channels of a group.

    ``groups`` is the number of groups of neighbouring channels; it divides C.
    """
    pooled = moments.pool("channels", groups=groups)
    return standardize(pooled.mean, pooled.var, weight, bias, eps)


@twin_of(group)
def by_group_norm(x: Tensor, weight: Param = None, bias: Param = None, *, groups: int, eps: float = 1e-5) -> Tensor:
    """Group normalization by torch's function: layer normalization for one group of tokens."""
    if x.dim() == 2 and groups == 1:
        return functional.layer_norm(x, x.shape[1:], weight, bias, eps)
    return functional.group_norm(x, groups, weight, bias, eps)


class GroupNorm(FlexNorm):
    """Group normalization (Wu & He 2018): each sample by the moments of groups of its channels.

    Args:
        num_groups: Number of groups of neighbouring channels; must divide ``num_channels``. :func:`make_norm` gives 16
            channels a group, the setting that the paper found best (table 3) beside 32 groups, where C allows it, else
            one group.
        num_channels: Number of channels C of the input (N, C) or (N, C, *spatial).
        eps: Added to the variance.
        affine: Whether to learn ``weight`` and ``bias``, each (C,).
        bias: ``False`` leaves out the bias only.
        **kwargs: ``device``, ``dtype`` of the parameters.

    Raises:
        ValueError: If ``num_groups`` does not divide ``num_channels``.
    """

    norm_name = torch_layer = "group"
    statistics_from = "sample"
    options = ("num_groups", "eps")

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        bias: bool = True,
        **kwargs: Unpack[Placed],
    ) -> None:
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(f"num_groups must divide num_channels, got {num_groups} and {num_channels}")
        super().__init__(num_channels, eps, None, affine, False, bias=bias, **kwargs)
        self.num_groups = num_groups
        self.num_channels = num_channels

    @staticmethod
    def default_groups(num_channels: int) -> int:
        """Return the number of groups of 16 channels each, or 1 where they do not divide ``num_channels``."""
        return num_channels // 16 if num_channels % 16 == 0 else 1

    @classmethod
    def build(cls, num_features: int, **kwargs: Any) -> GroupNorm:
        """Build the layer for ``num_features`` channels, with :meth:`default_groups` unless ``kwargs`` say other."""
        return cls(**{"num_groups": cls.default_groups(num_features), "num_channels": num_features, **kwargs})

    def same_as(self, training: bool) -> str:  # noqa: ARG002
        """One group is layer normalization, one channel a group instance normalization."""
        return {1: "layer", self.num_features: "instance"}.get(self.num_groups, "group")

    def twin(self, x: Tensor) -> Tensor | None:
        """Normalize by torch's function."""
        if self.weight is not None and self.weight.dtype != x.dtype:
            return None
        return by_group_norm(x, self.weight, self.bias, groups=self.num_groups, eps=self.eps)

    def rule(self, moments: Moments) -> Pair:
        """Standardize each sample with the moments of its groups."""
        return group(moments, self.weight, self.bias, groups=self.num_groups, eps=self.eps)

    def extra_repr(self) -> str:
        """Show the constructor arguments as torch does."""
        shown = [f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}"]
        return ", ".join([*shown, *self.shown_place()])
