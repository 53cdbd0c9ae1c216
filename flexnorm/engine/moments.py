"""Moments of an activation: one mean and one variance per sample and channel, and how they pool, in parts too.

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
from flexnorm.engine.segments import Segments
from flexnorm.kernels.tables import Pair, pool, pool_unequal

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
        count: Number of values behind each entry: an int, or a tensor: a scalar when it is known only after
            communication with other processes, (N, 1) where a mask or segments give each sample its own (with weights
            their sum).
        process_group: Group over which ``pool("batch")`` and ``pool("all")`` also pool; ``None`` for this process only.
        backend: Where the tables come from (:mod:`flexnorm.kernels`): what works on them goes on there.
    """

    def __init__(
        self,
        mean: Tensor | None = None,
        var: Tensor | None = None,
        count: int | Tensor = 1,
        *,
        process_group: ProcessGroup | None = None,
        backend: str = "composed",
        _compute: Callable[[bool], Pair] | None = None,
        _square: Callable[[], Tensor] | None = None,
    ) -> None:
        if _compute is None and (mean is None or var is None):
            raise TypeError("Moments needs both mean and var")
        self._mean = mean
        self._var = var
        self._compute = _compute
        self._graph = torch.is_grad_enabled()
        self._square = _square
        self.backend = backend
        self.count = count
        self.process_group = process_group

    @property
    def tables(self) -> Pair:
        """Means and biased variances, computed now if they have not been."""
        if self._mean is None or self._var is None:
            assert self._compute is not None
            # Read first where no gradients are recorded, as for running statistics, they still belong to the graph.
            with torch.set_grad_enabled(self._graph):
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
        if self._square is not None and self._mean is None:
            return self._square()
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
                and GroupNorm use. ``"positions"`` pools over the positions of each sample, which the moments that a
                rule receives already are, unless each position is a sample of its own. ``"all"`` pools over
                everything: (1, 1).
            groups: Number of channel groups; must divide C. Only for ``"channels"``.

        Returns:
            New moments with ``count`` multiplied accordingly. Gradients flow through, over processes too.

        Raises:
            ValueError: For an unknown ``over``, or ``groups`` that does not divide the number of channels.
        """
        if over not in ("batch", "channels", "positions", "all"):
            raise ValueError(unknown_name("pooling", over, ["batch", "channels", "positions", "all"]))
        if groups != 1 and over != "channels":
            raise ValueError(f"groups={groups} only makes sense with pool('channels'), not pool({over!r})")
        if over == "channels":
            return self._pool_channels(groups)
        if over == "positions":
            return self._pool_positions()
        return self._pool_batch() if over == "batch" else self._pool_all()

    def _with(self, mean: Tensor, var: Tensor, count: int | Tensor, backend: str = "composed") -> Moments:
        return Moments(mean, var, count, process_group=self.process_group, backend=backend)

    def _pool_positions(self) -> Moments:
        return self

    def _pool_all(self) -> Moments:
        return self._pool_channels(1)._pool_batch()

    def _pool_channels(self, groups: int) -> Moments:
        mean, var = self.tables
        samples, channels = mean.shape
        check_groups(groups, channels)
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
        if isinstance(self.count, Tensor) and self.count.dim() == 2:  # each sample has its own number of values
            local = Moments(*pool_unequal(*self.tables, self.count), self.count.sum())
        elif samples == 1:
            local = Moments(*self.tables, self.count)
        else:
            local = Moments(*pool(*self.tables, 0, self.backend), self.count * samples, backend=self.backend)
        return self._over_processes(local)

    def _over_processes(self, local: Moments) -> Moments:
        """Pool moments of shape (1, C) of this process with those of the others, if there are any."""
        if self.process_group is None:
            return local
        mean, channels = local.mean, local.mean.shape[1]
        count = torch.as_tensor(local.count, dtype=torch.float64, device=mean.device).reshape(1, 1)
        # All in one message, in float64 so that the counts are exact.
        table = torch.cat([mean.double(), local.var.double(), count], 1)
        gathered = cast("Tensor", _Gather.apply(table, self.process_group))[:, 0]  # type: ignore[no-untyped-call]
        means, variances, counts = gathered.tensor_split([channels, 2 * channels], 1)
        means, variances, counts = means.to(mean.dtype), variances.to(mean.dtype), counts[:, 0].detach()
        total = counts.sum()
        share = (counts / torch.where(total > 0, total, 1)).to(means.dtype).view(-1, 1)
        pooled = (share * means).sum(0, keepdim=True)
        pooled_var = (share * (variances + (means - pooled).square())).sum(0, keepdim=True)
        return self._with(pooled, pooled_var, total)

    def __repr__(self) -> str:
        known = "not computed yet" if self._mean is None else f"shape={tuple(self._mean.shape)}"
        return f"Moments({known}, count={self.count})"


def broadcasts(table: Tensor, rows: int, columns: int) -> bool:
    """Whether a table has two axes and broadcasts to (rows, columns)."""
    # Compared one by one: a compiler turns that into guards on sizes that it does not know.
    if table.dim() != 2 or not (table.shape[0] == 1 or table.shape[0] == rows):
        return False
    return bool(table.shape[1] == 1 or table.shape[1] == columns)


def check_groups(groups: int, channels: int) -> None:
    """Raise ValueError unless ``groups`` divides the number of channels."""
    if groups < 1 or channels % groups:
        raise ValueError(f"groups={groups} does not divide the {channels} channels")


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


def pool_positions(values: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Any]:
    """Moments (N, C) of values (N, P, C) weighted (N, P, 1), and how many stand behind each; weight 0 is no value."""
    if weights is None:
        if values.numel() == 0:
            zeros = values.sum(1)
            return zeros, zeros, values.shape[1]
        var, mean = torch.var_mean(values, 1, correction=0)
        return mean, var, values.shape[1]
    count = weights.sum(1)
    share = weights / torch.where(count > 0, count, 1).unsqueeze(1)
    values = torch.where(weights > 0, values, 0)
    mean = (share * values).sum(1)
    return mean, (share * (values - mean.unsqueeze(1)).square()).sum(1), count


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
        total = _nonzero(self.count + n)
        delta = torch.where(n > 0, mean - self.mean, 0.0)
        self.m2 = self.m2 + n * var
        if self.between:
            self.m2 = self.m2 + delta.square() * (self.count * n / total)
        self.mean = self.mean + delta * (n / total)
        self.count = self.count + n
        self.batches += 1

    def add_values(
        self, x: Tensor, weights: Tensor | None = None, segments: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Add the values ``x``, and return their own mean and variance (C,), in float32 at least.

        Args:
            x: (N, C, *).
            weights: (N, *), how much each position counts, 0 for not at all; ``None``: all alike.
            segments: (N,), the sample to which each row of ``x`` (N, C) belongs, where the rows are no samples.

        Returns:
            Mean and biased variance; where ``between`` is false, averages of the samples' means and unbiased variances.
            Those of all values so far, if none counts now.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if not x.numel():
            return self.mean, self.var
        if weights is not None or (segments is not None and not self.between):
            return self._add_weighted(x, weights, segments)
        per_sample = x.numel() // (x.shape[0] * self.mean.numel())
        if self.between:
            var, mean = torch.var_mean(x, (0, *range(2, x.dim())), correction=0)
            self.add(x.shape[0] * per_sample, mean, var)
        else:
            var, mean = torch.var_mean(x, tuple(range(2, x.dim())), correction=min(1, per_sample - 1))
            mean, var = mean.mean(0), var.mean(0)
            self.add(x.shape[0], mean, var)
        return mean, var

    def _add_weighted(self, x: Tensor, weights: Tensor | None, segments: Tensor | None) -> tuple[Tensor, Tensor]:
        values = x.flatten(2).movedim(1, -1) if x.dim() > 2 else x.unsqueeze(1)
        share = values.new_ones(values.shape[:2]) if weights is None else weights.to(values).reshape(values.shape[:2])
        if self.between:
            mean, var, count = pool_positions(values.reshape(1, -1, x.shape[1]), share.reshape(1, -1, 1))
            count, mean, var = count.sum(), mean[0], var[0]
        else:
            if segments is not None:
                own = Segments.of(segments, x)
                mean, var, count = own.moments(values.squeeze(1), share.squeeze(1))
            else:
                mean, var, count = pool_positions(values, share.unsqueeze(2))
            present = count > 0
            var = var * (count / (count - 1).clamp_min(1))
            count = present.sum()
            mean, var = ((torch.where(present, t, 0).sum(0) / count.clamp_min(1)) for t in (mean, var))
        if bool(count > 0):
            self.add(count, mean, var)
            return mean, var
        return self.mean, self.var

    def merge(self, other: Pool) -> None:
        """Add all that the ``other`` pool holds."""
        self.add(other.count, other.mean, other.var)
        self.batches += other.batches - 1

    @property
    def var(self) -> Tensor:
        """Biased variance (C,)."""
        return self.m2 / _nonzero(self.count)

    @property
    def unbiased(self) -> Tensor:
        """Unbiased variance (C,), as torch keeps it; the plain average where ``between`` is false."""
        return self.m2 / (self.count - 1).clamp_min(1) if self.between else self.var

    @property
    def finite(self) -> Tensor:
        """(C,): whether mean and variance of the channel are finite."""
        return torch.isfinite(self.mean) & torch.isfinite(self.m2)


def _nonzero(count: Tensor) -> Tensor:
    """A number of values to divide by; weights may add up to less than one."""
    return torch.where(count > 0, count, 1)


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
    for merged in pools:
        end = offset + 2 + 2 * merged.mean.numel()
        shares, offset = [part[offset:end] for part in parts], end
        merged.count, merged.mean, merged.m2 = (torch.zeros_like(t) for t in (merged.count, merged.mean, merged.m2))
        # The order of the processes is the same everywhere, so the sums round alike.
        for share in shares:
            count, (mean, m2) = share[1], share[2:].tensor_split(2)
            merged.add(count, mean, m2 / _nonzero(count))
        merged.batches = int(max(share[0] for share in shares))


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
