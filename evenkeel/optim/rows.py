r"""Which numbers of a parameter form one weight vector, and how to lay them out as rows of a matrix.

The weight vector of an output unit is a slice along the output axis: axis 0 for linear layers and convolutions, axis 1
for transposed convolutions, whose weight is ``(in, out / groups, *kernel)`` with the groups hidden in axis 0.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

__all__ = ["Job", "RowLayout", "Tile", "Workspace", "from_rows", "local_part", "tiles", "to_rows"]


@dataclass(frozen=True)
class RowLayout:
    """How one parameter is read as rows.

    Attributes:
        rows: Number of weight vectors.
        n: Length of one weight vector.
        row_dim: Axis of the output units, 0 or 1.
        blocks: Groups of the convolution; rows come in this many equal blocks.
        order: Permutation of the axes behind the first, so that memory is walked in its own order.
    """

    rows: int
    n: int
    row_dim: int
    blocks: int
    order: tuple[int, ...]

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
                "put it into a group with manifold=False (evenkeel.optim.param_groups(model) sorts this out)"
            )
        if weight.shape[0] % blocks:
            raise ValueError(f"row_groups={blocks} does not divide axis 0 of a weight of shape {tuple(weight.shape)}")
        rows = weight.shape[0] if row_dim == 0 else weight.shape[1] * blocks
        axes = range(1, weight.ndim)
        # Within a row the order of the elements is free, so take the one in memory: channels_last needs no copy.
        order = tuple(axes) if weight.is_contiguous() else tuple(sorted(axes, key=weight.stride, reverse=True))
        return cls(rows, weight.numel() // rows if rows else 0, row_dim, blocks, order)

    def view(self, t: Tensor) -> Tensor:
        """View a tensor of the shape of the weight with the row axis (or axes: block, unit) in front."""
        if self.row_dim == 0:
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
        grad: Its gradient; never written to.
        moment: First moment of the shape of the weight, in the compute dtype; None where there is no momentum.
        second: Second moment per row, ``(rows,)``; None where there is none.
        key: Whatever else must agree within a tile (Adam's step count).
    """

    index: int
    layout: RowLayout
    weight: Tensor
    grad: Tensor
    moment: Tensor | None = None
    second: Tensor | None = None
    key: float = 0.0


class Workspace:
    """Buffers that live from step to step: fresh memory costs more than the arithmetic done in it."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, int], like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return an uninitialized matrix; its content is lost at the next ``take`` of that name."""
        size, key = shape[0] * shape[1], (name, like.device, dtype)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[key] = torch.empty(size, dtype=dtype, device=like.device)
        return buffer[:size].view(shape)


class Tile:
    """Rows of several parameters, of equal length, worked on as one matrix.

    Small parameters are gathered, so that a hundred of them cost the dispatch of a few; a large one is worked on where
    it lies.

    Attributes:
        weight, grad: Matrices ``(rows, n)`` in the compute dtype. ``grad`` must not be written to.
        moment: First moments ``(rows, n)``, or None.
        second: Second moments ``(rows, 1)``, or None.
        jobs: The parameters, in order of their rows.
    """

    def __init__(self, jobs: list[Job], workspace: Workspace) -> None:
        self.jobs = jobs
        first = jobs[0]
        self.rows, self.n = sum(job.layout.rows for job in jobs), first.layout.n
        self.dtype = compute_dtype(first.weight)
        self._pending: list[tuple[list[Tensor], list[Tensor]]] = []
        self.weight = self._matrix("weight", [job.weight for job in jobs], workspace, written=True)
        self.grad = self._matrix("grad", [job.grad for job in jobs], workspace, written=False)
        self.moment: Tensor | None = None
        self.second: Tensor | None = None
        if first.moment is not None:
            moments = [cast(Tensor, job.moment) for job in jobs]
            self.moment = self._matrix("moment", moments, workspace, written=True)
        if first.second is not None:
            seconds = [cast(Tensor, job.second) for job in jobs]
            self.second = torch.cat(seconds).unsqueeze(1)
            self._pending.append((seconds, list(torch.split(self.second.squeeze(1), [len(s) for s in seconds]))))

    def _matrix(self, name: str, parts: list[Tensor], workspace: Workspace, *, written: bool) -> Tensor:
        views = [job.layout.view(part) for job, part in zip(self.jobs, parts, strict=True)]
        if len(views) == 1 and views[0].is_contiguous() and views[0].dtype == self.dtype:
            return views[0].view(self.rows, self.n)
        matrix = workspace.take(name, (self.rows, self.n), views[0], self.dtype)
        parts = list(torch.split(matrix, [job.layout.rows for job in self.jobs]))
        slots = [part.view(view.shape) for part, view in zip(parts, views, strict=True)]
        torch._foreach_copy_(slots, views)
        if written:
            self._pending.append((views, slots))
        return matrix

    def store(self) -> None:
        """Write what was gathered back to where it came from."""
        for targets, sources in self._pending:
            torch._foreach_copy_(targets, sources)

    def split(self, column: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield (index of the parameter, its part) of a column ``(rows, 1)``."""
        for job, part in zip(
            self.jobs, torch.split(column.squeeze(1), [j.layout.rows for j in self.jobs]), strict=True
        ):
            yield job.index, part


def tiles(jobs: Iterable[Job], workspace: Workspace, budget: int, whole_blocks: bool) -> Iterator[Tile]:
    """Pack parameters into tiles, loading each only when the one before is done with.

    Args:
        jobs: The parameters of one group; empty ones are dropped.
        workspace: Where gathered tiles live.
        budget: Number of elements up to which parameters are put together.
        whole_blocks: Put only weights of equal block height together, so that the tile is a batch of equal matrices.

    Yields:
        Tiles; the caller works on each and calls its ``store``.
    """
    classes: dict[tuple[object, ...], list[Job]] = {}
    for job in jobs:
        layout = job.layout
        if layout.rows * layout.n == 0:
            continue
        height = layout.rows // layout.blocks if whole_blocks else 0
        key = (layout.n, height, job.key, job.weight.device, compute_dtype(job.weight))
        classes.setdefault(key, []).append(job)
    for members in classes.values():
        batch: list[Job] = []
        size = 0
        for job in members:
            more = job.layout.rows * job.layout.n
            if batch and size + more > budget:
                yield Tile(batch, workspace)
                batch, size = [], 0
            batch.append(job)
            size += more
        yield Tile(batch, workspace)


def row_chunks(rows: int, n: int, budget: int) -> Iterator[slice]:
    """Cut ``rows`` rows of length ``n`` into equal slices of at most ``budget`` elements (at least one row)."""
    parts = math.ceil(rows / max(1, budget // n))
    height = math.ceil(rows / parts)
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))
