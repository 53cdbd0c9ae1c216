r"""zeta of every channel of a network, from the tables of a side pass.

Eq. 3 of Luo et al. 2019 generalized (docs/theory.md): a layer's output moves by ``d = -gamma (a + u b)``, the same a
and b for all images and positions, and the loss gains half the curvature in that direction,

    zeta = [ I(beta) V(m) + I(gamma) V(q) / 4 + I(beta, gamma) C(m, q) ] / (2 M)

I: Fisher information per image of the shift and the scale of the standardized pre-activation (derivatives summed over
the positions of the image). m, q: mean of u and of u^2 over the positions of an image; V, C: variance and covariance
over images, so ``Var(mu_B) = V(m) sigma^2 / M`` exactly and ``Var(sigma_B) = V(q) sigma^2 / (4 M)`` to leading order,
however the positions are correlated. For inputs (N, C) it is the printed form: V(m) = 1, V(q) = rho + 2. ``M / V(m)``
is the effective batch size of the mean, M times the number of positions if those were independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from flexnorm.probe import ImageTables

_TINY = 1e-12  # variances below it belong to dead channels, which are neither noisy nor regularized


@dataclass(frozen=True)
class LayerStrength:
    """What batch statistics do to one layer, apart from the factor 1/M. All tensors have shape (C,).

    Attributes:
        name: Name of the layer.
        images: Images it was estimated from.
        mean_part: M times the part of zeta that comes from the batch mean.
        std_part: M times the part that comes from the batch standard deviation.
        cross_part: M times the part that comes from their covariance.
        mean_variance: V(m); ``batch_size / mean_variance`` is the effective number of values behind the batch mean.
        square_variance: V(q), which for independent Gaussian values is 2.
    """

    name: str
    images: int
    mean_part: Tensor
    std_part: Tensor
    cross_part: Tensor
    mean_variance: Tensor
    square_variance: Tensor

    @property
    def total(self) -> Tensor:
        """M times zeta per channel, (C,), as estimated: noise may put a channel below 0."""
        return self.mean_part + self.std_part + self.cross_part

    def zeta(self, batch_size: float) -> Tensor:
        """Return zeta per channel, (C,), at a batch size; the whole depends on it as 1/M. Not below 0."""
        return self.total.clamp_min(0.0) / batch_size


@dataclass(frozen=True)
class DecayRow:
    """The decay that acts on, or amounts to, one layer.

    Attributes:
        layer: Its name.
        channels: Number of channels.
        zeta: Mean of zeta over the channels.
        zeta_max: Largest zeta of a channel.
        gamma_squared: Mean of gamma^2 over the channels.
        penalty: ``sum(zeta gamma^2)``: what the layer adds to the loss, its channels taken as independent.
    """

    layer: str
    channels: int
    zeta: float
    zeta_max: float
    gamma_squared: float
    penalty: float

    @classmethod
    def of(cls, layer: str, zeta: Tensor, gamma: Tensor, **more: Any) -> Self:
        """Return the row of a ``layer`` with ``zeta`` and ``gamma`` (C,); ``more`` are a subclass's own fields."""
        square, penalty = gamma.square(), float((zeta * gamma.square()).sum())
        return cls(layer, zeta.numel(), float(zeta.mean()), float(zeta.max()), float(square.mean()), penalty, **more)


def merge_tables(batches: Sequence[Sequence[ImageTables]]) -> list[ImageTables]:
    """Join the tables of several side passes, layer by layer.

    Args:
        batches: What `capture` returned for each batch.

    Returns:
        One entry per layer with the images of all batches.

    Raises:
        ValueError: If there is no batch, or the batches do not have the same layers.
    """
    if not batches:
        raise ValueError("no batches: give at least one")
    names = [[table.name for table in batch] for batch in batches]
    if any(other != names[0] for other in names):
        raise ValueError(
            "the layers that ran differ between batches; measure a model whose path does not depend on the data"
        )
    return [
        ImageTables(name, *map(torch.cat, zip(*(batch[index][1:] for batch in batches), strict=True)))
        for index, name in enumerate(names[0])
    ]


def _standardized(tables: ImageTables) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return m, q (mean of u and u^2 per image) and the derivatives by the shift and the scale of u, each (N, C)."""
    if len(tables.mean) < 4:
        raise ValueError(f"need at least 4 images to estimate the noise of batch statistics, got {len(tables.mean)}")
    centre = tables.mean.mean(0)
    offset = tables.mean - centre
    variance = (tables.var + offset.square()).mean(0)
    alive = variance > _TINY
    sigma = variance.clamp_min(_TINY).sqrt()
    m = torch.where(alive, offset / sigma, 0.0)
    q = torch.where(alive, (tables.var + offset.square()) / sigma.square(), 1.0)
    scale = torch.where(alive, (tables.scale + offset * tables.shift) / sigma, 0.0)
    return m, q, tables.shift, scale


def layer_strength(tables: ImageTables) -> LayerStrength:
    """Return the strength of every channel, the channels taken one by one as the paper does.

    Args:
        tables: Of one layer, at least 4 images; the error of the estimate falls as one over the square root of their
            number.

    Raises:
        ValueError: If there are fewer than 4 images.
    """
    m, q, shift, scale = _standardized(tables)
    square = q - 1.0
    v_m, v_q = m.square().mean(0), square.square().mean(0)
    mean_part = 0.5 * shift.square().mean(0) * v_m
    std_part = 0.125 * scale.square().mean(0) * v_q
    cross_part = 0.5 * (shift * scale).mean(0) * (m * square).mean(0)
    return LayerStrength(tables.name, len(m), mean_part, std_part, cross_part, v_m, v_q)


def joint_strength(tables: ImageTables, gamma: Tensor) -> float:
    """Return M times the loss that a whole layer's noise adds, without taking its channels for independent.

    The channels of one batch are noisy together: with g the (2C,) derivatives of an image's loss by shift and scale,
    and t the (2C,) noise that an image brings to mean and standard deviation, it is the mean over pairs of images of
    ``(g . t)^2 / 2``.

    Args:
        tables: Of one layer.
        gamma: Scale of every channel, (C,).

    Returns:
        The total, to be compared with ``M * sum(zeta * gamma^2)``.

    Raises:
        ValueError: If there are fewer than 4 images.
    """
    m, q, shift, scale = _standardized(tables)
    pull = torch.cat([gamma * shift, gamma * scale], dim=1)
    noise = torch.cat([m, 0.5 * (q - 1.0)], dim=1)
    n = len(m)
    return float((pull @ noise.T).square().sum() / (2.0 * n * n))
