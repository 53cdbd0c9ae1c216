"""Elementwise functions: activations and what propagation needs to know of them, and tables that act per channel.

A positively homogeneous activation (ReLU, leaky ReLU, PReLU, identity) has closed-form Gaussian moments and lets the
standardization fold into the weight. Every other elementwise function is handled by quadrature, split at its kinks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexnorm._messages import unknown_name

UNITIZE_EPS = 1e-6  # added to a sample's mean square, so that an all-zero sample stays zero


@dataclass(frozen=True)
class Activation:
    """An elementwise activation as Normalization Propagation sees it.

    Args:
        name: What is shown in ``repr`` and in reports.
        function: The elementwise function. Ignored where ``negative_slope`` is given.
        kinks: Arguments at which the function or one of its low derivatives jumps; the quadrature is split there. A
            kink that is not declared costs accuracy (about 1e-3 of the variance for a ReLU-like kink), nothing else.
        negative_slope: For ``u`` if ``u > 0`` else ``negative_slope * u``: closed forms instead of quadrature. None:
            not of that kind.
        slopes: Number of trainable negative slopes (PReLU): 0 none, 1 shared, C one per channel.

    Examples:
        >>> import torch
        >>> Activation("softsign", torch.nn.functional.softsign, kinks=(0.0,)).name
        'softsign'
    """

    name: str
    function: Callable[[Tensor], Tensor]
    kinks: tuple[float, ...] = ()
    negative_slope: float | None = None
    slopes: int = 0

    @property
    def homogeneous(self) -> bool:
        """Whether ``act(k u) = k act(u)`` for ``k > 0``."""
        return self.negative_slope is not None

    @property
    def is_identity(self) -> bool:
        """Whether ``act(u) = u``."""
        return self.negative_slope == 1.0 and not self.slopes

    def __call__(self, u: Tensor, slope: Tensor | None = None) -> Tensor:
        """Apply the activation; ``slope``, broadcastable to ``u``, replaces ``negative_slope`` where trainable."""
        if slope is not None:
            # Not F.prelu: it takes channels from axis 1 only, and these layers also see unbatched input and
            # quadrature nodes.
            return F.relu(u) - slope * F.relu(-u)
        return self.function(u)


ActivationLike = str | nn.Module | Callable[[Tensor], Tensor] | Activation


def _identity(u: Tensor) -> Tensor:
    return u


def _leaky(name: str, slope: float, slopes: int = 0) -> Activation:
    return Activation(name, functools.partial(F.leaky_relu, negative_slope=float(slope)), (), float(slope), slopes)


def _with(function: Callable[..., Tensor], kinks: tuple[float, ...] = (), **settings: float) -> Activation:
    values = {name: float(value) for name, value in settings.items()}
    return Activation(function.__name__, functools.partial(function, **values), kinks)


_KINKS: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(("gelu", "silu", "mish", "softplus", "tanh", "sigmoid"), ()),
    **dict.fromkeys(("elu", "selu", "celu"), (0.0,)),
    "relu6": (0.0, 6.0),
    "hardtanh": (-1.0, 1.0),
    "hardsigmoid": (-3.0, 3.0),
    "hardswish": (-3.0, 3.0),
}
ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation("relu", F.relu, negative_slope=0.0),
    "leaky_relu": Activation("leaky_relu", F.leaky_relu, negative_slope=0.01),
    "prelu": _leaky("prelu", 0.25, 1),
    "identity": Activation("identity", _identity, negative_slope=1.0),
    "gelu_tanh": Activation("gelu_tanh", functools.partial(F.gelu, approximate="tanh")),
    **{name: Activation(name, getattr(F, name), kinks) for name, kinks in _KINKS.items()},
}
"""The activations that are known by name."""

ACTIVATION_MODULES: dict[type[nn.Module], str | Callable[[Any], Activation]] = {
    **{kind: kind.__name__.lower() for kind in (nn.ReLU, nn.ReLU6, nn.Identity, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid)},
    **{kind: kind.__name__.lower() for kind in (nn.SELU, nn.Hardsigmoid, nn.Hardswish)},
    nn.GELU: lambda m: ACTIVATIONS["gelu" if m.approximate == "none" else "gelu_tanh"],
    nn.PReLU: lambda m: _leaky("prelu", m.init, m.num_parameters),
    nn.LeakyReLU: lambda m: _leaky("leaky_relu", m.negative_slope),
    nn.ELU: lambda m: _with(F.elu, (0.0,), alpha=m.alpha),
    nn.CELU: lambda m: _with(F.celu, (0.0,), alpha=m.alpha),
    nn.Hardtanh: lambda m: _with(
        F.hardtanh, (float(m.min_val), float(m.max_val)), min_val=m.min_val, max_val=m.max_val
    ),
    nn.Softplus: lambda m: _with(F.softplus, beta=m.beta, threshold=m.threshold),
}
"""Torch's activation modules, by exact type (a subclass may do something else): a name, or how settings are read."""


