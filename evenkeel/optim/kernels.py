r"""The arithmetic of one step on a matrix of rows, written so that it passes over memory as few times as possible.

Both optimizers are the same walk. With :math:`h` the clipped Riemannian gradient, the momentum becomes
:math:`e = \tau + r h`, the step is :math:`d = s\,e` and the new momentum :math:`k\,\mathrm{pt}(e; d)`, where r, s, k
are numbers per row:

- SGD-G: :math:`d = \gamma \tau - \eta h`, so :math:`r = -\eta / \gamma,\; s = k = \gamma`;
- Adam-G: :math:`m = \beta_1 \tau + (1 - \beta_1) h`, so :math:`r = (1 - \beta_1) / \beta_1,\;
  s = -\eta\, a\, \beta_1 / \sqrt{v + \epsilon},\; k = \beta_1`.

With :math:`\theta = s \lVert e \rVert` the exponential map and the transport are one rotation in the plane of y and e,

.. math:: y' = y \cos\theta + e\, \frac{\sin\theta}{\lVert e \rVert}, \qquad
          \mathrm{pt}(e) = e \cos\theta - y\, \lVert e \rVert \sin\theta,

which also holds for negative s, as Adam-G has it. Points are taken as :math:`p / \lVert p \rVert`, which costs one
number per row and keeps them on the sphere for good.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from evenkeel.optim.rows import Tile, Workspace, row_chunks

__all__ = ["CHUNK", "regularized_gradient", "walk_"]

CHUNK = 1 << 17
"""Elements per chunk on the CPU: four matrices of this size stay in the second-level cache of two cores."""

# A norm below this is the norm of no weight (its square underflows in float32): such a row stays where it is.
_TINY = 1e-18

Coefficients = Callable[[Tensor, Tensor, slice], tuple[Tensor, Tensor]]


def regularized_gradient(tile: Tile, grad: Tensor, alpha: float, workspace: Workspace) -> Tensor:
    r"""Return gradient plus :math:`2 \alpha (Y Y^\top - I) Y`, for every weight of a tile at once.

    Args:
        tile: Weights of equal block height.
        grad: Gradient of the loss, ``(rows, n)``.
        alpha: Weight of the orthogonality regularizer.
        workspace: Holds the result.
    """
    layout = tile.jobs[0].layout
    height = layout.rows // layout.blocks
    p = tile.weight.view(-1, height, tile.n)
    g = grad.view(-1, height, tile.n)
    inv = _inverse_norm(tile.weight)[0].view(-1, height, 1)
    out = workspace.take("total", (tile.rows, tile.n), grad, tile.dtype)
    if height <= tile.n:
        # (G - I) Y = (G - I) diag(1/|p|) P: the scaling is done on the small Gram matrix, not on the rows.
        gram = torch.bmm(p, p.mT).mul_(inv).mul_(inv.mT)
        gram.diagonal(dim1=-2, dim2=-1).sub_(1)
        torch.baddbmm(g, gram.mul_(inv.mT), p, alpha=2 * alpha, out=out.view_as(p))
    else:
        y = p * inv
        gram = torch.bmm(y.mT, y)
        gram.diagonal(dim1=-2, dim2=-1).sub_(1)
        torch.baddbmm(g, y, gram, alpha=2 * alpha, out=out.view_as(p))
    return out


def _inverse_norm(p: Tensor) -> tuple[Tensor, Tensor]:
    """Return 1 / |p| per row and whether the row is alive, that is not zero."""
    norm = torch.linalg.vector_norm(p, dim=1, keepdim=True)
    return norm.clamp(min=_TINY).reciprocal_(), norm > _TINY


def walk_(
    tile: Tile,
    grad: Tensor,
    *,
    grad_clip: float | None,
    coefficients: Coefficients,
    keep: float,
    workspace: Workspace,
    budget: int,
) -> tuple[Tensor, Tensor]:
    """Move every row of a tile by one step, in place.

    Args:
        tile: Points, first moments (None: no momentum).
        grad: Total gradient ``(rows, n)``; not written to.
        grad_clip: Bound on the Riemannian gradient of a row, or None.
        coefficients: Function of the clip factor, the norm of the clipped gradient and the slice of rows, that gives r
            and s of the module's text, ``(rows, 1)`` or scalars; with no momentum d = s h.
        keep: k of the module's text.
        workspace: Holds one matrix of scratch.
        budget: Elements per chunk.

    Returns:
        Angle walked and norm of the Riemannian gradient before clipping, both ``(rows, 1)``.
    """
    angles, norms = [], []
    for rows in row_chunks(tile.rows, tile.n, budget):
        p, g = tile.weight[rows], grad[rows]
        h = workspace.take("scratch", (p.shape[0], p.shape[1]), p, tile.dtype)
        inv, alive = _inverse_norm(p)
        dot = torch.linalg.vecdot(p, g).unsqueeze(1).mul_(inv).mul_(inv)
        torch.addcmul(g, p, dot, value=-1, out=h)
        norm = torch.linalg.vector_norm(h, dim=1, keepdim=True)
        clip = alive.to(tile.dtype) if grad_clip is None else (grad_clip / norm).clamp_(max=1.0).mul_(alive)
        r, s = coefficients(clip, norm, rows)
        if tile.moment is None:
            e = h
            length = norm
        else:
            e = tile.moment[rows].addcmul_(h, r)
            length = torch.linalg.vector_norm(e, dim=1, keepdim=True)
        theta = length * s
        cos, along = theta.cos(), torch.sinc(theta / math.pi) * s
        if tile.moment is None:
            p.mul_(cos * inv).addcmul_(e, along)
        else:
            back = theta.sin().mul_(length).mul_(inv).mul_(-keep)
            torch.mul(e, along, out=h)
            e.mul_(cos * keep).addcmul_(p, back)
            torch.addcmul(h, p, cos.mul_(inv), out=p)
        angles.append(theta.abs_())
        norms.append(norm)
    if len(angles) == 1:
        return angles[0], norms[0]
    return torch.cat(angles), torch.cat(norms)
