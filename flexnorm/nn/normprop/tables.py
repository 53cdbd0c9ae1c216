"""The per-channel tables of a rectifier layer in one autograd node, with derivatives in closed form.

A rectifier layer needs ``gamma / std``, ``bias / std`` and ``mean / std``. Written with ordinary operations these are
some thirty kernels on C numbers forward and twice as many backward: more dispatch than a small convolution takes. The
derivatives are simple, with D = a + (1 - a) Phi the mean slope and e = beta Phi + s phi the mean of relu(u)::

    d mean / d beta = D                              d mean / d s = (1 - a) phi
    d var / d beta  = 2 (e + a^2 (beta - e) - mean D)    d var / d s  = 2 (s (Phi + a^2 (1 - Phi)) - mean (1 - a) phi)

Compilers fuse the plain expression themselves and get that one (:func:`plain_tables`); a test holds the two equal.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flexnorm.nn.normprop.activations import ACTIVATIONS
from flexnorm.nn.normprop.constants import activation_moments

Tables = tuple[Tensor, Tensor, Tensor]


def plain_tables(gamma: Tensor, beta: Tensor, a: float, eps: float) -> Tables:
    """``gamma / std, beta / std, mean / std`` of the leaky rectifier of slope ``a`` by ordinary operations.

    Args:
        gamma: ``(C,)``.
        beta: ``(C,)``.
        a: Negative slope.
        eps: Added to the variance.
    """
    slope = torch.full((), a, dtype=torch.float64, device=gamma.device) if a else None
    mean, var = activation_moments(ACTIVATIONS["leaky_relu" if a else "relu"], gamma, beta, slope=slope)
    inverse = (var + eps).rsqrt()
    return gamma * inverse, beta * inverse, mean * inverse


def _derivatives(gamma: Tensor, beta: Tensor, a: float, eps: float) -> tuple[Tensor, ...]:
    """1/std, mean, and the derivatives of mean and of -1/2 log(var + eps) with respect to gamma and beta."""
    s = gamma.abs()
    r = (beta / s.clamp_min(torch.finfo(s.dtype).tiny ** 0.5)).clamp(-40.0, 40.0)
    Phi = torch.special.ndtr(r)
    phi = torch.exp(-0.5 * r * r) / math.sqrt(2.0 * math.pi)
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
    """``gamma / std, beta / std, mean / std`` of the leaky rectifier of slope ``a``, differentiable to any order.

    Args:
        gamma: ``(C,)``.
        beta: ``(C,)``.
        a: Negative slope; 0 for ReLU.
        eps: Added to the variance.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or gamma.device.type == "mps":
        return plain_tables(gamma, beta, a, eps)
    scale, shift, offset = _RectifierTables.apply(gamma, beta, a, eps)[:3]  # type: ignore[no-untyped-call]
    return scale, shift, offset
