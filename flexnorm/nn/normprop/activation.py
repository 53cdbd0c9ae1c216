"""Activation and standardization without a linear map: what follows a sum, or stands before a linear map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flexnorm.nn.normprop.checks import positive
from flexnorm.nn.normprop.constants import ActivationLike
from flexnorm.nn.normprop.elementwise import channel_affine
from flexnorm.nn.normprop.folded import ChannelAffine
from flexnorm.nn.normprop.units import DEFAULT_EPS, NormPropUnits


class NormPropActivation(NormPropUnits):
    """``(act(gamma x + bias) - mean) / sqrt(var + eps)`` per channel, ``(N, C, *spatial) -> (N, C, *spatial)``.

    The NormProp layer of residual networks that put an activation behind the sum, or before the convolution: the
    input, of zero mean and unit variance, is what the linear map of the other layers would have computed.

    Args:
        channels: Number of channels C.
        activation: Name, module, elementwise function or :class:`Activation`.
        constants: ``"exact"``: mean and variance follow gamma and bias. ``"paper"``: those of gamma = 1, bias = 0.
        init: ``"stable"``, ``"paper"``, or None for the one that goes with ``constants``.
        spatial: Number of axes after the channels, 0 for ``(..., C)``.
        eps: Added to the exact variance.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: For sizes out of range, unknown names, or the activations None and ``"identity"``, which do nothing.
        TypeError: For an activation or dtype of the wrong kind.

    Examples:
        >>> layer = NormPropActivation(8)
        >>> layer(torch.randn(2, 8, 16, 16)).shape
        torch.Size([2, 8, 16, 16])
    """

    _own_shift = False

    def __init__(
        self,
        channels: int,
        activation: ActivationLike = "relu",
        constants: str = "exact",
        init: str | None = None,
        *,
        spatial: int = 2,
        eps: float = DEFAULT_EPS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            positive("channels", channels),
            activation=activation,
            constants=constants,
            init=init,
            eps=eps,
            device=device,
            dtype=dtype,
        )
        if self.gamma is None or self.activation is None:
            raise ValueError("an activation that does nothing needs no layer; leave it out")
        self.spatial = spatial
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset gamma, bias and slope."""
        self._reset_units()

    def _check(self, x: Tensor) -> None:
        axis = x.dim() - 1 - self.spatial
        if axis < 0 or x.shape[axis] != self.out_channels:
            raise ValueError(
                f"NormPropActivation expects {self.out_channels} channels before {self.spatial} spatial axes, "
                f"got shape {tuple(x.shape)}"
            )

    def _affine_part(self, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        scale, shift = self._calibrated(scale, shift)
        if scale is None or shift is None:
            return x
        return channel_affine(x, scale, shift, self.spatial)

    def _preactivations(self, x: Tensor) -> Tensor:
        return self._affine_part(x, None, None)

    def forward(self, x: Tensor) -> Tensor:
        """Return the standardized activation of ``x``.

        Raises:
            ValueError: If ``x`` has the wrong number of axes or channels.
        """
        self._check(x)
        return self._units(lambda scale, shift: self._affine_part(x, scale, shift))

    @torch.no_grad()
    def fold(self) -> nn.Module:
        """Return plain modules for the same function: a scale and shift, the activation, and a shift or floor."""
        scale, shift, tail = self._folded_units()
        if scale is None or shift is None:
            raise RuntimeError("the layer has no gamma and bias")
        dtype = self._parameter_like().dtype
        return nn.Sequential(ChannelAffine(scale, shift, self.spatial, dtype), *tail)

    def extra_repr(self) -> str:
        """Arguments that define the layer."""
        return f"{self.out_channels}, {self._options()}, spatial={self.spatial}"
