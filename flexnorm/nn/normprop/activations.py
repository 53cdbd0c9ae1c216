"""Which activation a NormProp layer applies, and what its propagation needs to know about it.

A positively homogeneous activation, ``act(k u) = k act(u)`` for ``k > 0`` (ReLU, leaky ReLU, PReLU, identity), has
closed-form Gaussian moments and lets the standardization fold into the weight. Every other elementwise function is
handled by quadrature, split at its kinks so that piecewise smooth functions are integrated as accurately as smooth
ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from flexnorm._messages import unknown_name


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

    def __call__(self, u: Tensor, slope: Tensor | None = None) -> Tensor:
        """Apply the activation; ``slope``, broadcastable to ``u``, replaces ``negative_slope`` where trainable."""
        if slope is not None:
            # Not F.prelu: it takes channels from axis 1 only, and these layers also see unbatched input and
            # quadrature nodes.
            return F.relu(u) - slope * F.relu(-u)
        return self.function(u)


def _identity(u: Tensor) -> Tensor:
    return u


def _table() -> dict[str, Activation]:
    entries = [
        Activation("relu", F.relu, negative_slope=0.0),
        Activation("leaky_relu", F.leaky_relu, negative_slope=0.01),
        Activation("prelu", functools.partial(F.leaky_relu, negative_slope=0.25), negative_slope=0.25, slopes=1),
        Activation("identity", _identity, negative_slope=1.0),
        Activation("gelu", F.gelu),
        Activation("gelu_tanh", functools.partial(F.gelu, approximate="tanh")),
        Activation("silu", F.silu),
        Activation("mish", F.mish),
        Activation("softplus", F.softplus),
        Activation("tanh", F.tanh),
        Activation("sigmoid", F.sigmoid),
        Activation("elu", F.elu, kinks=(0.0,)),
        Activation("selu", F.selu, kinks=(0.0,)),
        Activation("celu", F.celu, kinks=(0.0,)),
        Activation("relu6", F.relu6, kinks=(0.0, 6.0)),
        Activation("hardtanh", F.hardtanh, kinks=(-1.0, 1.0)),
        Activation("hardsigmoid", F.hardsigmoid, kinks=(-3.0, 3.0)),
        Activation("hardswish", F.hardswish, kinks=(-3.0, 3.0)),
    ]
    return {entry.name: entry for entry in entries}


ACTIVATIONS: dict[str, Activation] = _table()
"""The activations that are known by name."""


def _from_module(module: nn.Module) -> Activation:
    # Exact types only: a subclass may compute something else.
    kind = type(module)
    if isinstance(module, nn.PReLU) and kind is nn.PReLU:
        value = float(module.init)
        return Activation(
            "prelu", functools.partial(F.leaky_relu, negative_slope=value), (), value, module.num_parameters
        )
    if isinstance(module, nn.LeakyReLU) and kind is nn.LeakyReLU:
        value = float(module.negative_slope)
        return Activation("leaky_relu", functools.partial(F.leaky_relu, negative_slope=value), (), value)
    if isinstance(module, nn.ELU) and kind is nn.ELU:
        return Activation("elu", functools.partial(F.elu, alpha=float(module.alpha)), (0.0,))
    if isinstance(module, nn.CELU) and kind is nn.CELU:
        return Activation("celu", functools.partial(F.celu, alpha=float(module.alpha)), (0.0,))
    if isinstance(module, nn.GELU) and kind is nn.GELU:
        return ACTIVATIONS["gelu" if module.approximate == "none" else "gelu_tanh"]
    if isinstance(module, nn.Hardtanh) and kind is nn.Hardtanh:
        low, high = float(module.min_val), float(module.max_val)
        return Activation("hardtanh", functools.partial(F.hardtanh, min_val=low, max_val=high), (low, high))
    if isinstance(module, nn.Softplus) and kind is nn.Softplus:
        return Activation(
            "softplus", functools.partial(F.softplus, beta=float(module.beta), threshold=float(module.threshold))
        )
    plain: dict[type[nn.Module], str] = {
        nn.ReLU: "relu",
        nn.Identity: "identity",
        nn.SiLU: "silu",
        nn.Mish: "mish",
        nn.Tanh: "tanh",
        nn.Sigmoid: "sigmoid",
        nn.SELU: "selu",
        nn.ReLU6: "relu6",
        nn.Hardsigmoid: "hardsigmoid",
        nn.Hardswish: "hardswish",
    }
    if kind in plain:
        return ACTIVATIONS[plain[kind]]
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        raise TypeError(
            f"activation {kind.__name__} has parameters or buffers that Normalization Propagation does not know; "
            "pass a plain elementwise function, or an Activation"
        )
    return Activation(kind.__name__.lower(), module)


def resolve_activation(
    activation: str | nn.Module | Callable[[Tensor], Tensor] | Activation | None,
) -> Activation | None:
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
        return _from_module(activation)
    if callable(activation):
        for known in ACTIVATIONS.values():
            if known.function is activation:
                return known
        return Activation(getattr(activation, "__name__", type(activation).__name__), activation)
    raise TypeError(
        "activation must be a name, an activation module, an elementwise function, an Activation or None, "
        f"got {activation!r}"
    )
