"""Expectations over z ~ N(0, 1) of an elementwise function of ``gamma z + beta``, differentiable in gamma and beta.

Two rules, both spectrally accurate where they are used:

- a smooth function: the trapezoidal rule on [-L, L]. For an integrand that is analytic in a strip of half-width d and
  decays like a Gaussian its error falls as exp(-2 pi d / h), which beats a Gauss-Hermite rule of equal size as soon
  as the activation's poles come near the real axis (``tanh(gamma z)`` has poles at distance pi / (2 gamma));
- a function with kinks: Fejer's rule on every panel between them. The kinks move with gamma and beta, and so do the
  nodes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LIMIT = 9.0
"""Half-width L of the integration interval; the neglected tails weigh 2e-19."""

DEFAULT_NODES = 128
"""Trapezoidal nodes of a function without kinks."""

PANEL_NODES = 80
"""Nodes of every panel of a function with kinks."""


def fejer(nodes: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Fejer's first rule on [-1, 1]: Chebyshev nodes and weights, exact for polynomials of degree below ``nodes``.

    As accurate as Gauss-Legendre in practice, and unlike it made of cosines: no table that would have to be stored,
    moved between devices or traced.

    Args:
        nodes: Number of nodes.
        like: Tensor whose dtype and device the result has.

    Returns:
        Nodes and weights, ``(nodes,)`` each; the weights sum to 2.
    """
    theta = (torch.arange(nodes, dtype=like.dtype, device=like.device) + 0.5) * (math.pi / nodes)
    j = torch.arange(1, nodes // 2 + 1, dtype=like.dtype, device=like.device)
    terms = torch.cos(2.0 * theta.unsqueeze(1) * j) / (4.0 * j * j - 1.0)
    return torch.cos(theta), (1.0 - 2.0 * terms.sum(1)) * (2.0 / nodes)


def gaussian_nodes(
    gamma: Tensor, beta: Tensor, kinks: tuple[float, ...] = (), nodes: int | None = None
) -> tuple[Tensor, Tensor]:
    """Nodes z and weights w with ``sum(w * f(z), -1) ~ E[f(Z)]``, Z ~ N(0, 1), for f smooth between the kinks.

    Args:
        gamma: Scales, any shape S.
        beta: Shifts, shape S.
        kinks: Arguments of the activation at which it is not smooth.
        nodes: Number of nodes (of every panel where there are kinks); None takes the defaults of this module.

    Returns:
        z and w: ``(nodes,)`` without kinks, else ``S + (panels * nodes,)``. The weights sum to 1.
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
