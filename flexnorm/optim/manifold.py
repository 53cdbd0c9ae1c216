r"""Geometry of the manifold that normalization creates: rows up to scale.

Batch normalization makes a network blind to the length of each weight vector that feeds it,
:math:`\mathrm{BN}(w^\top x) = \mathrm{BN}(u^\top x)` with :math:`u = w / \lVert w \rVert`. So a weight vector is
really a point of the Grassmann manifold :math:`G(1, n)`, and with unit representatives its operators are those of the
unit sphere. Every function here works on rows, the last axis of a tensor ``(*, n)``, all leading axes being a batch:
``y`` are points (unit rows), ``d`` and ``v`` tangent vectors at ``y``, and the result has their shape.

Paper: Cho and Lee, "Riemannian approach to batch normalization", NeurIPS 2017 (arXiv 1709.09603), Eq. 6-9.

Deviations from the paper, all for numerical safety and none visible in exact arithmetic:

- :math:`(h / \lVert h \rVert) \sin \lVert h \rVert` is computed as :math:`h\,\mathrm{sinc}\lVert h \rVert`, which has
  no division by zero, instead of adding a small constant to the norm;
- :math:`1 - \cos t` is computed as :math:`2 \sin^2(t / 2)`, which does not cancel for small steps;
- the projection is applied twice, so that its result is tangent however long the part along y is;
- a result that should have unit norm is brought back to it, so that errors do not add up over the steps;
- norms are computed of the row divided by its largest element, so that tiny and huge rows neither vanish nor overflow.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A norm below this is the norm of no weight (its cube, which a kernel needs, underflows in float32).
TINY = 1e-12
_LARGE, _STRIP = 256, 128  # rows from which on half of a Gram matrix is worth the copying, and in strips of how many


def row_norm(x: Tensor) -> Tensor:
    r"""Euclidean norm :math:`\lVert x \rVert` of every row, right for any finite row.

    Rows ``(*, n)`` give norms ``(*, 1)``. The row is divided by its largest element first: the square of an element
    below 1e-23 is zero in float32, and above 1e19 it is infinite, though the norm itself is an ordinary number.

    Examples:
        >>> row_norm(torch.tensor([[3e-30, 4e-30], [0.0, 0.0]]))
        tensor([[5.0000e-30],
                [0.0000e+00]])
    """
    largest = _largest(x)
    norm: Tensor = torch.linalg.vector_norm(x / largest, dim=-1, keepdim=True)
    return norm * largest


def unit(x: Tensor) -> Tensor:
    r"""Rows ``(*, n)`` of unit length, :math:`x / \lVert x \rVert`; a zero row stays zero."""
    scaled = x / _largest(x)
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scaled / torch.where(norm > 0, norm, 1.0)


def project(y: Tensor, g: Tensor) -> Tensor:
    r"""Riemannian gradient: the part of the Euclidean gradient ``g`` that is tangent to the sphere at ``y`` (Eq. 6).

    .. math:: h = g - (y^\top g)\, y
    """
    h = g - (y * g).sum(-1, keepdim=True) * y
    # Once more: of a gradient that is nearly parallel to y, the first pass leaves little but its own rounding errors.
    return h - (y * h).sum(-1, keepdim=True) * y


def norm_clip(h: Tensor, max_norm: float | None) -> Tensor:
    r"""Shorten every row that is longer than ``max_norm`` to that length, if any is given (Section 3 of the paper).

    .. math:: \hat h = h \min(1, \nu / \lVert h \rVert)

    The exponential map is periodic, so a long step is no better than a short one: hence the bound, per weight vector.
    """
    if max_norm is None:
        return h
    return torch.where(row_norm(h) > max_norm, unit(h) * max_norm, h)


def exp_map(y: Tensor, d: Tensor) -> Tensor:
    r"""Walk from ``y`` along the great circle in direction ``d``, by the length of ``d`` in radians (Eq. 7).

    .. math:: \exp_y(d) = y \cos\lVert d \rVert + \frac{d}{\lVert d \rVert} \sin\lVert d \rVert
    """
    t = row_norm(d)
    return unit(y * t.cos() + d * torch.sinc(t / math.pi))  # torch.sinc has pi in it


def parallel_transport(y: Tensor, d: Tensor, v: Tensor) -> Tensor:
    r"""Carry the tangent vector ``v`` along the geodesic that starts at ``y`` in direction ``d`` (Eq. 8).

    .. math:: \mathrm{pt}_y(v; d) = v - (u^\top v)\,
              \bigl(y \sin\lVert d \rVert + u\,(1 - \cos\lVert d \rVert)\bigr), \qquad u = d / \lVert d \rVert

    The result is tangent at ``exp_map(y, d)``; lengths and angles between transported vectors are kept.
    """
    t, u = row_norm(d), unit(d)
    along = (u * v).sum(-1, keepdim=True)
    return v - along * (y * t.sin() + u * (2 * (t / 2).sin().square()))


def transport_along(y: Tensor, d: Tensor) -> Tensor:
    r"""Carry a tangent vector along its own geodesic (Eq. 9), the special case that momentum needs.

    .. math:: \mathrm{pt}_y(d; d) = d \cos\lVert d \rVert - y\,\lVert d \rVert \sin\lVert d \rVert
    """
    t = row_norm(d)
    return d * t.cos() - y * (t * t.sin())


def angle(y: Tensor, z: Tensor) -> Tensor:
    r"""Angle between rows, accurate for small and for near-opposite ones, where the arc cosine is not.

    .. math:: \angle(y, z) = 2 \arctan\frac{\lVert y - z \rVert}{\lVert y + z \rVert}

    Rows ``y`` and ``z``, ``(*, n)`` of any length, give angles ``(*)`` in radians, between 0 and pi.
    """
    y, z = unit(y), unit(z)
    return 2 * torch.atan2(row_norm(y - z), row_norm(y + z)).squeeze(-1)


def orthogonality_penalty(y: Tensor, alpha: float, blocks: int = 1) -> Tensor:
    r"""Regularizer :math:`L^O` that asks the rows of a weight to be orthogonal; it replaces weight decay.

    .. math:: L^O(\alpha, Y) = \frac{\alpha}{2} \lVert Y Y^\top - I \rVert_F^2

    ``y`` are the unit rows of one weight, ``(rows, n)``. Here and below ``blocks`` is the number of equal blocks of
    rows that are looked at separately: the groups of a grouped convolution, whose filters see different inputs and have
    no reason to be orthogonal to each other.
    """
    y = _in_blocks(y, blocks)
    eye = torch.eye(y.shape[1], dtype=y.dtype, device=y.device)
    return alpha / 2 * (y @ y.mT - eye).square().sum()


def orthogonality_gradient(
    y: Tensor, alpha: float, blocks: int = 1, *, plus: Tensor | None = None, sign: int = 1, out: Tensor | None = None
) -> Tensor:
    r"""Gradient of :func:`orthogonality_penalty`, :math:`2 \alpha (Y Y^\top - I) Y`.

    The rows ``(rows, n)`` of ``y`` are taken as directions (their squares must be in range); ``sign`` times ``plus``,
    the gradient of the loss, is added, and the result, of the same shape, is written to ``out`` if that is given. The
    product is taken in the cheaper order: through the Gram matrix of rows when there are no more rows than columns,
    else through that of the columns.
    """
    p = _in_blocks(y, blocks)
    added = p if plus is None else _in_blocks(plus, blocks)
    norm: Tensor = torch.linalg.vector_norm(p, dim=-1, keepdim=True)
    inv = norm.clamp_(min=TINY).reciprocal_()
    if p.shape[1] <= p.shape[2]:
        # (G - I) Y = (G - I) diag(1/|p|) P: the scaling is done on the small Gram matrix, not on the rows.
        left = _gram(p).mul_(inv).mul_(inv.mT)
        left.diagonal(dim1=-2, dim2=-1).sub_(1)
        left, right = left.mul_(inv.mT), p
    else:
        left = p * inv
        right = _gram(left.mT)
        right.diagonal(dim1=-2, dim2=-1).sub_(1)
    result = torch.empty_like(y, memory_format=torch.contiguous_format) if out is None else out
    beta = 0 if plus is None else sign
    if blocks == 1:  # the faster call where the products are taken in bfloat16
        torch.addmm(added[0], left[0], right[0], beta=beta, alpha=2 * alpha, out=result)
    else:
        torch.baddbmm(added, left, right, beta=beta, alpha=2 * alpha, out=result.view_as(p))
    return result


def coherence(y: Tensor, blocks: int = 1) -> tuple[float, float]:
    r"""Mutual coherence of the rows ``(rows, n)`` of a weight, of any length: how far they are from orthogonal.

    Mean and maximum of :math:`|y_i^\top y_j|` over all pairs :math:`i \ne j` of one block; zeros where there is none.
    """
    y = _in_blocks(unit(y.detach().float()), blocks)
    rows = y.shape[1]
    if rows < 2:
        return 0.0, 0.0
    gram = (y @ y.mT).abs()
    gram.diagonal(dim1=-2, dim2=-1).zero_()
    return float(gram.sum() / (blocks * rows * (rows - 1))), float(gram.max())


def _in_blocks(y: Tensor, blocks: int) -> Tensor:
    return y.reshape(blocks, y.shape[0] // blocks, y.shape[1])


def _largest(x: Tensor) -> Tensor:
    """Largest magnitude per row, with 1 in place of 0 so that one may divide by it."""
    if x.shape[-1] == 0:
        return x.new_ones(*x.shape[:-1], 1)
    largest = x.abs().amax(-1, keepdim=True)
    return torch.where(largest > 0, largest, 1.0)


def _gram(p: Tensor) -> Tensor:
    """Return ``p @ p.mT`` for a batch of matrices; of large ones one half, for the result is symmetric."""
    batch, height, _ = p.shape
    if height < _LARGE or p.device.type != "cpu":
        return torch.bmm(p, p.mT)
    gram = p.new_empty((batch, height, height))
    # Where float32 products may be taken in bfloat16 each call converts its operands, and one is faster.
    precision = getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", "")
    strip = height if precision == "bf16" else _STRIP
    for matrix, square in zip(p, gram, strict=True):
        for top in range(0, height, strip):
            end = top + strip
            torch.mm(matrix[top:end], matrix[top:].T, out=square[top:end, top:])
            square[end:, top:end].copy_(square[top:end, end:].T)
    return gram
