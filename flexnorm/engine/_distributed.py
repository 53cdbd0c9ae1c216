"""Moments across processes: one differentiable gather of two small tables, on any backend (gloo on CPU included)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _Gather(torch.autograd.Function):
    """All-gather a table; the gradient of each process's part is summed over the processes.

    The sum makes ``backward`` of the local losses equal to one ``backward`` of their sum, which is what gradient
    averaging over processes (DDP) expects.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(table) for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather(parts, table.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous().clone()
        torch.distributed.all_reduce(total, group=ctx.group)
        return total[torch.distributed.get_rank(ctx.group)], None


def gather_tables(mean: Tensor, var: Tensor, count: int | Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Gather (1, C) tables and counts from every process of ``group``.

    Returns:
        Means (world, C), variances (world, C) and counts (world,), the counts in float64 so that they are exact:
        all travel in it, in one message.
    """
    counts = torch.as_tensor(count, dtype=torch.float64, device=mean.device).reshape(1, 1)
    local = torch.cat([mean.double(), var.double(), counts], 1)
    gathered = cast("Tensor", _Gather.apply(local, group))[:, 0]  # type: ignore[no-untyped-call]
    means, variances, counts = gathered.tensor_split([mean.shape[1], 2 * mean.shape[1]], 1)
    return means.to(mean.dtype), variances.to(mean.dtype), counts[:, 0].detach()
