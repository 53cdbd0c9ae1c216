"""Moments of an activation: one mean and one variance per sample and channel, and how they pool.

Every pooling is exact by the parallel formula of Chan, Golub & LeVeque (1979): the variance of a union is the mean of
the variances plus the variance of the means. ``E[x^2] - E[x]^2`` is never formed: it cancels catastrophically.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flexnorm._messages import unknown_name
from flexnorm.kernels.tables import Pair, pool

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Moments:
    """Mean and biased variance of an activation over groups of its values, as two small tables.

    Handed to a rule by :func:`flexnorm.flex_norm`. For ``x`` of shape (N, C, *spatial) the tables are (N, C), in
    float32 at least (float64 for float64 input), and are computed when they are first read: a rule that never looks
    at them costs no pass over ``x``.

    Args:
        mean: (N, C) or any shape that broadcasts to it.
        var: Biased variance (divided by the number of values), same shape as ``mean``.
        count: Number of values behind each entry: an int, or a scalar tensor when it is known only after
            communication with other processes.
        process_group: Group over which ``pool("batch")`` and ``pool("all")`` also pool; ``None`` for this process only.

    Attributes:
        count: Number of values behind each entry.
        backend: Where the tables come from (:mod:`flexnorm.kernels`); what works on them goes on there.
    """

    def __init__(
        self,
        mean: Tensor | None = None,
        var: Tensor | None = None,
        count: int | Tensor = 1,
        *,
        process_group: ProcessGroup | None = None,
        _compute: Callable[[bool], Pair] | None = None,
        _backend: str = "composed",
    ) -> None:
        if _compute is None and (mean is None or var is None):
            raise TypeError("Moments needs both mean and var")
        self._mean = mean
        self._var = var
        self._compute = _compute
        self.backend = _backend
        self.count = count
        self.process_group = process_group

    @property
    def tables(self) -> Pair:
        """Means and biased variances, computed now if they have not been."""
        if self._mean is None or self._var is None:
            assert self._compute is not None
            self._mean, self._var = self._compute(True)
        return self._mean, self._var

    @property
    def mean(self) -> Tensor:
        """Means, (N, C) for the moments that a rule receives."""
        return self.tables[0]

    @property
    def var(self) -> Tensor:
        """Biased variances, of the shape of ``mean``."""
        return self.tables[1]

    @property
    def mean_square(self) -> Tensor:
        """Second moments about zero, ``var + mean**2``: what RMS and filter response normalization divide by."""
        mean, var = self.tables
        return var + mean.square()

    def detach(self) -> Moments:
        """Return the same moments outside the graph: for running statistics, at the price of one forward pass only."""
        if self._compute is None or self._mean is not None:
            return self._with(self.mean.detach(), self.var.detach(), self.count, self.backend)
        with torch.no_grad():
            return self._with(*self._compute(False), self.count, self.backend)

    def pool(self, over: str, groups: int = 1) -> Moments:
        """Return the moments of larger groups of values, exactly.

        Args:
            over: ``"batch"`` pools over the samples (and over the processes of the group): tables of shape (1, C), as
                BatchNorm uses. ``"channels"`` pools over the channels of each sample, in ``groups`` equal groups of
                neighbours: tables (N, 1) for one group, else (N, C) with equal entries inside a group, as LayerNorm
                and GroupNorm use. ``"all"`` pools over everything: (1, 1).
            groups: Number of channel groups; must divide C. Only for ``"channels"``.

        Returns:
            New moments with ``count`` multiplied accordingly. Gradients flow through, over processes too.

        Raises:
            ValueError: For an unknown ``over``, or ``groups`` that does not divide the number of channels.
        """
        if over not in ("batch", "channels", "all"):
            raise ValueError(unknown_name("pooling", over, ["batch", "channels", "all"]))
        if groups != 1 and over != "channels":
            raise ValueError(f"groups={groups} only makes sense with pool('channels'), not pool({over!r})")
        if over == "channels":
            return self._pool_channels(groups)
        local = self if over == "batch" else self._pool_channels(1)
        return local._pool_batch()

    def _with(self, mean: Tensor, var: Tensor, count: int | Tensor, backend: str = "composed") -> Moments:
        return Moments(mean, var, count, process_group=self.process_group, _backend=backend)

    def _pool_channels(self, groups: int) -> Moments:
        mean, var = self.tables
        samples, channels = mean.shape
        if groups < 1 or channels % groups:
            raise ValueError(f"groups={groups} does not divide the {channels} channels")
        if groups == channels:
            return self
        count = self.count * (channels // groups)
        if groups == 1:
            return self._with(*pool(mean, var, 1, self.backend), count)
        split = (samples, groups, channels // groups)
        pooled = pool(mean.view(split), var.view(split), 2, self.backend)
        mean, var = (table.expand(split).reshape(samples, channels) for table in pooled)
        return self._with(mean, var, count)

    def _pool_batch(self) -> Moments:
        samples = self.mean.shape[0]
        if samples == 1:
            local = Moments(*self.tables, self.count)
        else:
            local = Moments(*pool(*self.tables, 0, self.backend), self.count * samples, _backend=self.backend)
        if self.process_group is None:
            return local
        means, variances, counts = _gather(local.mean, local.var, local.count, self.process_group)
        total = counts.sum()
        share = (counts / total.clamp_min(1)).to(means.dtype).view(-1, 1)
        pooled = (share * means).sum(0, keepdim=True)
        pooled_var = (share * (variances + (means - pooled).square())).sum(0, keepdim=True)
        return self._with(pooled, pooled_var, total)

    def __repr__(self) -> str:
        known = "not computed yet" if self._mean is None else f"shape={tuple(self._mean.shape)}"
        return f"Moments({known}, count={self.count})"


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


def _gather(mean: Tensor, var: Tensor, count: int | Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
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