def resolve_activation(activation: ActivationLike | None) -> Activation | None:
    """Return the :class:`Activation` that a user's argument means (None stays None: a layer without activation).

    Args:
        activation: A name (``"relu"``, ``"gelu"``, ...), an activation module (its settings are read, the module is
            not kept where torch's own type is known), an elementwise function of one tensor, an :class:`Activation`,
            or None.

    Raises:
        ValueError: For an unknown name.
        TypeError: For anything else, or for a module with parameters other than ``nn.PReLU``.
    """
    if activation is None or isinstance(activation, Activation):
        return activation
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ValueError(unknown_name("activation", activation, ACTIVATIONS))
        return ACTIVATIONS[activation]
    if isinstance(activation, nn.Module):
        kind = type(activation)
        known = ACTIVATION_MODULES.get(kind)
        if known is not None:
            return ACTIVATIONS[known] if isinstance(known, str) else known(activation)
        if any(True for _ in activation.parameters()) or any(True for _ in activation.buffers()):
            raise TypeError(
                f"activation {kind.__name__} has parameters or buffers that Normalization Propagation does not know; "
                "pass a plain elementwise function, or an Activation"
            )
        return Activation(kind.__name__.lower(), activation)
    if callable(activation):
        named = next((entry for entry in ACTIVATIONS.values() if entry.function is activation), None)
        return named or Activation(getattr(activation, "__name__", type(activation).__name__), activation)
    raise TypeError(
        "activation must be a name, an activation module, an elementwise function, an Activation or None, "
        f"got {activation!r}"
    )


# -- per channel and per sample


def per_channel(table: Tensor, spatial: int, like: Tensor) -> Tensor:
    """Return a (C,) table shaped to broadcast over ``spatial`` trailing axes, in the dtype of ``like``."""
    return table.to(like.dtype).reshape(-1, *(1,) * spatial)


def channel_affine(x: Tensor, scale: Tensor, shift: Tensor, spatial: int) -> Tensor:
    """``scale[c] * x[n, c, ...] + shift[c]`` with ``spatial`` axes after the channels.

    In eager mode this is torch's batch norm of evaluation: one pass forward, and a backward that yields the gradients
    of x, scale and shift together, where a separate multiply and add take twice as many passes. Compilers get the
    plain expression to fuse.
    """
    fits = x.dim() == 2 + spatial and x.numel() > 0 and torch.promote_types(x.dtype, scale.dtype) == scale.dtype
    if torch.compiler.is_compiling() or not fits:
        return x * per_channel(scale, spatial, x) + per_channel(shift, spatial, x)
    zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
    return F.batch_norm(x, zeros, ones, scale, shift, training=False, eps=0.0)


def unitize_samples(x: Tensor, sample_dims: int, eps: float = UNITIZE_EPS) -> Tensor:
    """Divide every sample by its root mean square over its last ``sample_dims`` axes: ``x / sqrt(mean(x^2) + eps)``.

    The norm of a sample then cannot run away with depth, whatever gamma and bias are. This is the idea of unitization
    (Huang and Yu, CVPR 2020, arXiv 2001.02814) with the root mean square as the norm, and without statistics of the
    batch.

    Args:
        x: ``(..., *sample)``.
        sample_dims: Number of trailing axes that form a sample (1 for feature vectors, 1 + spatial axes for feature
            maps).
        eps: Added to the mean square.

    Returns:
        A tensor like ``x``; the norm is accumulated in float32 where ``x`` has half precision.
    """
    dims = tuple(range(-sample_dims, 0))
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    size = max(1, math.prod(x.shape[-sample_dims:]))
    # The norm, not x.square().mean(): one pass and no temporary of the size of x.
    mean_square = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=dtype).square() / size
    return x * torch.rsqrt(mean_square + eps).to(x.dtype)


