"""Moments of one layer, pooled over batches and processes in float64 by the formula of Chan, Golub & LeVeque (1979)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Pool", "pool_processes"]


class Pool:
    """Count, mean and sum of squared deviations per channel, to which batches are added.

    Args:
        like: Running mean of the layer (C,): size and device.
        between: Whether the spread of the batch means belongs to the variance, as it does for a population. ``False``
            averages the variances only, as instance normalization's running variance does.

    Attributes:
        count: Scalar tensor: number of values per channel (samples, if ``between`` is false).
        mean: (C,).
        m2: (C,), ``count`` times the biased variance.
        batches: How often :meth:`add` was called.
    """

    def __init__(self, like: Tensor, between: bool = True) -> None:
        # Apple's devices have no float64.
        dtype = torch.float32 if like.device.type == "mps" else torch.float64
        self.count = torch.zeros((), dtype=dtype, device=like.device)
        self.mean = torch.zeros(like.numel(), dtype=dtype, device=like.device)
        self.m2 = torch.zeros_like(self.mean)
        self.between = between
        self.batches = 0

    def add(self, count: int | Tensor, mean: Tensor, var: Tensor) -> None:
        """Add a batch of ``count`` values per channel with their mean (C,) and biased variance (C,)."""
        n = torch.as_tensor(count).to(self.count)
        mean, var = mean.reshape(-1).to(self.mean), var.reshape(-1).to(self.mean)
        total = (self.count + n).clamp_min(1)
        delta = torch.where(n > 0, mean - self.mean, 0.0)
        self.m2 = self.m2 + n * var
        if self.between:
            self.m2 = self.m2 + delta.square() * (self.count * n / total)
        self.mean = self.mean + delta * (n / total)
        self.count = self.count + n
        self.batches += 1

    @property
    def var(self) -> Tensor:
        """Biased variance (C,)."""
        return self.m2 / self.count.clamp_min(1)

    @property
    def unbiased(self) -> Tensor:
        """Unbiased variance (C,), as torch keeps it; the plain average where ``between`` is false."""
        return self.m2 / (self.count - 1).clamp_min(1) if self.between else self.var


def pool_processes(pools: list[Pool], group: ProcessGroup) -> None:
    """Make every pool hold the values of all processes, the same to the last bit in each of them."""
    world = torch.distributed.get_world_size(group)
    on_cpu = torch.distributed.get_backend(group) == "gloo"
    device = torch.device("cpu") if on_cpu else pools[0].mean.device
    tables = [torch.cat([p.count.new_tensor([p.batches]), p.count.reshape(1), p.mean, p.m2]) for p in pools]
    local = torch.cat([table.to(device) for table in tables])
    parts = [torch.empty_like(local) for _ in range(world)]
    torch.distributed.all_gather(parts, local, group=group)
    offset = 0
    for pool in pools:
        size = pool.mean.numel()
        joined = Pool(pool.mean, pool.between)
        batches = 0
        for part in parts:
            # The order of the processes is the same everywhere, so the sums round alike.
            mine = part[offset : offset + 2 + 2 * size].to(pool.mean.device)
            count, mean, m2 = mine[1], mine[2 : 2 + size], mine[2 + size :]
            joined.add(count, mean, m2 / count.clamp_min(1))
            batches = max(batches, int(mine[0]))
        pool.count, pool.mean, pool.m2, pool.batches = joined.count, joined.mean, joined.m2, batches
        offset += 2 + 2 * size
