r"""Which numbers of a parameter form one weight vector, and how to lay them out as rows of a matrix.

The weight vector of an output unit is a slice along the output axis: axis 0 for linear layers and convolutions, axis 1
for transposed convolutions, whose weight is ``(in, out / groups, *kernel)`` with the groups hidden in axis 0.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

__all__ = [
    "Job",
    "RowLayout",
    "Tile",
    "Workspace",
    "chunk_size",
    "compute_dtype",
    "from_rows",
    "local_part",
    "local_parts",
    "row_chunks",
    "tiles",
    "to_rows",
]


Plan = TypeVar("Plan")


@dataclass(frozen=True)
class RowLayout:
    """How one parameter is read as rows.

    Attributes:
        rows: Number of weight vectors.
        n: Length of one weight vector.
        row_dim: Axis of the output units, 0 or 1.
        blocks: Groups of the convolution; rows come in this many equal blocks.
        order: Permutation of the axes behind the first, so that memory is walked in its own order.
        plain: Whether that order is the natural one.
    """

    rows: int
    n: int
    row_dim: int
    blocks: int
    order: tuple[int, ...]
    plain: bool

    @classmethod
    def of(cls, weight: Tensor, row_dim: int = 0, blocks: int = 1) -> RowLayout:
        """Derive the layout from a weight.

        Args:
            weight: ``(out, *)`` for ``row_dim`` 0, ``(in, out / blocks, *)`` for ``row_dim`` 1.
            row_dim: Axis of the output units.
            blocks: Groups of the convolution.

        Raises:
            ValueError: If the weight has fewer than two axes, or its first axis does not divide into the blocks.
        """
        if weight.ndim < 2:
            raise ValueError(
                f"a parameter of shape {tuple(weight.shape)} has no weight vectors, so it cannot go on the manifold: "
                "put it into a group with manifold=False (flexnorm.optim.param_groups(model) sorts this out)"
            )
        if weight.shape[0] % blocks:
            raise ValueError(f"row_groups={blocks} does not divide axis 0 of a weight of shape {tuple(weight.shape)}")
        rows = weight.shape[0] if row_dim == 0 else weight.shape[1] * blocks
        axes = range(1, weight.ndim)
        # Within a row the order of the elements is free, so take the one in memory: channels_last needs no copy.
        order = tuple(axes) if weight.is_contiguous() else tuple(sorted(axes, key=weight.stride, reverse=True))
        return cls(rows, weight.numel() // rows if rows else 0, row_dim, blocks, order, order == tuple(axes))

    def view(self, t: Tensor) -> Tensor:
        """View a tensor of the shape of the weight with the row axis (or axes: block, unit) in front."""
        if self.row_dim == 0:
            if self.plain and t.is_contiguous():
                return t.view(self.rows, self.n)
            return t.permute(0, *self.order)
        return t.view(self.blocks, t.shape[0] // self.blocks, *t.shape[1:]).movedim(2, 1)


def to_rows(t: Tensor, layout: RowLayout) -> Tensor:
    """Return ``t`` as a matrix ``(rows, n)``: a view of it where the memory allows, else a copy."""
    return layout.view(t).reshape(layout.rows, layout.n)


def from_rows(matrix: Tensor, out: Tensor, layout: RowLayout) -> None:
    """Write a matrix ``(rows, n)`` back into a tensor of the shape of the weight."""
    view = layout.view(out)
    view.copy_(matrix.view(view.shape))


def compute_dtype(t: Tensor) -> torch.dtype:
    """Dtype of the arithmetic and of the state: float64 for float64 parameters, else float32."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def local_parts(tensors: Sequence[Tensor], row_dim: int, needs_whole: bool) -> list[Tensor]:
    """Apply :func:`local_part` to many tensors, at no cost where there is no DTensor."""
    if all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors):
        return list(tensors)
    return [local_part(t, row_dim, needs_whole) for t in tensors]


