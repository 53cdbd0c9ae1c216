"""Many weights in one step: which move together, where their rows are gathered, and which the C kernel moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from flexnorm.kernels import sphere
from flexnorm.optim.manifold import orthogonality_gradient
from flexnorm.optim.rows import RowLayout, compute_dtype, local_parts
from flexnorm.optim.step import Rotation, StepOptions, chunk_size, rotate_rows_, row_lengths_

Observe = Callable[[int, Tensor, Tensor], None]

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


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
            if len(self._plans) >= 128:  # the turns of the regularizer, or of gradients; more is not worth remembering
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
    """Move all weights, taken as directions, by one step against their gradients, and their state along, in place.

    ``observe`` is told index, angle walked and tangent norm of the rows of every weight.
    """
    workspace, whole = workspace or Workspace(), options.ortho != 0
    params, grads, moments = (
        local_parts(t, options.row_dim, whole or options.row_units != 1) for t in (params, grads, state.moments)
    )
    state = State(moments, state.seconds, state.steps)
    lists = (params, state.moments, state.seconds, state.steps)
    how = (options.row_dim, options.row_groups, options.row_units, options.foreach is False, options.compile, whole)
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
        layout = RowLayout.of(p, options.row_dim, options.row_groups, options.row_units)
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
        weights, moments = [job.weight for job in jobs], [job.moment for job in jobs if job.moment is not None]
        self._seconds = [job.second for job in jobs if job.second is not None]
        self._steps = [job.step for job in jobs if job.step is not None]
        self._in_c = sphere.Rows(weights, moments, self._seconds, self._steps, self._counts) if in_c else None
        self._weights = [job.layout.view(job.weight) for job in jobs]
        self._moments = [job.layout.view(moment) for job, moment in zip(jobs, moments, strict=False)]

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
                row_lengths_(weight, weight.device.type == "cpu")
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
        theta, norm = rotate_rows_(weight, grad, moment, second, self._aged(rotation), options)
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
