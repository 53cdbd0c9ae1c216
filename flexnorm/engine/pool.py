"""Moments of values that come in parts, pooled exactly by the parallel formula of Chan, Golub & LeVeque (1979)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Pool:
    """Count, mean and variance per channel of batches, chunks, processes or the members of a federation, merged.

    Exact whatever the sizes of the parts, in float64 (float32 on Apple's devices, which have no float64). With
    ``d = mean_b - mean_a``, ``n = n_a + n_b`` and M2 the sum of squared deviations::

        mean = mean_a + d n_b / n        M2 = M2_a + M2_b + d^2 n_a n_b / n

    Args:
        channels: Number of channels C.
        device: Where to keep the numbers.
        between: Whether the variance between the means of the parts counts, as it does for a population. ``False``
            averages the variances only, as instance normalization's running variance does: the parts are samples.

    Attributes:
        count: Scalar tensor: number of values per channel (of samples, if ``between`` is false).
        mean: (C,).
        m2: (C,), ``count`` times the biased variance.
        batches: How many parts there were.

    Examples:
        >>> pool = Pool(1)
        >>> pool.add_values(torch.tensor([[0.0], [2.0]]))
        (tensor([1.]), tensor([1.]))
        >>> pool.add(2, mean=torch.tensor([5.0]), var=torch.tensor([1.0]))  # of the values 4 and 6, seen elsewhere
        >>> pool.mean, pool.var
        (tensor([3.], dtype=torch.float64), tensor([5.], dtype=torch.float64))
    """

    def __init__(self, channels: int, device: torch.device | str | None = None, *, between: bool = True) -> None:
        dtype = torch.float32 if torch.device(device or "cpu").type == "mps" else torch.float64
        self.count = torch.zeros((), dtype=dtype, device=device)
        self.mean = torch.zeros(channels, dtype=dtype, device=device)
        self.m2 = torch.zeros_like(self.mean)
        self.between = between
        self.batches = 0

    def add(self, count: int | Tensor, mean: Tensor, var: Tensor) -> None:
        """Add ``count`` values per channel with their ``mean`` (C,) and biased variance ``var`` (C,)."""
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

    def add_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Add the values ``x`` (N, C, *), and return their own mean and variance (C,), in float32 at least.

        The variance is the biased one; where ``between`` is false, the average of the samples' unbiased ones.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if not x.numel():
            return self.mean, self.var
        per_sample = x.numel() // (x.shape[0] * self.mean.numel())
        if self.between:
            var, mean = torch.var_mean(x, (0, *range(2, x.dim())), correction=0)
            self.add(x.shape[0] * per_sample, mean, var)
        else:
            var, mean = torch.var_mean(x, tuple(range(2, x.dim())), correction=min(1, per_sample - 1))
            mean, var = mean.mean(0), var.mean(0)
            self.add(x.shape[0], mean, var)
        return mean, var

    def merge(self, other: Pool) -> None:
        """Add all that the ``other`` pool holds."""
        self.add(other.count, other.mean, other.var)
        self.batches += other.batches - 1

    @property
    def var(self) -> Tensor:
        """Biased variance (C,)."""
        return self.m2 / self.count.clamp_min(1)

    @property
    def unbiased(self) -> Tensor:
        """Unbiased variance (C,), as torch keeps it; the plain average where ``between`` is false."""
        return self.m2 / (self.count - 1).clamp_min(1) if self.between else self.var

    @property
    def finite(self) -> Tensor:
        """(C,): whether mean and variance of the channel are finite."""
        return torch.isfinite(self.mean) & torch.isfinite(self.m2)


def pool_processes(pools: list[Pool], group: ProcessGroup | None) -> None:
    """Make each of ``pools`` hold the values of all processes of ``group``, the same to the last bit in all of them.

    ``None`` stands for this process alone: nothing to do.
    """
    if group is None:
        return
    on_cpu = torch.distributed.get_backend(group) == "gloo"
    device = torch.device("cpu") if on_cpu else pools[0].mean.device
    tables = [torch.cat([p.count.new_tensor([p.batches]), p.count.reshape(1), p.mean, p.m2]) for p in pools]
    local = torch.cat([table.to(device) for table in tables])
    parts = [torch.empty_like(local) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, local, group=group)
    offset = 0
    for pool in pools:
        end = offset + 2 + 2 * pool.mean.numel()
        shares, offset = [part[offset:end] for part in parts], end
        pool.count, pool.mean, pool.m2 = (torch.zeros_like(t) for t in (pool.count, pool.mean, pool.m2))
        # The order of the processes is the same everywhere, so the sums round alike.
        for share in shares:
            count, (mean, m2) = share[1], share[2:].tensor_split(2)
            pool.add(count, mean, m2 / count.clamp_min(1))
        pool.batches = int(max(share[0] for share in shares))


def active_group(process_group: ProcessGroup | str | None = "world") -> ProcessGroup | None:
    """The processes to communicate with, or ``None`` where there are none.

    Args:
        process_group: A group, ``"world"`` for all processes where torch.distributed is initialized, or ``None``.

    Raises:
        ValueError: If it is another string.
    """
    if isinstance(process_group, str) and process_group != "world":
        raise ValueError(f"process_group must be a ProcessGroup, 'world' or None, got {process_group!r}")
    if process_group is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    return torch.distributed.group.WORLD if isinstance(process_group, str) else process_group
