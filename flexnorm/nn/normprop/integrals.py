"""Mean, variance and gains of ``act(gamma z + beta)``, z ~ N(0, 1): what NormProp uses instead of statistics.

The paper (Arpit et al., ICML 2016, arXiv 1603.01431) standardizes with the constants of gamma = 1, beta = 0. Here
they are functions of gamma and beta, exact at any value and differentiable, so that training the affine parameters
does not break the propagation: in closed form for ``act(u) = a u + (1 - a) relu(u)``, by quadrature for the rest. The
formulas, why they are accurate, and their derivatives: ``docs/normprop.md``, "The constants". Here s = abs(gamma), r =
beta / s, and Phi, Q and phi are the standard normal distribution function, its tail and its density at r.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexnorm.nn.normprop.elementwise import ACTIVATIONS, Activation, ActivationLike, resolve_activation

LIMIT = 9.0  # half-width L of the integration interval; the neglected tails weigh 2e-19
DEFAULT_NODES = 128  # trapezoidal nodes of a function without kinks
PANEL_NODES = 80  # nodes of every panel of a function with kinks
TARGET_CHI = 0.9  # what init="stable" asks for: 1 is marginal, a tenth of margin survives the fluctuations of layers


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


# -- quadrature


def fejer(nodes: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Fejer's first rule on [-1, 1]: Chebyshev nodes and weights, exact for polynomials of degree below ``nodes``.

    As accurate as Gauss-Legendre in practice, and unlike it made of cosines: no table that would have to be stored,
    moved between devices or traced. Nodes and weights, ``(nodes,)`` each, have dtype and device of ``like``.
    """
    theta = (torch.arange(nodes, dtype=like.dtype, device=like.device) + 0.5) * (math.pi / nodes)
    j = torch.arange(1, nodes // 2 + 1, dtype=like.dtype, device=like.device)
    terms = torch.cos(2.0 * theta.unsqueeze(1) * j) / (4.0 * j * j - 1.0)
    return torch.cos(theta), (1.0 - 2.0 * terms.sum(1)) * (2.0 / nodes)


def gaussian_nodes(
    gamma: Tensor, beta: Tensor, kinks: tuple[float, ...] = (), nodes: int | None = None
) -> tuple[Tensor, Tensor]:
    """Nodes z and weights w with ``sum(w * f(z), -1) ~ E[f(Z)]``, Z ~ N(0, 1), for f smooth between the kinks.

    f is a function of an activation of ``gamma Z + beta``, whose shape is S; the kinks are those of the activation.
    z and w are ``(nodes,)`` without kinks, else ``S + (panels * nodes,)``; the weights sum to 1.
    """
    if not kinks:
        z = torch.linspace(-LIMIT, LIMIT, nodes or DEFAULT_NODES, dtype=gamma.dtype, device=gamma.device)
        w = torch.exp(-0.5 * z * z)
        return z, w / w.sum()
    tiny = torch.finfo(gamma.dtype).tiny ** 0.5
    safe = torch.where(gamma.abs() > tiny, gamma, tiny)
    cuts = torch.stack([((kink - beta) / safe).clamp(-LIMIT, LIMIT) for kink in kinks], dim=-1).sort(dim=-1).values
    low, high = torch.full_like(cuts[..., :1], -LIMIT), torch.full_like(cuts[..., :1], LIMIT)
    left, right = torch.cat([low, cuts], -1).unsqueeze(-1), torch.cat([cuts, high], -1).unsqueeze(-1)
    x, w = fejer(nodes or PANEL_NODES, gamma)
    half = 0.5 * (right - left)
    z = (0.5 * (right + left) + half * x).flatten(-2)
    weight = (half * w).flatten(-2) * torch.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    return z, weight


# -- moments and gains


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


def _ratio(gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return abs(gamma) and r, kept finite: beyond |r| = 40 every function of r is at its limit in float64."""
    s = gamma.abs()
    return s, (beta / s.clamp_min(torch.finfo(s.dtype).tiny ** 0.5)).clamp(-40.0, 40.0)


def _density(r: Tensor) -> Tensor:
    return torch.exp(-0.5 * r * r) / math.sqrt(2.0 * math.pi)


def _slope(activation: Activation, slope: Tensor | None, like: Tensor) -> Tensor | float:
    return float(activation.negative_slope or 0.0) if slope is None else slope.to(like.dtype)


def _leaky_moments(gamma: Tensor, beta: Tensor, a: Tensor | float) -> GaussianMoments:
    dtype = gamma.dtype
    if gamma.device.type != "mps":
        # The normal tails need more digits than float32 has.
        gamma, beta, a = gamma.double(), beta.double(), a.double() if isinstance(a, Tensor) else a
    s, r = _ratio(gamma, beta)
    Phi, Q, phi = torch.special.ndtr(r), torch.special.ndtr(-r), _density(r)
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
        gamma: Scale, any shape, any sign, zero included.
        beta: Shift, broadcastable with gamma.
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
        activation: As in :func:`activation_moments`, like the errors.
        gamma: Scale, any shape.
        beta: Shift, broadcastable with gamma.
        center: What the layer subtracts; None for the exact mean.
        variance: What the layer divides by (squared); None for the exact variance.
        slope: Trainable negative slope of PReLU.
        nodes: Quadrature nodes.

    Returns:
        :class:`Gains`, each of the broadcast shape of gamma and beta.

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
        Phi, Q, phi = torch.special.ndtr(r), torch.special.ndtr(-r), _density(r)
        energy = s * s * (Phi + a * a * Q)
        # Heat equation: d/dq E[f(u)] = s^2 E[f''] / 2, and act'' is a point mass (1 - a) at the kink.
        return Gains((energy - m * s * (1 - a) * phi) / var, energy / var, s * s * (Phi + a * Q) ** 2 / var)
    z, w = gaussian_nodes(g, b, act.kinks, nodes)
    u = g.unsqueeze(-1) * z + b.unsqueeze(-1)
    h = act(u) - torch.as_tensor(m, dtype=g.dtype, device=g.device).unsqueeze(-1)
    d = _derivative(act, u)
    chi = 0.5 * ((z * z - 1) * h.square() * w).sum(-1)
    return Gains(chi / var, g * g * (d.square() * w).sum(-1) / var, g * g * (d * w).sum(-1) ** 2 / var)


@functools.lru_cache(maxsize=64)
def initial_affine(activation: Activation | None, init: str) -> tuple[float, float]:
    """Return the initial (gamma, bias) of a layer.

    ``"paper"``: bias 0 and gamma = 1 / sqrt(Jacobian gain at gamma = 1), 1 / 1.21 for ReLU. The Jacobian's singular
    values are then near 1, but with the paper's constants the forward variance shrinks layer by layer.

    ``"stable"``: gamma = 1 and the bias of smallest magnitude, on a grid of half units, at which the gain chi of
    :func:`activation_gains` is at most 0.9, so that the mean square of every single sample contracts towards 1 with
    depth. Where no value of the grid reaches 0.9 (softplus), the one with the smallest chi is taken.

    A last layer (no ``activation``) and the identity start at (1, 0).
    """
    if activation is None or activation.negative_slope == 1.0:
        return 1.0, 0.0
    # Plain CPU numbers, also when the layer is being built on another default device or under a transform.
    with torch.device("cpu"), torch.no_grad():
        if init == "paper":
            return float(activation_gains(activation).jacobian) ** -0.5, 0.0
        # Ordered by magnitude, positive first, so that the first hit is the smallest shift.
        grid = sorted((0.5 * k for k in range(-4, 5)), key=lambda b: (abs(b), -b))
        gamma = torch.ones(len(grid), dtype=torch.float64)
        chi = activation_gains(activation, gamma, torch.tensor(grid).double()).chi
    hits = (bias for bias, value in zip(grid, chi.tolist(), strict=True) if value <= TARGET_CHI)
    return 1.0, next(hits, grid[int(chi.nan_to_num(torch.inf).argmin())])


# -- the tables of a rectifier layer

Tables = tuple[Tensor, Tensor, Tensor]


def plain_tables(gamma: Tensor, beta: Tensor, a: float, eps: float) -> Tables:
    """``gamma / std, beta / std, mean / std`` of the leaky rectifier of slope ``a``, (C,), by ordinary operations."""
    slope = torch.full((), a, dtype=torch.float64, device=gamma.device) if a else None
    mean, var = activation_moments(ACTIVATIONS["leaky_relu" if a else "relu"], gamma, beta, slope=slope)
    inverse = (var + eps).rsqrt()
    return gamma * inverse, beta * inverse, mean * inverse


def _derivatives(gamma: Tensor, beta: Tensor, a: float, eps: float) -> tuple[Tensor, ...]:
    """1/std, mean, and the derivatives of mean and of -1/2 log(var + eps) with respect to gamma and beta."""
    s, r = _ratio(gamma, beta)
    Phi, phi = torch.special.ndtr(r), _density(r)
    Q = 1.0 - Phi
    e = beta * Phi + s * phi
    v = (Phi * (1.0 + r * r * Q) + r * phi * (Q - Phi) - phi * phi).clamp_min(0.0)
    if a:
        mean, slope = a * beta + (1 - a) * e, a + (1 - a) * Phi
        var, square = s * s * (a * a + 2 * a * (1 - a) * Phi + (1 - a) ** 2 * v), Phi + a * a * Q
        var_beta = 2.0 * (e + a * a * (beta - e) - mean * slope)
    else:
        mean, slope, var, square = e, Phi, s * s * v, Phi
        var_beta = 2.0 * e * Q
    curve = (1 - a) * phi
    sign = gamma.sign()
    factor = -0.5 / (var + eps)
    var_s = 2.0 * (s * square - mean * curve)
    return (var + eps).rsqrt(), mean, sign * curve, slope, factor * sign * var_s, factor * var_beta


class _RectifierTables(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gamma: Tensor, beta: Tensor, a: float, eps: float) -> tuple[Tensor, ...]:
        g, b = gamma.double(), beta.double()
        derived = _derivatives(g, b, a, eps)
        inverse, mean = derived[:2]
        dtype = torch.promote_types(gamma.dtype, torch.float32)
        tables = (g * inverse, b * inverse, mean * inverse)
        return (*(t.to(dtype) for t in tables), *derived)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        gamma, beta, ctx.a, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[3:])
        ctx.save_for_backward(gamma, beta, *output[3:])
        ctx.save_for_forward(gamma, beta, *output[3:])

    @staticmethod
    def _jacobian(ctx: Any) -> tuple[Tensor, ...]:
        # Read once: activation checkpointing recomputes the saved tensors at the first look and refuses a second.
        gamma, beta, *derived = ctx.saved_tensors
        g, b = gamma.double(), beta.double()
        if torch.is_grad_enabled():
            # Somebody differentiates the derivative: the saved numbers have no history, so compute them once more.
            derived = _derivatives(g, b, ctx.a, ctx.eps)
        return (gamma, g, b, *derived)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gamma, g, b, inverse, mean, mean_gamma, mean_beta, log_gamma, log_beta = _RectifierTables._jacobian(ctx)
        scale, shift, offset = (t.double() * inverse for t in grads[:3])
        common = scale * g + shift * b + offset * mean
        grad_gamma = scale + offset * mean_gamma + common * log_gamma
        grad_beta = shift + offset * mean_beta + common * log_beta
        return grad_gamma.to(gamma.dtype), grad_beta.to(gamma.dtype), None, None

    @staticmethod
    def jvp(ctx: Any, tangent_gamma: Tensor, tangent_beta: Tensor, *_options: None) -> tuple[Any, ...]:
        _gamma, g, b, inverse, mean, mean_gamma, mean_beta, log_gamma, log_beta = _RectifierTables._jacobian(ctx)
        tg, tb = tangent_gamma.double(), tangent_beta.double()
        log = log_gamma * tg + log_beta * tb
        tables = (tg + g * log, tb + b * log, mean_gamma * tg + mean_beta * tb + mean * log)
        dtype = torch.promote_types(tangent_gamma.dtype, torch.float32)
        return (*((t * inverse).to(dtype) for t in tables), *(None,) * 6)


def rectifier_tables(gamma: Tensor, beta: Tensor, a: float, eps: float) -> Tables:
    """:func:`plain_tables` in one autograd node, differentiable to any order; ``a`` is 0 for ReLU."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or gamma.device.type == "mps":
        return plain_tables(gamma, beta, a, eps)
    scale, shift, offset = _RectifierTables.apply(gamma, beta, a, eps)[:3]  # type: ignore[no-untyped-call]
    return scale, shift, offset
