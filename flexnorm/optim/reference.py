r"""SGD-G and Adam-G as the paper writes them: slow, obvious, in float64.

Nothing here is shared with the fast step: every line is an operator of the paper, from :mod:`flexnorm.optim.manifold`.
This is the yardstick that the tests hold against the fast optimizers.

Paper: Cho and Lee, "Riemannian approach to batch normalization", NeurIPS 2017, Algorithms 1 and 2, Eq. 6-9 and L^O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field

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

    def __post_init__(self) -> None:
        """Put every row on the sphere, at rest."""
        self.weights = [(w / w.norm(dim=1, keepdim=True)) for w in (w.detach().double() for w in self.weights)]
        self.tau = [torch.zeros_like(w) for w in self.weights]

    def _descent(self, y: Tensor, gradient: Tensor) -> Tensor:
        """Add the gradient of (alpha / 2) |Y Y^T - I|^2 to that of the loss; project (Eq. 6) and clip each row."""
        return norm_clip(project(y, gradient.double() + 2 * self.ortho * (y @ y.T @ y - y)), self.grad_clip)


@dataclass
class ReferenceSGDG(_Reference):
    """SGD-G on a list of matrices, whose gradients are handed in, not taken from ``.grad``.

    Attributes:
        weights: Matrices ``(rows, n)``, their rows the weight vectors; copied to float64 and brought to unit rows.
        lr: Learning rate, eta.
        momentum: Momentum, gamma.
        grad_clip: Bound nu on the Riemannian gradient of a row; ``inf`` for none.
        ortho: Weight alpha of the orthogonality regularizer.
        tau: The momenta (of Adam-G: first moments), matrices ``(rows, n)``.
    """

    momentum: float = 0.9

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Take one step against ``gradients``, matrices of the shapes of the weights."""
        for y, tau, gradient in zip(self.weights, self.tau, gradients, strict=True):
            d = self.momentum * tau - self.lr * self._descent(y, gradient)
            tau.copy_(transport_along(y, d))
            y.copy_(exp_map(y, d))


@dataclass
class ReferenceAdamG(_Reference):
    """Adam-G on a list of matrices; the attributes are those of :class:`ReferenceSGDG` but ``momentum``, and these.

    Attributes:
        betas: Decay rates of the first moment (a vector per row) and of the second (a number per row).
        eps: Added to the second moment under the root.
        second: The second moments, ``(rows,)`` each.
        steps: Steps taken.
    """

    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Put every row on the sphere, at rest."""
        super().__post_init__()
        self.second = [w.new_zeros(len(w)) for w in self.weights]

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Take one step against ``gradients``, matrices of the shapes of the weights."""
        self.steps += 1
        b1, b2 = self.betas
        correction = (1 - b2**self.steps) ** 0.5 / (1 - b1**self.steps)
        for y, tau, v, gradient in zip(self.weights, self.tau, self.second, gradients, strict=True):
            h = self._descent(y, gradient)
            m = b1 * tau + (1 - b1) * h
            v.copy_(b2 * v + (1 - b2) * h.square().sum(1))
            d = -self.lr * correction * m / (v + self.eps).sqrt().unsqueeze(1)
            tau.copy_(parallel_transport(y, d, m))
            y.copy_(exp_map(y, d))
