r"""One step on the sphere, for the rows of many weights: what both optimizers do, once they have their numbers.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from flexnorm.kernels import sphere
from flexnorm.optim.manifold import TINY, orthogonality_gradient, row_norm, unit
from flexnorm.optim.rows import RowLayout, compute_dtype, local_parts

Observe = Callable[[int, Tensor, Tensor], None]

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


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


@dataclass(frozen=True)
class State:
    """What an optimizer keeps of its weights, lists as long as that of the weights or empty."""

    moments: Sequence[Tensor] = ()  # of the shapes of the weights, in the compute dtype
    seconds: Sequence[Tensor] = ()  # (rows,) each
    steps: Sequence[Tensor] = ()  # scalars on the CPU, raised by one with every step


class Workspace:
    """What lives from step to step: buffers (fresh memory costs more than the arithmetic done in it) and plans."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        self._plans: dict[tuple[object, ...], Plan] = {}

    def take(self, name: str, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return an uninitialized matrix; its content is lost at the next ``take`` of that name."""
        size, key = shape[0] * shape[1], (name, device, dtype)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[key] = torch.empty(size, dtype=dtype, device=device)
        return buffer[:size].view(shape)

    def plan(self, key: tuple[object, ...], make: Callable[[], Plan]) -> Plan:
        """Return the plan made for ``key`` before, or make it.

        The key must name everything the plan depends on. Plans hold on to the memory they work on, so an address in the
        key cannot come to mean other memory as long as the plan exists.
        """
        if key not in self._plans:
            if len(self._plans) >= 32:  # parameters that get gradients by turns; more is not worth remembering
                self._plans.clear()
            self._plans[key] = make()
        return self._plans[key]


@torch.no_grad()
def take_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: State,
    rotation: Rotation,
    options: StepOptions,
    workspace: Workspace | None = None,
    observe: Observe | None = None,
) -> None:
    """Move all weights by one step against their gradients (not written to), and their state along, in place.

    Args:
        params: The weights; their rows are taken as directions.
        grads: Their gradients.
        state: Their state.
        rotation: The numbers of the optimizer.
        options: What the group says.
        workspace: Buffers and plans, kept from step to step.
        observe: Told index, angle walked and tangent norm of the rows of every weight.
    """
    workspace, whole = workspace or Workspace(), options.ortho != 0
    params, grads, moments = (local_parts(t, options.row_dim, whole) for t in (params, grads, state.moments))
    state = State(moments, state.seconds, state.steps)
    lists = (params, state.moments, state.seconds, state.steps)
    how = (options.row_dim, options.row_groups, options.foreach is False, options.compile, whole)
    key = (*how, *map(len, lists), *(t.data_ptr() for kind in lists for t in kind))
    plan = workspace.plan(key, lambda: _plan(params, state, options))
    if plan.steps:
        torch._foreach_add_(plan.steps, 1)
    for batch in plan.batches:
        seen = batch.step(grads, rotation, options, workspace, observe is not None)
        if observe is not None and seen is not None:
            for job, angle, norm in zip(batch.jobs, *seen, strict=True):
                observe(job.index, angle, norm)


@dataclass(frozen=True)
class Job:
    """One weight in a step: its place in the lists, and what :class:`State` has on it."""

    index: int
    layout: RowLayout
    weight: Tensor
    moment: Tensor | None
    second: Tensor | None
    step: Tensor | None

    def suits_c(self) -> bool:
        """Tell whether the C kernel may move the weight where it lies."""
        p, n = self.weight, self.layout.n
        last = _CHANNELS_LAST.get(p.ndim)
        dense = p.is_contiguous() or bool(last and p.stride(0) == n and p.is_contiguous(memory_format=last))
        if p.device.type != "cpu" or p.dtype not in (torch.float32, torch.float64) or not dense:
            return False
        moment, second, step = self.moment, self.second, self.step
        return (
            (moment is None or (moment.dtype == p.dtype and _alike(moment, p)))
            and (second is None or (second.dtype == p.dtype and second.is_contiguous()))
            and (step is None or (step.dtype == torch.float32 and step.device.type == "cpu"))
        )


@dataclass(frozen=True)
class Plan:
    """How the weights of a group move: batch by batch; ``steps`` are the counters that no C kernel raises."""

    batches: list[Batch]
    steps: list[Tensor]


def _plan(params: Sequence[Tensor], state: State, options: StepOptions) -> Plan:
    """Sort weights into batches: of one row length, and of one block height where the regularizer looks at blocks.

    In C without the regularizer any weights of one dtype make a batch, however large.
    """
    whole, one_by_one = options.ortho != 0, options.foreach is False and not options.compile
    c = not one_by_one and not options.compile and options.row_dim == 0 and sphere.load() is not None
    kinds: dict[tuple[bool, torch.device, torch.dtype, tuple[int, ...]], list[Job]] = {}
    steps = []
    for i, p in enumerate(params):
        layout = RowLayout.of(p, options.row_dim, options.row_groups)
        job = Job(i, layout, p, *(kind[i] if kind else None for kind in (state.moments, state.seconds, state.steps)))
        in_c = c and p.numel() > 0 and job.suits_c()
        if job.step is not None and not in_c:
            steps.append(job.step)
        if p.numel():
            height = layout.rows // layout.blocks if whole else 0
            shape = () if in_c and not whole else (layout.n, height, i if one_by_one else 0)
            kinds.setdefault((in_c, p.device, compute_dtype(p), shape), []).append(job)
    batches = []
    for (in_c, device, _, _), jobs in kinds.items():
        limit = chunk_size(device) if whole or not in_c else math.inf
        batches += [Batch(part, in_c) for part in _parts(jobs, limit)]
    return Plan(batches, steps)


def _parts(jobs: Iterable[Job], limit: float) -> Iterator[list[Job]]:
    """Cut a list of weights into parts of at most ``limit`` numbers, or one weight."""
    part: list[Job] = []
    size = 0
    for job in jobs:
        if part and size + job.weight.numel() > limit:
            yield part
            part, size = [], 0
        part.append(job)
        size += job.weight.numel()
    yield part


class Batch:
    """Weights that move in one call: in C where they lie, else as the rows of one matrix.

    Small weights are gathered into the matrix, so that a hundred of them cost the dispatch of a few; a large one is
    worked on where it lies.
    """

    def __init__(self, jobs: list[Job], in_c: bool) -> None:
        self.jobs = jobs
        self._counts = [job.layout.rows for job in jobs]
        self._shape = (sum(self._counts), jobs[0].layout.n)
        self._dtype = compute_dtype(jobs[0].weight)
        self._weights = [job.layout.view(job.weight) for job in jobs]
        self._moments = [job.layout.view(job.moment) for job in jobs if job.moment is not None]
        self._seconds = [job.second for job in jobs if job.second is not None]
        self._steps = [job.step for job in jobs if job.step is not None]
        self._in_c = None
        if in_c:
            weights, moments = [job.weight for job in jobs], [job.moment for job in jobs]
            seconds, steps = [job.second for job in jobs], [job.step for job in jobs]
            self._in_c = sphere.Rows(weights, moments, seconds, steps, self._counts)

    def step(
        self, grads: Sequence[Tensor], rotation: Rotation, options: StepOptions, workspace: Workspace, watched: bool
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]] | None:
        """Move all rows by one step; return angle walked and tangent norm of the rows of every weight, if watched."""
        sign = -1 if options.maximize else 1
        if self._in_c is not None and not options.ortho:
            mine = [_conforming(grads[job.index], job.weight) for job in self.jobs]
            return self._in_c.rotate(mine, _numbers(rotation, options, sign), watched)
        back: list[tuple[list[Tensor], list[Tensor]]] = []
        weight = self._gather("weight", self._weights, workspace, back)
        grad = self._gather("grad", [job.layout.view(grads[job.index]) for job in self.jobs], workspace, [])
        if options.ortho:
            if self._in_c is None:
                _lengths(weight, weight.device.type == "cpu")
            blocks = sum(job.layout.blocks for job in self.jobs)
            out = workspace.take("total", self._shape, grad.device, self._dtype)
            grad = orthogonality_gradient(weight, options.ortho, blocks, plus=grad, sign=sign, out=out)
            if self._in_c is not None:
                return self._in_c.rotate(torch.split(grad, self._counts), _numbers(rotation, options, 1), watched)
        elif options.maximize:
            grad = grad.neg()
        moment = self._gather("moment", self._moments, workspace, back) if self._moments else None
        second = None
        if self._seconds:
            column = torch.cat(self._seconds)
            second = column.unsqueeze(1)
            back.append((self._seconds, list(torch.split(column, self._counts))))
        theta, norm = _in_chunks(weight, grad, moment, second, self._aged(rotation), options)
        for targets, sources in back:
            torch._foreach_copy_(targets, sources)
        if not watched:
            return None
        return torch.split(theta.abs().squeeze(1), self._counts), torch.split(norm.squeeze(1), self._counts)

    def _aged(self, rotation: Rotation) -> Rotation:
        """Correct for the age of the weights, per row where it is not the same for all."""
        if not self._steps:
            return rotation
        factors = [rotation.correction(float(step)) for step in self._steps]
        factor: float | Tensor = factors[0]
        if any(other != factor for other in factors):
            rows = torch.tensor(factors, dtype=self._dtype).repeat_interleave(torch.tensor(self._counts))
            factor = rows.unsqueeze(1).to(self._weights[0].device)
        return replace(rotation, scale=rotation.scale * factor)

    def _gather(
        self, name: str, views: list[Tensor], workspace: Workspace, back: list[tuple[list[Tensor], list[Tensor]]]
    ) -> Tensor:
        """Return a matrix of all rows; where it is no view of the one weight, note in ``back`` what to copy back."""
        if len(views) == 1 and views[0].is_contiguous() and views[0].dtype == self._dtype:
            return views[0].view(self._shape)
        matrix = workspace.take(name, self._shape, views[0].device, self._dtype)
        slots = list(torch.split(matrix, self._counts))
        slots = [s if s.ndim == v.ndim else s.view(v.shape) for s, v in zip(slots, views, strict=True)]
        torch._foreach_copy_(slots, views)
        back.append((views, slots))
        return matrix


def _numbers(rotation: Rotation, options: StepOptions, sign: int) -> sphere.Numbers:
    clip = math.inf if options.grad_clip is None else options.grad_clip
    return sphere.Numbers(clip, *(float(getattr(rotation, field.name)) for field in fields(Rotation)), sign)


def _alike(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors of one shape have their numbers in the same order in memory."""
    return a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous())


