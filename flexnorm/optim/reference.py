r"""SGD-G and Adam-G as the paper writes them: slow, obvious, in float64.

Nothing here is shared with the fast step: every line is an operator of the paper, from :mod:`flexnorm.optim.manifold`.
This is the yardstick that the tests hold against the fast optimizers.

Paper: Cho and Lee, "Riemannian approach to batch normalization", NeurIPS 2017, Algorithms 1 and 2, Eq. 6-9 and L^O.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from flexnorm.optim.manifold import exp_map, norm_clip, parallel_transport, project, transport_along


@dataclass
class _Reference:
    weights: Sequence[Tensor]
    lr: float
    _: KW_ONLY
    grad_clip: float = 0.1
    ortho: float = 0.1
    ortho_every: int = 1
    ortho_first: Sequence[int] = ()

    def __post_init__(self) -> None:
        """Put every row on the sphere, at rest."""
        self.weights = [(w / w.norm(dim=1, keepdim=True)) for w in (w.detach().double() for w in self.weights)]
        self.tau = [torch.zeros_like(w) for w in self.weights]
        self.steps = 0

    def _descents(self, gradients: Sequence[Tensor]) -> Iterator[Tensor]:
        """Add the gradient of (alpha / 2) |Y Y^T - I|^2 to those of the loss; project (Eq. 6) and clip each row."""
        for i, (y, gradient) in enumerate(zip(self.weights, gradients, strict=True)):
            first = self.ortho_first[i] if self.ortho_first else 0
            alpha = self.ortho * self.ortho_every if self.steps % self.ortho_every == first else 0.0
            yield norm_clip(project(y, gradient.double() + 2 * alpha * (y @ y.T @ y - y)), self.grad_clip)
        self.steps += 1


@dataclass
class ReferenceSGDG(_Reference):
    """SGD-G on a list of matrices, whose gradients are handed in, not taken from ``.grad``.

    Attributes:
        weights: Matrices ``(rows, n)``, their rows the weight vectors; copied to float64 and brought to unit rows.
        lr: Learning rate, eta.
        momentum: Momentum, gamma.
        grad_clip: Bound nu on the Riemannian gradient of a row; ``inf`` for none.
        ortho: Weight alpha of the orthogonality regularizer.
        ortho_every: The regularizer acts on a weight in every step of that number, as strongly as that number of times;
            1 is the paper.
        ortho_first: For each weight the first step in which it does, from 0 on; empty for 0 everywhere.
        steps: Steps taken.
        tau: The momenta (of Adam-G: first moments), matrices ``(rows, n)``.
    """

    momentum: float = 0.9

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Take one step against ``gradients``, matrices of the shapes of the weights."""
        for y, tau, h in zip(self.weights, self.tau, self._descents(gradients), strict=True):
            d = self.momentum * tau - self.lr * h
            tau.copy_(transport_along(y, d))
            y.copy_(exp_map(y, d))


@dataclass
class ReferenceAdamG(_Reference):
    """Adam-G on a list of matrices; the attributes are those of :class:`ReferenceSGDG` but ``momentum``, and these.

    Attributes:
        betas: Decay rates of the first moment (a vector per row) and of the second (a number per row).
        eps: Added to the second moment under the root.
        second: The second moments, ``(rows,)`` each.
    """

    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        """Put every row on the sphere, at rest."""
        super().__post_init__()
        self.second = [w.new_zeros(len(w)) for w in self.weights]

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Take one step against ``gradients``, matrices of the shapes of the weights."""
        b1, b2 = self.betas
        age = self.steps + 1
        correction = (1 - b2**age) ** 0.5 / (1 - b1**age)
        for y, tau, v, h in zip(self.weights, self.tau, self.second, self._descents(gradients), strict=True):
            m = b1 * tau + (1 - b1) * h
            v.copy_(b2 * v + (1 - b2) * h.square().sum(1))
            d = -self.lr * correction * m / (v + self.eps).sqrt().unsqueeze(1)
            tau.copy_(parallel_transport(y, d, m))
            y.copy_(exp_map(y, d))
