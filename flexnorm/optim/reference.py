r"""SGD-G and Adam-G as the paper writes them: slow, obvious, in float64.

Nothing here is shared with the fast optimizers, not even the geometry: this is the yardstick that the tests hold
against them. One parameter is one matrix whose rows are the weight vectors, and gradients are handed in, not taken from
``.grad``.

Paper: Cho and Lee, "Riemannian approach to batch normalization", NeurIPS 2017, Algorithms 1 and 2, Eq. 6-9 and L^O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["ReferenceAdamG", "ReferenceSGDG"]


def _regularized(rows: Tensor, gradient: Tensor, ortho: float) -> Tensor:
    """Add the gradient of (alpha / 2) |Y Y^T - I|^2 to the gradient of the loss."""
    return gradient + 2 * ortho * (rows @ rows.T @ rows - rows)


def _tangent_clipped(y: Tensor, g: Tensor, nu: float) -> Tensor:
    """Eq. 6, then the norm clip, for one weight vector."""
    h: Tensor = g - torch.dot(y, g) * y
    length = float(h.norm())
    return h * (nu / length) if length > nu else h


def _exp(y: Tensor, d: Tensor) -> Tensor:
    """Eq. 7."""
    length = d.norm()
    return y if length == 0 else y * length.cos() + d / length * length.sin()


def _transport(y: Tensor, v: Tensor, d: Tensor) -> Tensor:
    """Eq. 8."""
    length = d.norm()
    if length == 0:
        return v
    u = d / length
    carried: Tensor = v - torch.dot(u, v) * (length.sin() * y + (1 - length.cos()) * u)
    return carried


@dataclass
class ReferenceSGDG:
    """SGD-G on a list of matrices, one row at a time.

    Attributes:
        weights: Matrices ``(rows, n)``; copied to float64 and brought to unit rows.
        lr: Learning rate, eta.
        momentum: Momentum, gamma.
        grad_clip: Bound nu on the Riemannian gradient of a row; ``inf`` for none.
        ortho: Weight alpha of the orthogonality regularizer.
    """

    weights: Sequence[Tensor]
    lr: float
    momentum: float = 0.9
    grad_clip: float = 0.1
    ortho: float = 0.1
    tau: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        """Put every row on the sphere, at rest."""
        doubles = [w.detach().double() for w in self.weights]
        self.weights = [w / w.norm(dim=1, keepdim=True) for w in doubles]
        self.tau = [torch.zeros_like(w) for w in doubles]

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Take one step against ``gradients``, matrices of the shapes of the weights."""
        for w, tau, gradient in zip(self.weights, self.tau, gradients, strict=True):
            total = _regularized(w, gradient.double(), self.ortho)
            for i in range(len(w)):
                h = _tangent_clipped(w[i], total[i], self.grad_clip)
                d = self.momentum * tau[i] - self.lr * h
                y = w[i].clone()
                w[i] = _exp(y, d)
                tau[i] = _transport(y, d, d)


@dataclass
class ReferenceAdamG:
    """Adam-G on a list of matrices, one row at a time.

    Attributes:
        weights: Matrices ``(rows, n)``; copied to float64 and brought to unit rows.
        lr: Learning rate, eta.
        betas: Decay rates of the first moment (a vector per row) and of the second (a number per row).
        eps: Added to the second moment under the root.
        grad_clip: Bound nu on the Riemannian gradient of a row; ``inf`` for none.
        ortho: Weight alpha of the orthogonality regularizer.
    """

    weights: Sequence[Tensor]
    lr: float
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    grad_clip: float = 0.1
    ortho: float = 0.1
    tau: list[Tensor] = field(init=False)
    second: list[Tensor] = field(init=False)
    steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Put every row on the sphere, at rest."""
        doubles = [w.detach().double() for w in self.weights]
        self.weights = [w / w.norm(dim=1, keepdim=True) for w in doubles]
        self.tau = [torch.zeros_like(w) for w in doubles]
        self.second = [torch.zeros(len(w), dtype=torch.float64) for w in doubles]

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Take one step against ``gradients``, matrices of the shapes of the weights."""
        self.steps += 1
        b1, b2 = self.betas
        correction = (1 - b2**self.steps) ** 0.5 / (1 - b1**self.steps)
        for w, tau, v, gradient in zip(self.weights, self.tau, self.second, gradients, strict=True):
            total = _regularized(w, gradient.double(), self.ortho)
            for i in range(len(w)):
                h = _tangent_clipped(w[i], total[i], self.grad_clip)
                m = b1 * tau[i] + (1 - b1) * h
                v[i] = b2 * v[i] + (1 - b2) * torch.dot(h, h)
                d = -self.lr * correction * m / (v[i] + self.eps).sqrt()
                y = w[i].clone()
                w[i] = _exp(y, d)
                tau[i] = _transport(y, m, d)