# -- plain inference modules, of which folded layers are made


class UnitizeSamples(nn.Module):
    """:func:`unitize_samples` as a module, with the same arguments."""

    def __init__(self, sample_dims: int, eps: float = UNITIZE_EPS) -> None:
        super().__init__()
        self.sample_dims = sample_dims
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with every sample at unit mean square."""
        return unitize_samples(x, self.sample_dims, self.eps)

    def extra_repr(self) -> str:
        """Arguments as given."""
        return f"sample_dims={self.sample_dims}, eps={self.eps}"


class ChannelTables(nn.Module):
    """Base of the following: tables ``(C,)``, kept as buffers in the shape in which they broadcast over x.

    Args:
        spatial: Number of axes after the channels.
        dtype: Of the stored tables.
        **tables: By name; None where a table has no effect.
    """

    def __init__(self, spatial: int, dtype: torch.dtype, **tables: Tensor | None) -> None:
        super().__init__()
        for name, table in tables.items():
            value = None if table is None else table.detach().to(dtype).reshape(-1, *(1,) * spatial).clone()
            self.register_buffer(name, value)


class ChannelFloor(ChannelTables):
    """``max(x, floor[c])``: a ReLU whose lower limit differs by channel.

    It overwrites its input where no gradient is asked for, as ``nn.ReLU(inplace=True)`` does: it stands behind a
    linear map of its own.
    """

    floor: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return ``max(x, floor)``, of the shape of ``x``."""
        floor = self.floor.to(x.dtype)
        if not torch.compiler.is_compiling() and not (x.requires_grad and torch.is_grad_enabled()):
            return x.clamp_(min=floor)
        return torch.maximum(x, floor)


class ChannelPReLU(ChannelTables):
    """``x`` where positive, ``slope[c] * x`` elsewhere; unlike ``nn.PReLU`` also for inputs without a batch axis."""

    slope: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return the rectified ``x``."""
        return torch.where(x > 0, x, self.slope.to(x.dtype) * x)


class ChannelAffine(ChannelTables):
    """``scale[c] * x + shift[c]``; a ``scale`` of None stands for 1."""

    scale: Tensor | None
    shift: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return the affine map of ``x``."""
        shift = self.shift.to(x.dtype)
        return x + shift if self.scale is None else torch.addcmul(shift, x, self.scale.to(x.dtype))


class ChannelPad(ChannelTables):
    """Pad an image with a constant per channel, ``value[c]``; ``pads`` are widths as of ``F.pad``."""

    value: Tensor

    def __init__(self, pads: list[int], spatial: int, dtype: torch.dtype, value: Tensor) -> None:
        super().__init__(spatial, dtype, value=value)
        self.pads = list(pads)

    def forward(self, x: Tensor) -> Tensor:
        """Return the padded ``x``."""
        value = self.value.to(x.dtype)
        return F.pad(x - value, self.pads) + value


class Elementwise(nn.Module):
    """An activation as a module."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Return ``activation(x)``."""
        return self.activation(x)

    def extra_repr(self) -> str:
        """The activation's name."""
        return repr(self.activation.name)


def activation_module(activation: Activation) -> nn.Module:
    """Return torch's own module of ``activation`` where there is one (exporters know it), else Elementwise."""
    plain = {F.relu: nn.ReLU, F.gelu: nn.GELU, F.silu: nn.SiLU, F.tanh: nn.Tanh, F.sigmoid: nn.Sigmoid}
    plain |= {F.mish: nn.Mish, F.elu: nn.ELU}
    kind = plain.get(activation.function)
    return Elementwise(activation) if kind is None else kind()
