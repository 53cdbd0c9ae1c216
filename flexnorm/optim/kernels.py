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

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
from torch import Tensor

from flexnorm.optim.manifold import row_norm
from flexnorm.optim.rows import Tile, Workspace, chunk_size, row_chunks

__all__ = ["Observe", "Walk", "regularized_gradient", "step_tile"]

Observe = Callable[[int, Tensor, Tensor], None]

# A norm below this is the norm of no weight (its cube, which a kernel needs, underflows in float32): such a row stays
# where it is. Also where one number is divided by another that may be zero, and any small number will do.
_TINY = 1e-12
_LARGE = 256  # rows from which on half of a Gram matrix is worth the copying


@dataclass(frozen=True)
class Walk:
    """The numbers that make the walk of one optimizer (r, s and k as in the text of the module).

    Attributes:
        grad_clip: Bound on the Riemannian gradient of a row, or None.
        push: r for a gradient that is not clipped; unused without momentum.
        scale: s, for Adam-G before the division by the root of the second moment.
        keep: k; 0 means no momentum, the step is then s times the clipped gradient.
        beta1: Decay rate of the first moment, where the kernel corrects for its start at zero.
        beta2: Decay rate of the second moment, or None if there is none.
        eps: Added to the second moment.
    """

    grad_clip: float | None
    push: float | Tensor
    scale: float | Tensor
    keep: float
    beta1: float = 0.0
    beta2: float | None = None
    eps: float = 0.0


def regularized_gradient(tile: Tile, alpha: float, maximize: bool, workspace: Workspace) -> Tensor:
    r"""Return gradient plus :math:`2 \alpha (Y Y^\top - I) Y`, for every weight of a loaded tile at once.

    Args:
        tile: Weights of equal block height.
        alpha: Weight of the orthogonality regularizer.
        maximize: Take the gradient of the loss with the other sign.
        workspace: Holds the result.
    """
    layout = tile.jobs[0].layout
    height = layout.rows // layout.blocks
    p = tile.weight.view(-1, height, tile.n)
    g = tile.grad.view(-1, height, tile.n)
    sign = -1 if maximize else 1
    inv = _inverse_norm(tile.weight).view(-1, height, 1)
    out = workspace.take("total", (tile.rows, tile.n), tile.grad, tile.dtype)
    if height <= tile.n:
        # (G - I) Y = (G - I) diag(1/|p|) P: the scaling is done on the small Gram matrix, not on the rows.
        gram = _gram(p).mul_(inv).mul_(inv.mT)
        gram.diagonal(dim1=-2, dim2=-1).sub_(1)
        _product(g, gram.mul_(inv.mT), p, sign, 2 * alpha, out.view_as(p))
    else:
        y = p * inv
        gram = _gram(y.mT)
        gram.diagonal(dim1=-2, dim2=-1).sub_(1)
        _product(g, y, gram, sign, 2 * alpha, out.view_as(p))
    return out


def _gram(p: Tensor) -> Tensor:
    """Return ``p @ p.mT`` for a batch of matrices; large ones by halves, for the result is symmetric."""
    batch, height, _ = p.shape
    if height < _LARGE or p.device.type != "cpu":
        return torch.bmm(p, p.mT)
    gram = p.new_empty((batch, height, height))
    for matrix, square in zip(p, gram, strict=True):
        _symmetric(matrix, square)
    return gram


def _symmetric(p: Tensor, out: Tensor) -> None:
    half = len(p) // 2
    if len(p) < _LARGE:
        torch.mm(p, p.T, out=out)
        return
    _symmetric(p[:half], out[:half, :half])
    _symmetric(p[half:], out[half:, half:])
    torch.mm(p[:half], p[half:].T, out=out[:half, half:])
    out[half:, :half].copy_(out[:half, half:].T)


def _product(g: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float, out: Tensor) -> None:
    """Write ``beta * g + alpha * a @ b`` to ``out``, for a batch of matrices."""
    if len(g) == 1:  # the faster call where the products are taken in bfloat16
        torch.addmm(g[0], a[0], b[0], beta=beta, alpha=alpha, out=out[0])
    else:
        torch.baddbmm(g, a, b, beta=beta, alpha=alpha, out=out)


