"""The base of all NormProp layers: linear map with unit filters, activation and standardization in one module.

Paper: Arpit, Zhou, Kota, Govindaraju, "Normalization Propagation" (ICML 2016, arXiv 1603.01431), Eqs. 9, 11, 12.
Deviations, each an option whose other value is the paper's:

- ``constants="exact"``: mean and standard deviation follow gamma and bias instead of being those of gamma = 1, bias =
  0;
- ``init="stable"``: a positive initial bias, so that the mean square of single samples contracts with depth;
- ``unitize=True``: every sample divided by its root mean square before the linear map;
- ``eps`` is added to the variance, so that a unit whose activation has become constant is quiet instead of infinite;
- a zero filter yields zero and a finite gradient instead of NaN;
- moments of the pre-activations may be stated (``calibrate_``), for networks converted from trained ones.

The forward pass is not written as the equation. For a positively homogeneous activation, 1 / std moves into the
weight and bias, since ``act(k u) = k act(u)`` for ``k > 0``, and one elementwise pass over the activations
disappears::

    (act(gamma W x / ||W|| + bias) - mean) / std = act(gamma / (std ||W||) W x + bias / std) - mean / std
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flexnorm.nn.normprop.constants import ActivationLike
from flexnorm.nn.normprop.elementwise import UnitizeSamples, per_channel, unitize_samples
from flexnorm.nn.normprop.units import NormPropUnits
from flexnorm.nn.normprop.weights import safe_norm


class NormPropLayer(NormPropUnits):
    """Base class of the linear, convolutional and transposed layers; not used by itself.

    ``weight`` is divided by the norm of each filter in the forward pass, so the function does not depend on the
    filters' lengths: optimizers on the sphere may treat every row of it as a scale-invariant vector.

    Attributes:
        weight: Filters; every filter starts with unit norm.
        in_channels: Channels (features) of the input.
        groups: Groups of channels that the linear map keeps apart (1 for linear).
    """

    in_channels: int

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        out_channels: int,
        *,
        activation: ActivationLike | None,
        constants: str,
        init: str | None,
        unitize: bool,
        eps: float,
        groups: int = 1,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(
            out_channels, activation=activation, constants=constants, init=init, eps=eps, device=device, dtype=dtype
        )
        self.groups = groups
        self.unitize = bool(unitize)
        self.weight = nn.Parameter(torch.empty(weight_shape, device=device, dtype=dtype))
        # Before gamma, bias and slope, as optimizers and state dicts have always met it.
        for name in ("gamma", "bias", "slope"):
            if name in self._parameters:
                self._parameters[name] = self._parameters.pop(name)
        self.reset_parameters()

    def _parameter_like(self) -> Tensor:
        return self.weight

    # -- the pieces that depend on the kind of linear map

    def _rows(self, weight: Tensor) -> Tensor:
        """``weight`` as (C, fan-in): one row per unit."""
        return weight.flatten(1)

    def _scaled(self, weight: Tensor, scale: Tensor) -> Tensor:
        """``weight`` with the filter of unit c multiplied by ``scale[c]``."""
        return weight * scale.reshape(-1, *(1,) * (weight.dim() - 1))

    def _fan_gain(self) -> float:
        """Factor by which a unit-norm filter must be enlarged to give unit variance (transposed convolutions only)."""
        return 1.0

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _border_scale(self, x: Tensor, unit: Tensor) -> Tensor | None:  # noqa: ARG002
        """Factor (1, C, *spatial) that undoes the loss of variance at zero-padded borders; None if not asked for."""
        return None

    def _padding_shift(self, x: Tensor, weight: Tensor) -> Tensor | None:  # noqa: ARG002
        """What padding with other values than zero adds, (C, *spatial); None for zeros."""
        return None

    def _preactivations(self, x: Tensor) -> Tensor:
        """Normalized pre-activations ``W x / ||W||``, which propagation takes to be N(0, 1): for diagnosis."""
        return self._linear_part(unitize_samples(x, 1 + self.spatial) if self.unitize else x, None, None)

    def _check(self, x: Tensor) -> None:
        raise NotImplementedError

    # -- parameters

    def reset_parameters(self) -> None:
        """Draw new filters of unit norm and reset gamma, bias and slope.

        The directions are uniform on the sphere for ``init="stable"`` and Glorot's for ``"paper"``.
        """
        if self.init == "stable":
            nn.init.normal_(self.weight)
        else:
            nn.init.xavier_uniform_(self.weight)
        self.unit_norm_()
        self._reset_units()

    @torch.no_grad()
    def unit_norm_(self) -> None:
        """Scale every filter to unit norm in place, as the paper does after every update. Zero filters stay zero."""
        self.weight.copy_(self._scaled(self.weight, safe_norm(self._rows(self.weight)).reciprocal()))

    def filter_norms(self) -> Tensor:
        """Euclidean norm of each filter, ``(C,)``; 1 in place of a zero norm (see :func:`safe_norm`)."""
        return safe_norm(self._rows(self.weight))

    def unit_rows(self) -> Tensor:
        """The filters divided by their norms, ``(C, fan_in)``, differentiable."""
        rows = self._rows(self.weight)
        return rows / safe_norm(rows).unsqueeze(1)

    # -- forward

    def forward(self, x: Tensor) -> Tensor:
        """Return the standardized activation of the linear map of ``x``.

        Raises:
            ValueError: If ``x`` has the wrong number of axes or channels.
        """
        self._check(x)
        if self.unitize:
            x = unitize_samples(x, 1 + self.spatial)
        return self._units(lambda scale, shift: self._linear_part(x, scale, shift))

    def _linear_part(self, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        scale, shift = self._calibrated(scale, shift)
        factor = self._fan_gain() / self.filter_norms()
        weight = self._scaled(self.weight, factor if scale is None else factor * scale).to(self.weight.dtype)
        border = self._border_scale(x, self._scaled(self.weight, factor))
        padding = self._padding_shift(x, weight)
        if padding is not None:
            u = self._linear(x, weight, None)
            return u + (padding if shift is None else padding + per_channel(shift, self.spatial, u))
        if border is None:
            return self._linear(x, weight, None if shift is None else shift.to(self.weight.dtype))
        u = self._linear(x, weight, None)
        u = u * border.to(u.dtype)
        return u if shift is None else u + per_channel(shift, self.spatial, u)

    # -- inference

    @torch.no_grad()
    def fold(self) -> nn.Module:
        """Return plain modules for the same function: an ordinary linear map, then at most two elementwise ones.

        For ReLU the result is the linear map followed by one elementwise maximum (:class:`ChannelFloor`), the cost of
        a plain layer: ``relu(u) - m = max(u - m, -m)``. Others get their activation and a :class:`ChannelAffine`. The
        parameters are copies, computed in float64.

        Raises:
            RuntimeError: For ``border="exact"``, whose correction depends on the size of the input.
        """
        raise NotImplementedError

    def _fold_into(self, linear: nn.Module) -> nn.Module:
        scale, bias, tail = self._folded_units()
        weight, target = self.weight.detach().double(), linear.get_parameter("weight")
        factor = self._fan_gain() / safe_norm(self._rows(weight))
        target.copy_(self._scaled(weight, factor if scale is None else factor * scale))
        if bias is not None:
            linear.get_parameter("bias").copy_(bias)
        head: list[nn.Module] = [UnitizeSamples(1 + self.spatial)] if self.unitize else []
        linear.train(self.training)
        return nn.Sequential(*head, linear, *tail) if head or tail else linear