def local_part(t: Tensor, row_dim: int, needs_whole: bool) -> Tensor:
    """Return the tensor of this process behind a DTensor (FSDP2, tensor parallel), or ``t`` itself.

    Args:
        t: A parameter, gradient or state tensor.
        row_dim: Axis of the output units.
        needs_whole: Whether the step looks at several rows together, as the orthogonality term does.

    Raises:
        RuntimeError: If weight vectors are split between processes, or rows are and the step needs them together.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return t
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(t, DTensor):
        return t
    for placement in t.placements:
        if placement.is_replicate():
            continue
        if not isinstance(placement, Shard) or placement.dim != 0 or row_dim != 0:
            raise RuntimeError(
                f"a weight placed as {placement} splits single weight vectors between processes; the manifold "
                "optimizers need whole rows: shard on axis 0 (the default of fully_shard) or set manifold=False"
            )
        if needs_whole:
            raise RuntimeError(
                "the orthogonality term looks at all rows of a weight together, but this one is sharded between "
                "processes: set ortho=0 for its group"
            )
    return t.to_local()


@dataclass
class Job:
    """One parameter in one step.

    Attributes:
        index: Position in the lists handed to the functional optimizer.
        layout: How it is read as rows.
        weight: The parameter.
        moment: First moment of the shape of the weight, in the compute dtype; None where there is no momentum.
        second: Second moment per row, ``(rows,)``; None where there is none.
        key: Whatever else must agree within a tile (Adam's step count).
        step: Counter of the steps taken, a scalar tensor; only where the kernel counts it up itself.
    """

    index: int
    layout: RowLayout
    weight: Tensor
    moment: Tensor | None = None
    second: Tensor | None = None
    key: float = 0.0
    step: Tensor | None = None


class Workspace:
    """What lives from step to step: buffers (fresh memory costs more than the arithmetic done in it) and plans."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        self._plans: dict[tuple[object, ...], Any] = {}

    def take(self, name: str, shape: tuple[int, int], like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return an uninitialized matrix; its content is lost at the next ``take`` of that name."""
        size, key = shape[0] * shape[1], (name, like.device, dtype)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[key] = torch.empty(size, dtype=dtype, device=like.device)
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
        return cast(Plan, self._plans[key])


class Tile:
    """Rows of several parameters, of equal length, worked on as one matrix.

    Small parameters are gathered, so that a hundred of them cost the dispatch of a few; a large one is worked on where
    it lies.

    Attributes:
        jobs: The parameters, in order of their rows.
        rows: Number of rows in all.
        n: Length of a row.
        dtype: Dtype of the arithmetic.
        weight: Matrix ``(rows, n)``; as the next ones, after ``load``.
        grad: Matrix ``(rows, n)``; must not be written to.
        moment: First moments ``(rows, n)``, or None.
        second: Second moments ``(rows, 1)``, or None.
    """

    weight: Tensor
    grad: Tensor
    moment: Tensor | None = None
    second: Tensor | None = None

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs = jobs
        first = jobs[0]
        self._counts = [job.layout.rows for job in jobs]
        self.rows, self.n = sum(self._counts), first.layout.n
        self.dtype = compute_dtype(first.weight)
        self._weights = [job.layout.view(job.weight) for job in jobs]
        self._moments = [job.layout.view(job.moment) for job in jobs if job.moment is not None]
        self._seconds = [job.second for job in jobs if job.second is not None]
        self._pending: list[tuple[list[Tensor], list[Tensor]]] = []

    def load(self, grads: Sequence[Tensor], workspace: Workspace, *, points_only: bool = False) -> None:
        """Bring weights, state and gradients together.

        Args:
            grads: Gradients of all parameters of the step; a job knows its index.
            workspace: Where gathered matrices live.
            points_only: Leave the state where it is.
        """
        self._pending = []
        self.weight = self._gather("weight", self._weights, workspace, written=True)
        views = [job.layout.view(grads[job.index]) for job in self.jobs]
        self.grad = self._gather("grad", views, workspace, written=False)
        if points_only:
            return
        if self._moments:
            self.moment = self._gather("moment", self._moments, workspace, written=True)
        if self._seconds:
            column = torch.cat(self._seconds)
            self.second = column.unsqueeze(1)
            self._pending.append((self._seconds, list(torch.split(column, self._counts))))

    def _gather(self, name: str, views: list[Tensor], workspace: Workspace, *, written: bool) -> Tensor:
        if len(views) == 1 and views[0].is_contiguous() and views[0].dtype == self.dtype:
            return views[0].view(self.rows, self.n)
        matrix = workspace.take(name, (self.rows, self.n), views[0], self.dtype)
        slots = list(torch.split(matrix, self._counts))
        slots = [s if s.ndim == v.ndim else s.view(v.shape) for s, v in zip(slots, views, strict=True)]
        torch._foreach_copy_(slots, views)
        if written:
            self._pending.append((views, slots))
        return matrix

    def store(self) -> None:
        """Write what was gathered back to where it came from."""
        for targets, sources in self._pending:
            torch._foreach_copy_(targets, sources)

    def tell(self, observe: Callable[[int, Tensor, Tensor], None], theta: Tensor, norm: Tensor) -> None:
        """Hand index, angle and tangent norm of every parameter to an observer; columns ``(rows, 1)`` for all rows."""
        angles, norms = torch.split(theta.abs().squeeze(1), self._counts), torch.split(norm.squeeze(1), self._counts)
        for job, a, n in zip(self.jobs, angles, norms, strict=True):
            observe(job.index, a, n)


def tiles(jobs: Iterable[Job], *, whole_blocks: bool) -> list[Tile]:
    """Pack the parameters of one group into tiles.

    Args:
        jobs: The parameters; empty ones are dropped.
        whole_blocks: Put only weights of equal block height together, so that the tile is a batch of equal matrices.
    """
    classes: dict[tuple[object, ...], list[Job]] = {}
    for job in jobs:
        layout = job.layout
        if layout.rows * layout.n:
            height = layout.rows // layout.blocks if whole_blocks else 0
            key = (layout.n, height, job.key, job.weight.device, compute_dtype(job.weight))
            classes.setdefault(key, []).append(job)
    packed: list[Tile] = []
    for members in classes.values():
        batch: list[Job] = []
        size = 0
        for job in members:
            more = job.layout.rows * job.layout.n
            if batch and size + more > chunk_size(job.weight.device):
                packed.append(Tile(batch))
                batch, size = [], 0
            batch.append(job)
            size += more
        packed.append(Tile(batch))
    return packed


def chunk_size(device: torch.device) -> int:
    """Elements worked on at a time: four matrices of that size fit the cache of a CPU; a GPU takes all it can get."""
    return 1 << 19 if device.type == "cpu" else 1 << 26


def row_chunks(rows: int, n: int, budget: int) -> Iterator[slice]:
    """Cut ``rows`` rows of length ``n`` into equal slices of at most ``budget`` elements (at least one row)."""
    parts = math.ceil(rows / max(1, budget // n))
    height = math.ceil(rows / parts)
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))
