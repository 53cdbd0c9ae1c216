"""Mean, variance and gains of ``act(gamma z + beta)``, z ~ N(0, 1): what NormProp uses instead of statistics.

The paper (Arpit et al., ICML 2016, arXiv 1603.01431) standardizes with the constants of gamma = 1, beta = 0. Here
they are functions of gamma and beta, exact at any value and differentiable, so that training the affine parameters
does not break the propagation.

With s = abs(gamma), r = beta / s, Phi and phi the standard normal distribution function and density, and the leaky
rectifier ``act(u) = a u + (1 - a) relu(u)`` (ReLU: a = 0, identity: a = 1)::

    e(r) = phi(r) + r Phi(r)                                                      mean of relu(z + r)
    v(r) = Phi(r) + r^2 Phi(r) Phi(-r) + r phi(r) (Phi(-r) - Phi(r)) - phi(r)^2   its variance
    mean = a beta + (1 - a) s e(r)
    var  = s^2 (a^2 + 2 a (1 - a) Phi(r) + (1 - a)^2 v(r))

``v`` is written without the difference of two large squares, so it stays accurate as gamma -> 0 (r -> infinity),
where the map becomes linear and v -> 1. Everything else goes through :mod:`flexnorm.nn.normprop.quadrature`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flexnorm.nn.normprop.activations import Activation, resolve_activation
from flexnorm.nn.normprop.quadrature import gaussian_nodes

ActivationLike = str | nn.Module | Callable[[Tensor], Tensor] | Activation


class GaussianMoments(NamedTuple):
    """Mean and variance of an activation of a Gaussian, each of the broadcast shape of gamma and beta."""

    mean: Tensor
    var: Tensor


class Gains(NamedTuple):
    """How one standardized layer changes small perturbations, per unit.

    Attributes:
        chi: Slope at 1 of the map from a sample's mean square before the layer to that after it. Above 1, single
            samples run away.
        jacobian: Mean squared derivative: the expected squared gain of a random perturbation of a sample (and of its
            gradient).
        correlation: Slope at 0 of the map between the correlations of two samples before and after the layer.
    """

    chi: Tensor
    jacobian: Tensor
    correlation: Tensor


def _pair(gamma: Tensor | float, beta: Tensor | float) -> tuple[Tensor, Tensor]:
    tensors = [t for t in (gamma, beta) if isinstance(t, Tensor)]
    dtype = tensors[0].dtype if tensors else torch.float64
    if not dtype.is_floating_point:
        raise TypeError(f"gamma and beta must be floating point, got {dtype}")
    # Half precision has too few digits for the differences below; these are tables of C numbers.
    dtype = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    device = tensors[0].device if tensors else None
    g, b = (torch.as_tensor(t, dtype=dtype, device=device) for t in (gamma, beta))
    g, b = torch.broadcast_tensors(g, b)  # type: ignore[no-untyped-call]
    return g, b


def _normal(r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Phi(r), Phi(-r) and phi(r)."""
    return torch.special.ndtr(r), torch.special.ndtr(-r), torch.exp(-0.5 * r * r) / math.sqrt(2.0 * math.pi)