def _conforming(grad: Tensor, p: Tensor) -> Tensor:
    """Return a gradient in the dtype and memory order of its weight."""
    if grad.dtype == p.dtype and _alike(grad, p):
        return grad
    return torch.empty_like(p).copy_(grad)


def chunk_size(device: torch.device) -> int:
    """Elements worked on at a time: four matrices of that size fit the cache of a CPU; a GPU takes all it can get."""
    return 1 << 19 if device.type == "cpu" else 1 << 26


def _in_chunks(
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

    Args:
        p: Points, ``(rows, n)``, of any length; zero rows stay zero, at rest.
        g: Gradients, ``(rows, n)``, not written to.
        moment: First moments, ``(rows, n)``, or None.
        second: Second moments, ``(rows, 1)``, or None.
        rotation: The numbers of the step, corrected for the age of the weights.
        grad_clip: Bound on the Riemannian gradient of a row, or None.
        traced: For a compiler: in expressions that it can fuse, without a look at the numbers.

    Returns:
        Angle walked (signed) and tangent norm of every row, ``(rows, 1)`` each.
    """
    looks = p.device.type == "cpu" and not traced  # elsewhere a look at the numbers would mean to wait for the device
    length = _lengths(p, looks)
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


def _lengths(p: Tensor, looks: bool) -> Tensor:
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
