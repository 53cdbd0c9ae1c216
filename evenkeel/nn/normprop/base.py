"""The base of all NormProp layers: linear map with unit filters, activation and standardization in one module.

Paper: Arpit, Zhou, Kota, Govindaraju, "Normalization Propagation" (ICML 2016, arXiv 1603.01431), Eqs. 9, 11, 12.
    Deviations, each an
option whose other value is the paper's:

- ``constants="exact"``: mean and standard deviation follow gamma and bias instead of being those of gamma = 1, bias =
  0;
- ``init="stable"``: a positive initial bias, so that the mean square of single samples contracts with depth;
- ``unitize=True``: every sample divided by its root mean square before the linear map;
- ``eps`` is added to the variance, so that a unit whose activation has become constant is quiet instead of infinite;
- a zero filter yields zero and a finite gradient instead of NaN.

The forward pass is not written as the equation. For a positively homogeneous activation, 1 / std moves into the
weight and bias, since ``act(k u) = k act(u)`` for ``k > 0``, and one elementwise pass over the activations
disappears::

    (act(gamma W x / ||W|| + bias) - mean) / std = act(gamma / (std ||W||) W x + bias / std) - mean / std
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evenkeel._messages import unknown_name
from evenkeel.nn.normprop.activations import Activation, resolve_activation
from evenkeel.nn.normprop.constants import ActivationLike, Gains, GaussianMoments, activation_gains, activation_moments
from evenkeel.nn.normprop.elementwise import UnitizeSamples, channel_affine, per_channel, unitize_samples
from evenkeel.nn.normprop.folded import ChannelAffine, ChannelFloor, ChannelPReLU, activation_module
from evenkeel.nn.normprop.initialization import initial_affine
from evenkeel.nn.normprop.tables import rectifier_tables
from evenkeel.nn.normprop.weights import safe_norm

CONSTANTS = ("exact", "paper")
INITS = ("stable", "paper")


class NormPropLayer(nn.Module):
    """Base class of the linear, convolutional and transposed layers; not used by itself.

    ``weight`` is divided by the norm of each filter in the forward pass, so the function does not depend on the
    filters' lengths: optimizers on the sphere may treat every row of it as a scale-invariant vector.

    Attributes:
        weight: Filters; every filter starts with unit norm.
        gamma: ``(C,)`` scales of the pre-activations, or None for ``activation="identity"``, where it would have no
            effect.
        bias: ``(C,)`` shifts of the pre-activations, or None for ``activation="identity"``.
        slope: Trainable negative slope(s) of PReLU, else None.
        in_channels: Channels (features) of the input.
        out_channels: Number of units C.
        activation: The resolved :class:`Activation`, or None for an affine layer without standardization.
        constants: ``"exact"`` or ``"paper"``.
        init: ``"stable"`` or ``"paper"``.
        unitize: Whether each sample is divided by its root mean square first.
        eps: Added to the variance of the activation (in units of the activation squared).
        groups: Groups of channels that the linear map keeps apart (1 for linear).
        spatial: Number of spatial axes (0 for linear).
    """

    in_channels: int
    out_channels: int
    spatial: int = 0

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
        super().__init__()
        if constants not in CONSTANTS:
            raise ValueError(unknown_name("constants", constants, CONSTANTS))
        chosen = ("stable" if constants == "exact" else "paper") if init is None else init
        if chosen not in INITS:
            raise ValueError(unknown_name("init", chosen, INITS))
        if not eps >= 0:
            raise ValueError(f"eps must not be negative, got {eps!r}")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be a real floating point type, got {dtype}")
        self.out_channels = out_channels
        self.groups = groups
        self.activation: Activation | None = resolve_activation(activation)
        self.constants = constants
        self.init = chosen
        self.unitize = bool(unitize)
        self.eps = float(eps)
        self.weight = nn.Parameter(torch.empty(weight_shape, device=device, dtype=dtype))
        self.gamma: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        self.slope: nn.Parameter | None = None
        if not self._is_identity:
            self.gamma = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
            self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        if self.activation is not None and self.activation.slopes:
            if self.activation.slopes not in (1, out_channels):
                raise ValueError(
                    f"PReLU has {self.activation.slopes} slopes, but the layer has {out_channels} channels; "
                    f"use 1 or {out_channels}"
                )
            self.slope = nn.Parameter(torch.empty(self.activation.slopes, device=device, dtype=dtype))
        # The fixed (mean, std) of Eq. 9-12 as Python numbers: they are no state and must survive meta devices and
        # dtype changes.
        self._paper_constants = self._fixed_constants()
        self.reset_parameters()

    @property
    def _is_identity(self) -> bool:
        return self.activation is not None and self.activation.negative_slope == 1.0 and not self.activation.slopes

    def _fixed_constants(self) -> tuple[float, float] | None:
        if self.constants != "paper" or self.activation is None or self.activation.slopes:
            return None
        with torch.device("cpu"), torch.no_grad():
            moments = activation_moments(self.activation)
            return float(moments.mean), float(moments.var.sqrt())

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
        gamma, bias = initial_affine(self.activation, self.init)
        with torch.no_grad():
            if self.gamma is not None and self.bias is not None:
                self.gamma.fill_(gamma)
                self.bias.fill_(bias)
            if self.slope is not None and self.activation is not None and self.activation.negative_slope is not None:
                self.slope.fill_(self.activation.negative_slope)

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

    def standardization(self) -> GaussianMoments:
        """Mean that the layer subtracts and variance by which it divides (eps included), ``(C,)`` each, before folding.

        For ``activation=None`` these are 0 and 1: the affine layer is not standardized.
        """
        like = self._table_like()
        if self.activation is None:
            return GaussianMoments(torch.zeros_like(like), torch.ones_like(like))
        if self._paper_constants is not None:
            mean, std = self._paper_constants
            return GaussianMoments(torch.full_like(like, mean), torch.full_like(like, std * std))
        exact = self.constants == "exact"
        gamma, beta = self.affine() if exact else (torch.ones_like(like), torch.zeros_like(like))
        moments = activation_moments(self.activation, gamma, beta, slope=self.slope)
        # The identity has no gamma that could vanish.
        return moments._replace(var=moments.var + self.eps) if exact and not self._is_identity else moments

    def _table_like(self) -> Tensor:
        half = self.weight.dtype in (torch.float16, torch.bfloat16)
        return torch.empty(
            self.out_channels, dtype=torch.float32 if half else self.weight.dtype, device=self.weight.device
        )

    def affine(self) -> tuple[Tensor, Tensor]:
        """Gamma and bias as ``(C,)`` tensors, 1 and 0 where the layer has none."""
        like = self._table_like()
        if self.gamma is None or self.bias is None:
            return torch.ones_like(like), torch.zeros_like(like)
        return self.gamma, self.bias

    def predicted_moments(self, mean: Tensor | float = 0.0, var: Tensor | float = 1.0) -> GaussianMoments:
        """Mean and variance ``(C,)`` of every output unit if its normalized pre-activation is N(mean, var).

        Args:
            mean: Of the pre-activations ``W x / ||W||``, a number or ``(C,)``.
            var: Likewise.
        """
        gamma, bias = self.affine()
        center, variance = self.standardization()
        mean, var = (torch.as_tensor(t, dtype=center.dtype, device=center.device) for t in (mean, var))
        gamma, bias = gamma * var.sqrt(), bias + gamma * mean
        if self.activation is None:
            return GaussianMoments(bias, gamma.square())
        mean, var = activation_moments(self.activation, gamma, bias, slope=self.slope)
        return GaussianMoments((mean - center) * variance.rsqrt(), var / variance)

    def gains(self) -> Gains:
        """chi, squared Jacobian gain and correlation gain ``(C,)`` of every unit, from the parameters alone.

        The layer's value is the mean over its units. chi > 1: the mean square of single samples runs away with depth.
        With ``unitize=True`` chi is 0 by construction (the output does not depend on the input's length).
        """
        gamma, bias = self.affine()
        if self.activation is None:
            gain = gamma.square()
            return Gains(torch.zeros_like(gain) if self.unitize else gain, gain, gain)
        center, variance = self.standardization()
        gains = activation_gains(self.activation, gamma, bias, center=center, variance=variance, slope=self.slope)
        return gains._replace(chi=torch.zeros_like(gains.chi)) if self.unitize else gains

    # -- forward

    def forward(self, x: Tensor) -> Tensor:
        """Return the standardized activation of the linear map of ``x``.

        Raises:
            ValueError: If ``x`` has the wrong number of axes or channels.
        """
        self._check(x)
        if self.unitize:
            x = unitize_samples(x, 1 + self.spatial)
        if self.gamma is None or self.bias is None:
            return self._linear_part(x, None, None)
        if self.activation is None:
            return self._linear_part(x, self.gamma, self.bias)
        a = self.activation.negative_slope
        if a is not None and self.slope is None and self.constants == "exact":
            scale, shift, offset = rectifier_tables(self.gamma, self.bias, a, self.eps)
            # Add the negative table: the gradient of a subtraction would negate a whole activation before it is summed.
            u = self._linear_part(x, scale, shift)
            return self._rectify(u, self.activation) + per_channel(-offset, self.spatial, u)
        mean, var = self.standardization()
        inverse = var.rsqrt()
        if a is not None:
            u = self._linear_part(x, self.gamma * inverse, self.bias * inverse)
            return self._rectify(u, self.activation) + per_channel(-mean * inverse, self.spatial, u)
        u = self._linear_part(x, self.gamma, self.bias)
        return channel_affine(self.activation(u), inverse, -mean * inverse, self.spatial)

    def _linear_part(self, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        factor = self._fan_gain() / self.filter_norms()
        weight = self._scaled(self.weight, factor if scale is None else factor * scale).to(self.weight.dtype)
        border = self._border_scale(x, self._scaled(self.weight, factor))
        if border is None:
            return self._linear(x, weight, None if shift is None else shift.to(self.weight.dtype))
        u = self._linear(x, weight, None)
        u = u * border.to(u.dtype)
        return u if shift is None else u + per_channel(shift, self.spatial, u)

    def _rectify(self, u: Tensor, activation: Activation) -> Tensor:
        if self.slope is not None:
            return activation(u, per_channel(self.slope.expand(self.out_channels), self.spatial, u))
        if activation.negative_slope == 0.0:
            # The linear map is ours and its backward does not need its output, so the rectifier may overwrite it.
            return F.relu_(u)
        return activation(u)

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

    def _folded_tail(self) -> tuple[Tensor, Tensor | None, list[nn.Module]]:
        """Scale of the filters, bias of the linear map, and the modules that follow it; tables in float64."""
        table: dict[str, Tensor | None] = {}
        for name in ("gamma", "bias", "slope"):
            value = getattr(self, name)
            table[name] = None if value is None else value.detach().double()
        factor = self._fan_gain() / safe_norm(self._rows(self.weight.detach().double()))
        gamma, bias = table["gamma"], table["bias"]
        if gamma is None or bias is None:
            return factor, None, []
        if self.activation is None:
            return factor * gamma, bias, []
        if self.constants == "exact":
            moments = activation_moments(self.activation, gamma, bias, slope=table["slope"])
            mean, var = moments.mean, moments.var + self.eps
        else:
            one = torch.ones_like(gamma)
            mean, var = activation_moments(self.activation, one, 0 * one, slope=table["slope"])
        inverse, dtype = var.rsqrt(), self.weight.dtype
        shift = -mean * inverse
        if not self.activation.homogeneous:
            return (
                factor * gamma,
                bias,
                [activation_module(self.activation), ChannelAffine(inverse, shift, self.spatial, dtype)],
            )
        scale = factor * gamma * inverse
        if self.slope is None and self.activation.negative_slope == 0.0:
            return scale, bias * inverse + shift, [ChannelFloor(shift, self.spatial, dtype)]
        tail: list[nn.Module] = [ChannelAffine(None, shift, self.spatial, dtype)]
        slope = table["slope"]
        if slope is not None:
            return scale, bias * inverse, [ChannelPReLU(slope.expand(self.out_channels), self.spatial, dtype), *tail]
        return scale, bias * inverse, [activation_module(self.activation), *tail]

    def _fold_into(self, linear: nn.Module) -> nn.Module:
        scale, bias, tail = self._folded_tail()
        weight, target = self.weight.detach(), linear.get_parameter("weight")
        target.copy_(self._scaled(weight.double(), scale))
        if bias is not None:
            linear.get_parameter("bias").copy_(bias)
        head: list[nn.Module] = [UnitizeSamples(1 + self.spatial)] if self.unitize else []
        linear.train(self.training)
        return nn.Sequential(*head, linear, *tail) if head or tail else linear

    def _options(self) -> str:
        name = None if self.activation is None else self.activation.name
        parts = [f"activation={name!r}", f"constants={self.constants!r}", f"init={self.init!r}"]
        if self.unitize:
            parts.append("unitize=True")
        if self.eps != DEFAULT_EPS:
            parts.append(f"eps={self.eps}")
        return ", ".join(parts)


DEFAULT_EPS = 1e-5
"""Added to the variance of an activation, whose size at gamma = 1 is 0.34 for ReLU."""
