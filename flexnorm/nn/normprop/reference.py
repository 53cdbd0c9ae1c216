"""Slow, obvious NormProp layers straight from the equations, in float64: what the fast layers are tested against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flexnorm.nn.normprop.elementwise import ActivationLike, resolve_activation

_STEPS = 200_001


def reference_moments(activation: ActivationLike, gamma: float, beta: float) -> tuple[float, float]:
    """Mean and variance of ``act(gamma z + beta)`` by a Riemann sum of 200,001 steps over [-12, 12]."""
    act = resolve_activation(activation)
    z = torch.linspace(-12, 12, _STEPS, dtype=torch.float64)
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    y = gamma * z + beta if act is None else act(gamma * z + beta)
    mean = float((y * density).sum())
    return mean, float(((y - mean) ** 2 * density).sum())


def reference_normprop(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    bias: Tensor,
    activation: ActivationLike = "relu",
    *,
    constants: str = "exact",
    unitize: bool = False,
    eps: float = 0.0,
) -> Tensor:
    """Eq. 9 of arXiv 1603.01431, unit by unit: ``(act(gamma W x / ||W|| + bias) - mean) / sqrt(var + eps)``.

    ``x`` (N, K) are samples (for a convolution: patches), ``weight`` (C, K) the filters, ``gamma`` and ``bias`` (C,);
    the other arguments are those of the layers. ``eps`` is added for exact constants only.
    """
    act = resolve_activation(activation)
    x, weight = x.double(), weight.double()
    if unitize:
        x = x / x.square().mean(1, keepdim=True).sqrt()
    columns = []
    for w, g, b in zip(weight, gamma.tolist(), bias.tolist(), strict=True):
        u = g * (x @ w) / w.square().sum().sqrt() + b
        at, added = ((g, b), eps) if constants == "exact" else ((1.0, 0.0), 0.0)
        mean, var = reference_moments(act or "identity", *at)
        columns.append(((u if act is None else act(u)) - mean) / math.sqrt(var + added))
    return torch.stack(columns, 1)
