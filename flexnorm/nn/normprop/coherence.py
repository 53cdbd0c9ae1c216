"""How far the filters of a layer are from orthogonal, and what that does to the covariance of its pre-activations.

Proposition 1 of arXiv 1603.01431 (the canonical error bound): for u = W x with E x = 0 and E x x^T = sigma^2 I, the
covariance of u is sigma^2 W W^T, and its distance from the nearest diagonal matrix is at most

    sigma^2 mu sqrt(sum over i != j of ||W_i||^2 ||W_j||^2),      mu = max over i != j of |<W_i, W_j>| / (||W_i||
    ||W_j||).

The layers use unit rows, so with sigma = 1 and m units the bound is mu sqrt(m (m - 1)), and the distance itself is
||W W^T - I||_F.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from flexnorm.nn.normprop.base import NormPropLayer


class CanonicalError(NamedTuple):
    """Coherence of a layer's filters and the canonical error of its pre-activations.

    Attributes:
        coherence: mu, the largest absolute cosine between two filters that see the same channels; 0 if there is no
            such pair.
        error: ||W W^T - I||_F of the unit filters: the distance of the covariance from diagonal under white input.
        bound: Its upper bound, ``mu sqrt(number of ordered pairs)``.
    """

    coherence: float
    error: float
    bound: float


def _off_diagonal(layer: NormPropLayer) -> Tensor:
    """Cosines between filters of the same group, ``(groups, m, m)``, diagonal zero."""
    rows = layer.unit_rows()
    rows = rows.reshape(layer.groups, -1, rows.shape[1])
    gram = rows @ rows.transpose(1, 2)
    eye = torch.eye(gram.shape[-1], dtype=torch.bool, device=gram.device)
    return gram.masked_fill(eye, 0.0)


@torch.no_grad()
def canonical_error(layer: NormPropLayer) -> CanonicalError:
    """Return coherence, canonical error and its bound (Proposition 1) of one layer.

    Filters of different groups see different channels and are orthogonal by construction; for convolutions the rows
    are whole filters, which compares responses at the same position.

    Args:
        layer: Any NormProp layer.
    """
    cosines = _off_diagonal(layer).double()
    groups, m, _ = cosines.shape
    mu = float(cosines.abs().amax())
    return CanonicalError(mu, float(cosines.square().sum().sqrt()), mu * (groups * m * (m - 1)) ** 0.5)


def coherence_penalty(model: nn.Module) -> Tensor:
    """Mean squared cosine between filters, averaged over the NormProp layers of ``model``: a regularizer.

    It is the squared canonical error per pair of filters, between 0 (orthogonal filters) and 1; random filters of
    fan-in K give 1/K, which is also about the least that more filters than K can reach. Add ``strength *
    coherence_penalty(model)`` to the loss.

    Args:
        model: The network.

    Returns:
        A differentiable scalar; 0 if no layer has two filters that could be compared.
    """
    terms: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, NormPropLayer) and module.out_channels > module.groups:
            cosines = _off_diagonal(module)
            groups, m, _ = cosines.shape
            terms.append(cosines.square().sum() / (groups * m * (m - 1)))
    return torch.stack(terms).mean() if terms else torch.zeros(())
