"""The fast path of both optimizers: weights that the compiled step moves where they lie, many in one call.

What it takes: parameters on the CPU, in float32 or float64, whose rows are contiguous in memory (in any order within a
row: channels_last too). The rest goes through the tiles of :mod:`flexnorm.optim.kernels`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexnorm.kernels import sphere as _native
from flexnorm.optim.kernels import Observe, Walk, regularized_gradient
from flexnorm.optim.rows import Job, RowLayout, Tile, Workspace, tiles

__all__ = ["pick", "renumbered", "step_natively"]

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_ALONE = 1 << 15  # numbers that one thread moves faster than it wakes another


class Strip:
    """Weights of one dtype that move in one call.

    Attributes:
        jobs: The weights; their moments, second moments and counters of steps are all there or all missing.
        tile: The same weights gathered, where the step needs the Gram matrix of their rows.
    """

    def __init__(self, jobs: list[Job], tile: Tile | None) -> None:
        self.jobs, self.tile = jobs, tile
        self._weights = [job.weight for job in jobs]
        self._numbers = sum(job.weight.numel() for job in jobs)
        self._dtype = jobs[0].weight.dtype
        chunk = min(max(self._numbers // (4 * torch.get_num_threads()), 1 << 12), 1 << 16)
        tasks: list[int] = []
        for i, job in enumerate(jobs):
            height = max(1, chunk // job.layout.n)
            for start in range(0, job.layout.rows, height):
                tasks += (i, start, min(start + height, job.layout.rows))
        self._counts = (len(jobs), len(tasks) // 3)
        self._tasks = _native.addresses(tasks)
        self._points = _pointers(self._weights)
        self._moments = _pointers([job.moment for job in jobs])
        self._seconds = _pointers([job.second for job in jobs])
        self._steps = _pointers([job.step for job in jobs])
        self._lengths = _native.addresses([job.layout.n for job in jobs])

    def step(
        self,
        walk: Walk,
        grads: Sequence[Tensor],
        ortho: float,
        maximize: bool,
        workspace: Workspace,
        observe: Observe | None,
    ) -> None:
        """Move all weights by one step."""
        if self.tile is None:
            mine = [_conforming(grads[job.index], job.weight) for job in self.jobs]
            sign = -1.0 if maximize else 1.0
        else:
            self.tile.load(grads, workspace, points_only=True)
            total = regularized_gradient(self.tile, ortho, maximize, workspace)
            mine = list(torch.split(total, [job.layout.rows for job in self.jobs]))
            sign = 1.0
        numbers = _native.Numbers(
            math.inf if walk.grad_clip is None else walk.grad_clip,
            float(walk.push),
            float(walk.scale),
            walk.keep,
            walk.beta1,
            1.0 if walk.beta2 is None else walk.beta2,
            walk.eps,
            sign,
        )
        seen = [] if observe is None else [job.weight.new_empty((2, job.layout.rows)) for job in self.jobs]
        tables = (
            self._tasks,
            self._points,
            _pointers(mine),
            self._moments,
            self._seconds,
            self._steps,
            self._lengths,
            _pointers([s[0] for s in seen]) if seen else None,
            _pointers([s[1] for s in seen]) if seen else None,
        )
        kernel = _native.load()
        assert kernel is not None
        kernel(self._dtype, self._counts, tables, numbers, torch.get_num_threads() if self._numbers > _ALONE else 1)
        torch.autograd.graph.increment_version(self._weights)
        if observe is not None:
            for job, s in zip(self.jobs, seen, strict=True):
                observe(job.index, s[0], s[1])


@dataclass(frozen=True)
class Division:
    """Which weights of a step move natively.

    Attributes:
        strips: Those that do.
        others: Positions of those that do not.
    """

    strips: list[Strip]
    others: list[int]


def step_natively(
    lists: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]],
    walk: Walk,
    *,
    ortho: float,
    maximize: bool,
    row_dim: int,
    row_groups: int,
    workspace: Workspace,
    observe: Observe | None,
) -> list[int]:
    """Move all weights that the compiled step can move.

    Args:
        lists: Parameters, gradients, moments, second moments, counters of steps; the last three may be empty. Counters
            are raised by one for the weights that move.
        walk: Which walk; for weights with a counter, ``scale`` is that without the correction for the start at zero.
        ortho: Weight of the orthogonality regularizer.
        maximize: Whether to walk up the gradient of the loss.
        row_dim: Axis of the output units.
        row_groups: Groups of the convolution.
        workspace: Plans and buffers kept from step to step.
        observe: Told index, angle and tangent norm of every weight.

    Returns:
        Positions of the weights that are left to others; all of them where nothing can be compiled.
    """
    params, grads, moments, seconds, steps = lists
    key = ("native", row_dim, row_groups, ortho != 0, *[t.data_ptr() for kind in lists[:1] + lists[2:] for t in kind])

    def make() -> Division:
        if _native.load() is None or row_dim != 0:
            return Division([], list(range(len(params))))
        jobs, others = [], []
        for i, p in enumerate(params):
            moment, second, step = (kind[i] if kind else None for kind in (moments, seconds, steps))
            job = Job(i, RowLayout.of(p, row_dim, row_groups), p, moment, second, step=step)
            if _fits(job):
                jobs.append(job)
            else:
                others.append(i)
        return Division(_strips(jobs, ortho != 0), others)

    division = workspace.plan(key, make)
    for strip in division.strips:
        strip.step(walk, grads, ortho, maximize, workspace, observe)
    return division.others


def pick(items: Sequence[Tensor], positions: list[int]) -> list[Tensor]:
    """Return the tensors at some positions; none where there are none, as for momentum that is not kept."""
    return [items[i] for i in positions] if items else []


def renumbered(observe: Observe | None, positions: list[int]) -> Observe | None:
    """Return an observer for tensors that :func:`pick` picked, which tells their positions in the full list."""
    if observe is None:
        return None
    return lambda index, angle, norm: observe(positions[index], angle, norm)


def _strips(jobs: list[Job], whole_blocks: bool) -> list[Strip]:
    if whole_blocks:
        return [Strip(tile.jobs, tile) for tile in tiles(jobs, whole_blocks=True)]
    kinds = {job.weight.dtype for job in jobs}
    return [Strip([job for job in jobs if job.weight.dtype == dtype], None) for dtype in sorted(kinds, key=str)]


def _pointers(tensors: Sequence[Tensor | None]) -> object:
    if not tensors or tensors[0] is None:
        return None
    return _native.addresses([t.data_ptr() for t in tensors if t is not None])


def _fits(job: Job) -> bool:
    p, n = job.weight, job.layout.n
    if p.device.type != "cpu" or p.dtype not in _native.CWalk.dtypes or p.numel() == 0 or not _dense(p, n):
        return False
    if job.moment is not None and not (job.moment.dtype == p.dtype and _alike(job.moment, p)):
        return False
    if job.second is not None and not (job.second.dtype == p.dtype and job.second.is_contiguous()):
        return False
    return job.step is None or (job.step.dtype == torch.float32 and job.step.device.type == "cpu")


def _dense(p: Tensor, n: int) -> bool:
    """Tell whether every row is one piece of memory and the rows follow each other."""
    if p.is_contiguous():
        return True
    last = _CHANNELS_LAST.get(p.ndim)
    return last is not None and p.stride(0) == n and p.is_contiguous(memory_format=last)


def _alike(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors of one shape have their numbers in the same order in memory."""
    return a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous())


def _conforming(grad: Tensor, p: Tensor) -> Tensor:
    """Return a gradient in the dtype and memory order of its weight."""
    if grad.dtype == p.dtype and _alike(grad, p):
        return grad
    return torch.empty_like(p).copy_(grad)
