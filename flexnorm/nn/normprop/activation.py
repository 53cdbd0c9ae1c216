"""Activation and standardization: the units of every NormProp layer, and the layer that is nothing but these."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexnorm.engine import Checked
from flexnorm.kernels import shift_clamp
from flexnorm.nn.normprop.checks import Spatial, one_of, positive
from flexnorm.nn.normprop.elementwise import (
    Activation,
    ActivationLike,
    ChannelAffine,
    ChannelFloor,
    ChannelPReLU,
    activation_module,
    channel_affine,
    per_channel,
    resolve_activation,
)
from flexnorm.nn.normprop.integrals import (
    Gains,
    GaussianMoments,
    activation_gains,
    activation_moments,
    initial_affine,
    rectifier_tables,
)

Linear = Callable[[Tensor | None, Tensor | None], Tensor]

DEFAULT_EPS = 1e-5
"""Added to the variance of an activation, whose size at gamma = 1 is 0.34 for ReLU."""


class UnitOptions(TypedDict, total=False):
    """Constructor arguments that everything with an activation takes by keyword.

    Attributes:
        init: ``"stable"`` (gamma 1, bias 0.5 for ReLU; see :func:`~flexnorm.nn.normprop.integrals.initial_affine`) or
            ``"paper"`` (gamma 1/1.21, bias 0). None, the default: the one that goes with ``constants``.
        eps: Added to the exact variance; 1e-5 by default.
        device, dtype: Of the parameters, as for torch's layers.
    """

    init: str | None
    eps: float
    device: torch.device | str | None
    dtype: torch.dtype | None


class NormPropUnits(Spatial, Checked, spatial=0):
    """Base class of everything that propagates: ``(act(gamma (z - center) / spread + bias) - mean) / std``.

    z is what the subclass computes. Propagation takes it to be N(0, 1); where it is known not to be, as in a network
    that was converted from a trained one, ``center`` and ``spread`` say what it is instead.

    The constructor takes the number of units C, and what :class:`NormPropLinear` and :class:`UnitOptions` explain.

    Attributes:
        gamma: ``(C,)`` scales of the pre-activations, or None for ``"identity"``, where it would have no effect.
        bias: ``(C,)`` shifts of the pre-activations, or None likewise.
        slope: Trainable negative slope(s) of PReLU, else None.
        center: Buffer ``(C,)``: mean of z, or None for 0. See :meth:`calibrate_`.
        spread: Buffer ``(C,)``: standard deviation of z, or None for 1.
        activation: The resolved :class:`Activation`, or None.
        unitize: Whether each sample is divided by its root mean square first.
        spatial: Number of axes after the channels (0 for linear).
    """

    unitize: bool = False
    gamma: nn.Parameter | None
    bias: nn.Parameter | None
    slope: nn.Parameter | None
    center: Tensor | None
    spread: Tensor | None

    _own_shift = True  # whether the linear map may leave the shift to a kernel of ours

    def __init__(
        self,
        out_channels: int,
        activation: ActivationLike | None,
        constants: str,
        *,
        init: str | None = None,
        eps: float = DEFAULT_EPS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.constants = one_of("constants", constants, ("exact", "paper"))
        self.init = one_of("init", init or ("stable" if constants == "exact" else "paper"), ("stable", "paper"))
        if not eps >= 0:
            raise ValueError(f"eps must not be negative, got {eps!r}")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be a real floating point type, got {dtype}")
        self.out_channels = out_channels
        self.activation: Activation | None = resolve_activation(activation)
        self.eps = float(eps)
        slopes = 0 if self.activation is None else self.activation.slopes
        if slopes not in (0, 1, out_channels):
            raise ValueError(
                f"PReLU has {slopes} slopes, but the layer has {out_channels} channels; use 1 or {out_channels}"
            )
        units = 0 if self.activation is not None and self.activation.is_identity else out_channels
        for name, count in (("gamma", units), ("bias", units), ("slope", slopes)):
            parameter = nn.Parameter(torch.empty(count, device=device, dtype=dtype)) if count else None
            self.register_parameter(name, parameter)
        self.register_buffer("center", None)
        self.register_buffer("spread", None)
        # The fixed (mean, std) of Eq. 9-12 as Python numbers: they are no state and must survive meta devices and
        # dtype changes.
        self._paper_constants: tuple[float, float] | None = None
        if constants == "paper" and self.activation is not None and not slopes:
            with torch.device("cpu"), torch.no_grad():
                mean, var = activation_moments(self.activation)
                self._paper_constants = float(mean), float(var.sqrt())

    @property
    def _stored(self) -> Tensor:
        """A parameter, for its dtype and device."""
        parameter = getattr(self, "weight", self.gamma)
        assert isinstance(parameter, Tensor)
        return parameter

    def _table_like(self) -> Tensor:
        """A table (C,) of the parameters' device and dtype, in float32 at least."""
        like = self._stored
        return torch.empty(self.out_channels, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)

    def preactivations(self, x: Tensor) -> Tensor:
        """z, as propagation takes it to be N(0, 1): for diagnosis."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset gamma, bias and slope."""
        gamma, bias = initial_affine(self.activation, self.init)
        if self.gamma is not None and self.bias is not None:
            self.gamma.fill_(gamma)
            self.bias.fill_(bias)
        if self.slope is not None and self.activation is not None and self.activation.negative_slope is not None:
            self.slope.fill_(self.activation.negative_slope)

    @torch.no_grad()
    def calibrate_(self, center: Tensor | None, spread: Tensor | None) -> None:
        """State mean and standard deviation of the pre-activations before gamma and bias; constants from then on.

        Unit filters give unit variance for uncorrelated inputs. Those of a trained network are correlated, and with
        the moments stated the units are standardized all the same.

        Args:
            center: ``(C,)``, or None for 0.
            spread: ``(C,)``, positive, or None for 1.

        Raises:
            ValueError: For another shape, or a spread that is not positive.
        """
        if center is None or spread is None:
            if center is not spread:
                raise ValueError("give both center and spread, or neither")
            self.center = self.spread = None
            return
        like = self._table_like()
        if center.shape != like.shape or spread.shape != like.shape or not bool((spread > 0).all()):
            raise ValueError(
                f"center and spread must have shape ({self.out_channels},) and spread be positive, "
                f"got {tuple(center.shape)} and {tuple(spread.shape)}"
            )
        self.center, self.spread = center.to(like), spread.to(like)

    def _calibrated(self, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Scale and shift of z where those of ``(z - center) / spread`` are given."""
        if self.spread is None or self.center is None:
            return scale, shift
        scale = self.spread.reciprocal() if scale is None else scale / self.spread
        moved = -self.center * scale
        return scale, moved if shift is None else shift + moved

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
        return moments._replace(var=moments.var + self.eps) if exact and self.gamma is not None else moments

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
            gains = Gains(gamma.square(), gamma.square(), gamma.square())
        else:
            center, variance = self.standardization()
            gains = activation_gains(self.activation, gamma, bias, center=center, variance=variance, slope=self.slope)
        if self.spread is not None:
            # What comes in is white and of unit variance; the pre-activation has the variance that was stated.
            inverse = self.spread.square().reciprocal()
            gains = gains._replace(jacobian=gains.jacobian * inverse, correlation=gains.correlation * inverse)
        return gains._replace(chi=torch.zeros_like(gains.chi)) if self.unitize else gains

    # -- forward

    def _units(self, linear: Linear) -> Tensor:
        """The standardized activation of ``linear(scale, shift)``, which is to return ``scale z + shift``."""
        act = self.activation
        if self.gamma is None or self.bias is None:
            return linear(None, None)
        if act is None:
            return linear(self.gamma, self.bias)
        a = act.negative_slope
        if a is not None and self.slope is None and self.constants == "exact":
            return self._rectified(linear, act, *rectifier_tables(self.gamma, self.bias, a, self.eps))
        mean, var = self.standardization()
        inverse = var.rsqrt()
        if a is not None:
            return self._rectified(linear, act, self.gamma * inverse, self.bias * inverse, mean * inverse)
        u = linear(self.gamma, self.bias)
        return channel_affine(act(u), inverse, -mean * inverse, self.spatial)

    def _rectified(self, linear: Linear, act: Activation, scale: Tensor, shift: Tensor, offset: Tensor) -> Tensor:
        """``act(scale z + shift) - offset`` for a rectifier."""
        relu = self.slope is None and act.negative_slope == 0.0
        if relu and self._own_shift and shift_clamp.may(scale):
            u = linear(scale, None)
            if u.dim() == self.spatial + 2 and shift_clamp.takes(u):
                return shift_clamp.shift_and_clamp_(u, shift - offset, -offset)
            u = u + per_channel(shift, self.spatial, u)
        else:
            u = linear(scale, shift)
        if relu:
            # What made u is ours and its backward does not need its output, so the rectifier may overwrite it.
            u = F.relu_(u)
        elif self.slope is not None:
            u = act(u, per_channel(self.slope.expand(self.out_channels), self.spatial, u))
        else:
            u = act(u)
        # Add the negative table: the gradient of a subtraction would negate a whole activation before it is summed.
        return u + per_channel(-offset, self.spatial, u)

    # -- inference

    def fold(self) -> nn.Module:
        """Return plain modules for the same function: a linear map, then at most two elementwise ones.

        Without a linear map, a scale and shift takes its place. For ReLU the result is the linear map followed by one
        elementwise maximum (:class:`ChannelFloor`), the cost of a plain layer: ``relu(u) - m = max(u - m, -m)``. Others
        get their activation and a :class:`ChannelAffine`. The parameters are copies, computed in float64.

        Raises:
            RuntimeError: For ``border="exact"``, whose correction depends on the size of the input.
        """
        with torch.no_grad():
            return self._folded()

    def _folded(self) -> nn.Module:
        raise NotImplementedError

    def _has_shift(self) -> bool:
        """Whether the folded linear map needs a bias."""
        return self.bias is not None or self.center is not None

    def _folded_units(self) -> tuple[Tensor | None, Tensor | None, list[nn.Module]]:
        """Scale and shift of z (None for 1 and 0), and the modules that follow; tables in float64."""
        twin = copy.deepcopy(self).double()
        act, gamma, bias, slope = self.activation, twin.gamma, twin.bias, twin.slope
        if act is None or gamma is None or bias is None:
            return *twin._calibrated(gamma, bias), []
        mean, var = twin.standardization()
        inverse, dtype = var.rsqrt(), self._stored.dtype
        shift = -mean * inverse
        if not act.homogeneous:
            affine = ChannelAffine(self.spatial, dtype, scale=inverse, shift=shift)
            return *twin._calibrated(gamma, bias), [activation_module(act), affine]
        scale, moved = gamma * inverse, bias * inverse
        if slope is None and act.negative_slope == 0.0:
            return *twin._calibrated(scale, moved + shift), [ChannelFloor(self.spatial, dtype, floor=shift)]
        rectifier = activation_module(act)
        if slope is not None:
            rectifier = ChannelPReLU(self.spatial, dtype, slope=slope.expand(self.out_channels))
        affine = ChannelAffine(self.spatial, dtype, scale=None, shift=shift)
        return *twin._calibrated(scale, moved), [rectifier, affine]

    def _options(self) -> str:
        name = None if self.activation is None else self.activation.name
        text = f"activation={name!r}, constants={self.constants!r}, init={self.init!r}"
        text += ", unitize=True" * self.unitize + ", calibrated" * (self.spread is not None)
        return text + (f", eps={self.eps}" if self.eps != DEFAULT_EPS else "")


class NormPropActivation(NormPropUnits):
    """``(act(gamma x + bias) - mean) / sqrt(var + eps)`` per channel, ``(N, C, *spatial) -> (N, C, *spatial)``.

    The NormProp layer of residual networks that put an activation behind the sum, or before the convolution: the
    input, of zero mean and unit variance, is what the linear map of the other layers would have computed.

    Args:
        channels: Number of channels C.
        activation: Name, module, elementwise function or :class:`Activation`, but neither None nor ``"identity"``,
            which do nothing.
        constants: ``"exact"`` or ``"paper"``, as of :class:`NormPropLinear`.
        spatial: Number of axes after the channels, 0 for ``(..., C)``.
        **options: See :class:`UnitOptions`.

    Raises:
        ValueError: As of :class:`NormPropLinear`, or for an activation that does nothing.
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
        *,
        spatial: int = 2,
        **options: Unpack[UnitOptions],
    ) -> None:
        super().__init__(positive("channels", channels), activation, constants, **options)
        if self.gamma is None or self.activation is None:
            raise ValueError("an activation that does nothing needs no layer; leave it out")
        self.spatial = spatial
        self.reset_parameters()

    def _affine_part(self, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        scale, shift = self._calibrated(scale, shift)
        return x if scale is None or shift is None else channel_affine(x, scale, shift, self.spatial)

    def preactivations(self, x: Tensor) -> Tensor:
        """z, as propagation takes it to be N(0, 1): ``x``, or ``(x - center) / spread`` where these were stated."""
        return self._affine_part(x, None, None)

    def forward(self, x: Tensor) -> Tensor:
        """Return the standardized activation of ``x``.

        Raises:
            ValueError: If ``x`` has the wrong number of axes or channels.
        """
        axis = x.dim() - 1 - self.spatial
        if axis < 0 or x.shape[axis] != self.out_channels:
            raise ValueError(
                f"NormPropActivation expects {self.out_channels} channels before {self.spatial} spatial axes, "
                f"got shape {tuple(x.shape)}"
            )
        return self._units(lambda scale, shift: self._affine_part(x, scale, shift))

    def _folded(self) -> nn.Module:
        scale, shift, tail = self._folded_units()
        assert shift is not None
        return nn.Sequential(ChannelAffine(self.spatial, self._stored.dtype, scale=scale, shift=shift), *tail)

    def extra_repr(self) -> str:
        """Arguments that define the layer."""
        return f"{self.out_channels}, {self._options()}, spatial={self.spatial}"