def _ratio(gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return abs(gamma) and r, kept finite: beyond |r| = 40 every function of r is at its limit in float64."""
    s = gamma.abs()
    safe = s.clamp_min(torch.finfo(s.dtype).tiny ** 0.5)
    return s, (beta / safe).clamp(-40.0, 40.0)


def _slope(activation: Activation, slope: Tensor | None, like: Tensor) -> Tensor | float:
    if slope is not None:
        return slope.to(like.dtype)
    return float(activation.negative_slope or 0.0)


def _precise(table: Tensor) -> Tensor:
    """Return the table in float64 where the device has it: the normal tails need more digits than float32 has."""
    return table if table.device.type == "mps" else table.double()


def _leaky_moments(gamma: Tensor, beta: Tensor, a: Tensor | float) -> GaussianMoments:
    dtype = gamma.dtype
    gamma, beta, a = _precise(gamma), _precise(beta), _precise(a) if isinstance(a, Tensor) else a
    s, r = _ratio(gamma, beta)
    Phi, Q, phi = _normal(r)
    v = (Phi + r * r * Phi * Q + r * phi * (Q - Phi) - phi * phi).clamp_min(0.0)
    if isinstance(a, float) and a == 0.0:
        return GaussianMoments((beta * Phi + s * phi).to(dtype), (s * s * v).to(dtype))
    mean = beta * (a + (1 - a) * Phi) + (1 - a) * s * phi
    var = s * s * (a * a + 2 * a * (1 - a) * Phi + (1 - a) ** 2 * v)
    return GaussianMoments(mean.to(dtype), var.to(dtype))


def _checked(activation: ActivationLike) -> Activation:
    resolved = resolve_activation(activation)
    if resolved is None:
        raise ValueError("activation must not be None here; use 'identity' for a linear map")
    return resolved


def activation_moments(
    activation: ActivationLike,
    gamma: Tensor | float = 1.0,
    beta: Tensor | float = 0.0,
    *,
    slope: Tensor | None = None,
    nodes: int | None = None,
) -> GaussianMoments:
    """Mean and variance of ``act(gamma z + beta)``, z ~ N(0, 1), differentiable in gamma, beta and slope.

    Generalizes c2 (the mean) and c1 (the standard deviation) of Eqs. 9-12 of the NormProp paper from gamma = 1, beta
    = 0 to any value.

    Args:
        activation: A name, an activation module, an elementwise function or an :class:`Activation`.
        gamma: Scale of the pre-activation, any shape, any sign, zero included.
        beta: Shift of the pre-activation, broadcastable with gamma.
        slope: Negative slope of PReLU where it is trainable, broadcastable with gamma.
        nodes: Quadrature nodes; None for the defaults, which reach float32 precision for the named activations with
            abs(gamma) <= 4.

    Returns:
        :class:`GaussianMoments`; float64 where both arguments are Python numbers, at least float32 otherwise.

    Raises:
        TypeError: If gamma or beta is not floating point, or the activation is of no known kind.
        ValueError: If the activation's name is unknown.

    Examples:
        >>> mean, var = activation_moments("relu")
        >>> round(float(mean), 6), round(float(var.sqrt()), 6)
        (0.398942, 0.583819)
    """
    act = _checked(activation)
    g, b = _pair(gamma, beta)
    if act.homogeneous:
        return _leaky_moments(g, b, _slope(act, slope, g))
    z, w = gaussian_nodes(g, b, act.kinks, nodes)
    values = act(g.unsqueeze(-1) * z + b.unsqueeze(-1))
    mean = (values * w).sum(-1)
    # Two passes: no difference of large squares when gamma is small.
    return GaussianMoments(mean, ((values - mean.unsqueeze(-1)).square() * w).sum(-1))


def _derivative(act: Activation, u: Tensor) -> Tensor:
    """act'(u); differentiable itself only where u is part of a graph."""
    wanted = u.requires_grad and torch.is_grad_enabled()
    with torch.enable_grad():
        point = u if wanted else u.detach().requires_grad_()
        (d,) = torch.autograd.grad(act(point).sum(), point, create_graph=wanted)
    return d


def activation_gains(
    activation: ActivationLike,
    gamma: Tensor | float = 1.0,
    beta: Tensor | float = 0.0,
    *,
    center: Tensor | float | None = None,
    variance: Tensor | float | None = None,
    slope: Tensor | None = None,
    nodes: int | None = None,
) -> Gains:
    """Gains of ``y = (act(gamma z + beta) - center) / sqrt(variance)`` at z ~ N(0, 1), from the parameters alone.

    With h(z) = act(gamma z + beta) - center::

        chi         = d/dq E[h(sqrt(q) z)^2] / variance at q = 1 = E[(z^2 - 1) h^2] / (2 variance)
        jacobian    = gamma^2 E[act'(gamma z + beta)^2] / variance
        correlation = gamma^2 E[act'(gamma z + beta)]^2 / variance

    For ReLU these are gamma (gamma Phi - E phi) / var, gamma^2 Phi / var and gamma^2 Phi^2 / var.

    Args:
        activation: As in :func:`activation_moments`.
        gamma: Scale, any shape.
        beta: Shift, broadcastable with gamma.
        center: What the layer subtracts; None for the exact mean.
        variance: What the layer divides by (squared); None for the exact variance.
        slope: Trainable negative slope of PReLU.
        nodes: Quadrature nodes.

    Returns:
        :class:`Gains`, each of the broadcast shape of gamma and beta.

    Raises:
        TypeError: As in :func:`activation_moments`.
        ValueError: As in :func:`activation_moments`.

    Examples:
        >>> gains = activation_gains("relu")
        >>> round(float(gains.chi), 4), round(float(gains.jacobian), 4)
        (1.0, 1.4669)
    """
    act = _checked(activation)
    g, b = _pair(gamma, beta)
    exact = activation_moments(act, g, b, slope=slope, nodes=nodes)
    m = exact.mean if center is None else center
    var = exact.var if variance is None else variance
    if act.homogeneous:
        a = _slope(act, slope, g)
        s, r = _ratio(g, b)
        Phi, Q, phi = _normal(r)
        energy = s * s * (Phi + a * a * Q)
        # Heat equation: d/dq E[f(u)] = s^2 E[f''] / 2, and act'' is a point mass (1 - a) at the kink.
        return Gains((energy - m * s * (1 - a) * phi) / var, energy / var, s * s * (Phi + a * Q) ** 2 / var)
    z, w = gaussian_nodes(g, b, act.kinks, nodes)
    u = g.unsqueeze(-1) * z + b.unsqueeze(-1)
    h = act(u) - torch.as_tensor(m, dtype=g.dtype, device=g.device).unsqueeze(-1)
    d = _derivative(act, u)
    chi = 0.5 * ((z * z - 1) * h.square() * w).sum(-1)
    return Gains(chi / var, g * g * (d.square() * w).sum(-1) / var, g * g * (d * w).sum(-1) ** 2 / var)
