"""Fully connected NormProp layer (Eq. 9)."""

from __future__ import annotations

from typing import Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from flexnorm.nn.normprop.checks import positive
from flexnorm.nn.normprop.elementwise import ActivationLike
from flexnorm.nn.normprop.layer import LayerOptions, NormPropLayer


class NormPropLinear(NormPropLayer):
    """Linear map with unit rows, activation and standardization, ``(*, in_features) -> (*, out_features)``.

    ``y = (act(gamma W x / ||W|| + bias) - mean) / sqrt(var + eps)`` with mean and variance of ``act(gamma z +
    bias)``, z ~ N(0, 1) (Eq. 9 of arXiv 1603.01431 for ``constants="paper"``). With unit rows and an input of zero
    mean and unit variance, every pre-activation before gamma and bias has unit variance, so every output again has
    zero mean and unit variance.

    Args:
        in_features: Size of the last axis of the input.
        out_features: Size of the last axis of the output, and the number of units.
        activation: Name, module, elementwise function or :class:`Activation`; None for a last layer: the affine map
            ``gamma W x / ||W|| + bias``, not standardized. ``"identity"``: ``W x / ||W||`` with no other parameter
            (for a shortcut that changes shape).
        constants: ``"exact"``: mean and variance follow gamma and bias. ``"paper"``: those of gamma = 1, bias = 0.
        **options: ``init``, ``unitize``, ``eps``, ``device`` and ``dtype``, see :class:`LayerOptions` and
            :class:`UnitOptions`.

    Raises:
        ValueError: For sizes that are not positive integers, or unknown names.
        TypeError: For an activation or dtype of the wrong kind.

    Examples:
        >>> layer = NormPropLinear(64, 32)
        >>> layer(torch.randn(8, 64)).shape
        torch.Size([8, 32])
    """

    shared = ("in_features", "out_features")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: ActivationLike | None = "relu",
        constants: str = "exact",
        **options: Unpack[LayerOptions],
    ) -> None:
        shape = positive("out_features", out_features), positive("in_features", in_features)
        super().__init__(shape, out_features, activation, constants, **options)
        self.in_features = self.in_channels = in_features
        self.out_features = out_features

    def _check(self, x: Tensor) -> None:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"NormPropLinear expects a last axis of {self.in_features} features, "
                f"got an input of shape {tuple(x.shape)}"
            )

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def _folded(self) -> nn.Module:
        options = {"device": self.weight.device, "dtype": self.weight.dtype}
        return self._fold_into(nn.Linear(self.in_features, self.out_features, bias=self._has_shift(), **options))

    def extra_repr(self) -> str:
        """Arguments that define the layer."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._options()}"