def _inverse_norm(p: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(p, dim=1, keepdim=True)
    return norm.clamp_(min=_TINY).reciprocal_()


def step_tile(
    tile: Tile,
    walk: Walk,
    ortho: float,
    maximize: bool,
    compile: bool,
    workspace: Workspace,
    observe: Observe | None,
) -> None:
    """Move every row of a loaded tile by one step and store it, a chunk that fits the cache after the other.

    Args:
        tile: Points, gradients and moments.
        walk: Which walk.
        ortho: Weight of the orthogonality regularizer.
        maximize: Whether to walk up the gradient of the loss.
        compile: Whether to fuse the arithmetic with TorchInductor.
        workspace: Holds the regularized gradient.
        observe: Told index, angle and tangent norm of every parameter.
    """
    if ortho:
        grad = regularized_gradient(tile, ortho, maximize, workspace)
    else:
        grad = tile.grad.neg() if maximize else tile.grad
    thetas, norms = [], []
    run = _run_compiled_ if compile else _walk_chunk_
    for rows in row_chunks(tile.rows, tile.n, chunk_size(grad.device)):
        moment = None if tile.moment is None else tile.moment[rows]
        second = None if tile.second is None else tile.second[rows]
        theta, norm = run(tile.weight[rows], grad[rows], moment, second, walk)
        thetas.append(theta)
        norms.append(norm)
    tile.store()
    if observe is not None:
        tile.tell(observe, torch.cat(thetas), torch.cat(norms))


def _walk_chunk_(
    p: Tensor, g: Tensor, moment: Tensor | None, second: Tensor | None, walk: Walk
) -> tuple[Tensor, Tensor]:
    length = torch.linalg.vector_norm(p, dim=1, keepdim=True)
    alive = (length > _TINY).to(p.dtype)
    length.clamp_(min=_TINY)
    # The backward of weight normalization is the projection g - p <p, g> / |p|^2, in one fused pass per row.
    h = torch.ops.aten._weight_norm_interface_backward(g, p, length, length, 0)[0]
    norm = torch.linalg.vector_norm(h, dim=1, keepdim=True)
    if p.device.type == "cpu" and not bool((norm >= 1e-3 * row_norm(g)).all()):
        # Nearly all of a gradient along its row leaves little but rounding errors: project once more. The norm is that
        # which has no squares in it, for those of a huge gradient leave the range of the numbers.
        h = torch.ops.aten._weight_norm_interface_backward(h, p, length, length, 0)[0]
        norm = row_norm(h)
    clip = torch.ones_like(norm) if walk.grad_clip is None else (walk.grad_clip / norm).clamp_(max=1.0)
    clip.mul_(alive)
    scale = walk.scale
    if second is not None:
        beta2 = cast(float, walk.beta2)
        second.mul_(beta2).add_((clip * norm).square_(), alpha=1 - beta2)
        scale = (second + walk.eps).rsqrt_().mul_(scale)
    if moment is None:
        theta = norm * (clip * scale)
        cos, sin = theta.cos(), theta.sin()
        p.mul_(cos.div_(length)).addcmul_(h, sin.div_(norm.clamp(min=_TINY)))
        return theta, norm
    e = moment.addcmul_(h, clip.mul_(walk.push))
    speed = torch.linalg.vector_norm(e, dim=1, keepdim=True)
    speed.mul_(alive)  # a row that was pruned stays zero, whatever momentum it had
    theta = speed * scale
    cos, sin = theta.cos(), theta.sin()
    # Where e is so short that the division is off, e itself does not count beside p.
    along = sin / speed.clamp(min=_TINY)
    if p.device.type == "cpu" and bool(cos.amin() > 0.5):
        # Through the new point, e cos - y |e| sin = e / cos - y' |e| tan: all in place. Not near a quarter circle, and
        # not where looking at the cosine would mean to wait for the device.
        p.mul_(cos / length).addcmul_(e, along)
        e.mul_(walk.keep * alive / cos).addcmul_(p, sin.div_(cos).mul_(speed).mul_(-walk.keep))
    else:
        torch.mul(e, along, out=h)
        cos_p = cos / length
        e.mul_(cos.mul_(walk.keep).mul_(alive)).addcmul_(p, sin.mul_(speed).div_(length).mul_(-walk.keep))
        p.mul_(cos_p).add_(h)
    return theta, norm


def _run_compiled_(
    p: Tensor, g: Tensor, moment: Tensor | None, second: Tensor | None, walk: Walk
) -> tuple[Tensor, Tensor]:
    numbers = (walk.grad_clip or 0.0, walk.push, walk.scale, walk.keep, walk.beta2 or 0.0, walk.eps)
    scalars = torch.stack([torch.as_tensor(number, dtype=p.dtype, device=p.device) for number in numbers])
    try:
        return _compiled()(p, g, moment, second, scalars, walk.grad_clip is not None)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        # Nothing has been written yet: the failure is in generating code, not in running it.
        warnings.warn(f"the compiled step is not available here, going on without: {error}", RuntimeWarning)
        _compiled.cache_clear()
        return _walk_chunk_(p, g, moment, second, walk)


def _walk_fused(
    p: Tensor, g: Tensor, moment: Tensor | None, second: Tensor | None, scalars: Tensor, clipped: bool
) -> tuple[Tensor, Tensor]:
    """Do what :func:`_walk_chunk_` does, in plain expressions for a compiler to fuse."""
    nu, push, scale, keep, beta2, eps = scalars.unbind()
    length = p.square().sum(1, keepdim=True).sqrt()
    alive = (length > _TINY).to(p.dtype)
    length = length.clamp(min=_TINY)
    dot = (p * g).sum(1, keepdim=True) / length / length
    h = g - dot * p
    h = h - (p * h).sum(1, keepdim=True) / length / length * p
    largest = h.abs().amax(1, keepdim=True).clamp(min=_TINY)  # the square of a huge gradient leaves the range
    norm = (h / largest).square().sum(1, keepdim=True).sqrt() * largest
    clip = (nu / norm).clamp(max=1.0) * alive if clipped else alive
    if second is not None:
        new_second = beta2 * second + (1 - beta2) * (clip * norm).square()
        scale = scale * (new_second + eps).rsqrt()
        second.copy_(new_second)
    e = h * clip if moment is None else moment + h * (clip * push)
    speed = e.square().sum(1, keepdim=True).sqrt() * alive
    theta = speed * scale
    cos, sin = theta.cos(), theta.sin()
    new_p = p * (cos / length) + e * (sin / speed.clamp(min=_TINY))
    if moment is not None:
        moment.copy_(e * (cos * keep * alive) - p * (keep * sin * speed / length))
    p.copy_(new_p)
    return theta, norm


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return cast(Callable[..., tuple[Tensor, Tensor]], torch.compile(_walk_fused))
