r"""One step on the sphere: what both optimizers do with the rows of a matrix, once they have their numbers.

With :math:`h` the clipped Riemannian gradient, the momentum becomes :math:`e = \tau + r h`, the step is
:math:`d = s\,e` and the new momentum :math:`k\,\mathrm{pt}(e; d)`, where r, s and k are numbers per row:

- SGD-G: :math:`d = \gamma \tau - \eta h`, so :math:`r = -\eta / \gamma,\; s = k = \gamma`;
- Adam-G: :math:`m = \beta_1 \tau + (1 - \beta_1) h`, so :math:`r = (1 - \beta_1) / \beta_1,\;
  s = -\eta\, a\, \beta_1 / \sqrt{v + \epsilon},\; k = \beta_1`.

With :math:`\theta = s \lVert e \rVert` the exponential map and the transport are one rotation in the plane of y and e,

.. math:: y' = y \cos\theta + e\, \frac{\sin\theta}{\lVert e \rVert}, \qquad
          \mathrm{pt}(e) = e \cos\theta - y\, \lVert e \rVert \sin\theta,

which also holds for negative s, as Adam-G has it. Points are taken as :math:`p / \lVert p \rVert`, which costs one
number per row and keeps them on the sphere for good.

The rotation is written down twice: here (:func:`rotate_`: a batch of weights, one weight, or traced by a compiler), and
in C (``kernels/sphere.c``), which takes weights on the CPU, in float32 or float64, whose rows are contiguous in memory
(in any order within a row: channels_last too).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from flexnorm.optim.manifold import TINY, row_norm, unit


@dataclass(frozen=True)
class StepOptions:
    """What a param group says about the step whichever the optimizer; the arguments of :class:`SGDG` of these names."""

    grad_clip: float | None
    ortho: float
    maximize: bool = False
    row_dim: int = 0
    row_groups: int = 1
    foreach: bool | None = None
    compile: bool = False
    row_units: int = 1

    @classmethod
    def of(cls, group: dict[str, Any]) -> StepOptions:
        """Read them from a param group."""
        return cls(**{field.name: group[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class Rotation:
    """The numbers of one optimizer (r, s and k as in the text of the module).

    Attributes:
        push: r for a gradient that is not clipped; unused without momentum.
        scale: s, for Adam-G before the correction for the start at zero and the division by the root of v; a column
            where it differs between rows.
        keep: k; 0 means no momentum, the step is then s times the clipped gradient.
        beta1: Decay rate of the first moment, for the correction.
        beta2: Decay rate of the second moment v, where there is one.
        eps: Added to the second moment.
    """

    push: float | Tensor
    scale: float | Tensor
    keep: float | Tensor
    beta1: float | Tensor = 0.0
    beta2: float | Tensor = 1.0
    eps: float | Tensor = 0.0

    def correction(self, step: float) -> float:
        """Factor on ``scale`` that undoes the start of both moments at zero."""
        return float((1 - self.beta2**step) ** 0.5 / (1 - self.beta1**step))


def chunk_size(device: torch.device) -> int:
    """Elements worked on at a time: four matrices of that size fit the cache of a CPU; a GPU takes all it can get."""
    return 1 << 19 if device.type == "cpu" else 1 << 26


def rotate_rows_(
    p: Tensor, g: Tensor, moment: Tensor | None, second: Tensor | None, rotation: Rotation, options: StepOptions
) -> tuple[Tensor, Tensor]:
    """Rotate all rows, equal chunks of rows that fit the cache one after the other."""
    rows, n = p.shape
    height = math.ceil(rows / math.ceil(rows / max(1, chunk_size(p.device) // n)))
    run = _compiled_ if options.compile else rotate_
    seen = []
    for start in range(0, rows, height):
        part = slice(start, start + height)
        scale = rotation.scale
        if isinstance(scale, Tensor) and scale.numel() > 1:
            scale = scale[part]
        m, v = (None if t is None else t[part] for t in (moment, second))
        seen.append(run(p[part], g[part], m, v, replace(rotation, scale=scale), options.grad_clip))
    theta, norm = zip(*seen, strict=True)
    return torch.cat(theta), torch.cat(norm)


def rotate_(
    p: Tensor,
    g: Tensor,
    moment: Tensor | None,
    second: Tensor | None,
    rotation: Rotation,
    grad_clip: float | Tensor | None,
    traced: bool = False,
) -> tuple[Tensor, Tensor]:
    """Move rows by one step, in place, passing over memory as few times as possible.

    Points ``p`` of any length (zero rows stay zero, at rest), gradients ``g`` (not written to) and first moments are
    ``(rows, n)``, second moments ``(rows, 1)``; the rotation is corrected for the age of the weights. ``traced`` is for
    a compiler: in expressions that it can fuse, without a look at the numbers. Returns the angle walked (signed) and
    the tangent norm of every row, ``(rows, 1)`` each.
    """
    looks = p.device.type == "cpu" and not traced  # elsewhere a look at the numbers would mean to wait for the device
    length = row_lengths_(p, looks)
    alive = (length > TINY).to(p.dtype)
    length.clamp_(min=TINY)
    h = _tangent(g, p, length, traced)
    norm = torch.linalg.vector_norm(h, dim=1, keepdim=True)
    if traced or (looks and not (bool((norm >= 1e-3 * row_norm(g)).all()) and float(norm.max()) < math.inf)):
        # Nearly all of a gradient along its row leaves little but rounding errors: project once more. The norm is that
        # which has no squares in it, for those of a huge gradient leave the range of the numbers.
        h = _tangent(h, p, length, traced)
        norm = row_norm(h)
    clip = torch.ones_like(norm) if grad_clip is None else (grad_clip / norm).clamp_(max=1.0)
    clip.mul_(alive)
    scale = rotation.scale
    if second is not None:
        second.mul_(rotation.beta2).add_((clip * norm).square_().mul_(1 - rotation.beta2))
        scale = (second + rotation.eps).rsqrt_().mul_(scale)
    if moment is None:
        theta = norm * (clip * scale)
        cos, sin = theta.cos(), theta.sin()
        p.mul_(cos.div_(length)).addcmul_(h, sin.div_(torch.where(norm > 0, norm, 1.0)))
        return theta, norm
    e, keep = moment.addcmul_(h, clip.mul_(rotation.push)), rotation.keep
    speed = torch.linalg.vector_norm(e, dim=1, keepdim=True)
    if looks and not float(speed.max()) < math.inf:
        speed = row_norm(e)
    speed.mul_(alive)  # a row that was pruned stays zero, whatever momentum it had
    theta = speed * scale
    cos, sin = theta.cos(), theta.sin()
    along = sin / torch.where(speed > 0, speed, 1.0)
    if looks and bool(cos.amin() > 0.5):
        # Through the new point, e cos - y |e| sin = e / cos - y' |e| tan: all in place. Not near a quarter circle.
        p.mul_(cos / length).addcmul_(e, along)
        e.mul_(keep * alive / cos).addcmul_(p, sin.div_(cos).mul_(speed).mul_(-keep))
    else:
        torch.mul(e, along, out=h)
        cos_p = cos / length
        e.mul_(cos.mul_(keep).mul_(alive)).addcmul_(p, sin.mul_(speed).div_(length).mul_(-keep))
        p.mul_(cos_p).add_(h)
    return theta, norm


def row_lengths_(p: Tensor, looks: bool) -> Tensor:
    """Return the norms of rows; those whose squares leave the range of the numbers are brought to unit length first."""
    length: Tensor = torch.linalg.vector_norm(p, dim=1, keepdim=True)
    if looks:
        least, most = torch.aminmax(length)
        if not (float(least) > TINY and float(most) < math.inf):
            length = torch.linalg.vector_norm(p.copy_(unit(p)), dim=1, keepdim=True)
    return length


def _tangent(g: Tensor, p: Tensor, length: Tensor, traced: bool) -> Tensor:
    """Return ``g - p <p, g> / |p|^2``."""
    if traced:
        return g - (p * g).sum(1, keepdim=True) / length / length * p
    # That is the backward of weight normalization, in one fused pass per row.
    return cast(Tensor, torch.ops.aten._weight_norm_interface_backward(g, p, length, length, 0)[0])


def _compiled_(
    p: Tensor, g: Tensor, moment: Tensor | None, second: Tensor | None, rotation: Rotation, grad_clip: float | None
) -> tuple[Tensor, Tensor]:
    """Compiled :func:`rotate_`. The numbers go in as tensors: new ones must not mean to compile again."""

    def tensor(number: float | Tensor) -> Tensor:
        return torch.as_tensor(number, dtype=p.dtype, device=p.device)

    numbers = Rotation(*(tensor(getattr(rotation, field.name)) for field in fields(Rotation)))
    clip = None if grad_clip is None else tensor(grad_clip)
    try:
        return compiled_rotation()(p, g, moment, second, numbers, clip, True)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        # Nothing has been written yet: the failure is in generating code, not in running it.
        warnings.warn(f"the compiled step is not available here, going on without: {error}", RuntimeWarning)
        compiled_rotation.cache_clear()
        return rotate_(p, g, moment, second, rotation, grad_clip)


@cache
def compiled_rotation() -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the rotation compiled by TorchInductor."""
    return cast(Callable[..., tuple[Tensor, Tensor]], torch.compile(rotate_))
