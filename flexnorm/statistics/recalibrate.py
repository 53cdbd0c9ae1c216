"""Exact population statistics of the normalization layers of a model, from batches of data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexnorm.nn import norm_of
from flexnorm.probe import isolated, unwrap
from flexnorm.probe.tree import Selector, find, select
from flexnorm.statistics._pool import Pool, pool_processes
from flexnorm.statistics.frozen import has_statistics, is_frozen

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["recalibrate"]

_HALF = (torch.float16, torch.bfloat16)


class _Reached(BaseException):
    """Ends a forward pass at the layer that was to be looked at. No model's ``except Exception`` may swallow it."""


@torch.no_grad()
def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    sequential: bool = False,
    include: Selector | None = None,
    exclude: Selector | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    device: torch.device | str | None = None,
    process_group: ProcessGroup | str | None = "world",
) -> nn.Module:
    """Replace the running statistics by the moments of the layers' inputs over all batches.

    Means and variances are pooled exactly, weighted by the number of values (Chan's formula in float64), so unequal
    batches, batches of one sample, and the variance between batches are all accounted for. The model is called in
    evaluation mode without gradients: dropout is off, because the statistics are for evaluation. Besides the running
    statistics nothing changes: training flags, momentum, other buffers and the random state are as before, and
    ``num_batches_tracked`` too, unless it was 0 (then it becomes the number of batches). Frozen layers, and layers that
    the forward in evaluation does not reach, keep their statistics.

    What a layer's input is depends on how the layers before it normalize while the data is collected:

    * by default with the statistics of each batch, as in training ("precise BN"): one pass over the data;
    * with ``sequential=True`` with their own new population statistics, layer after layer, so that every statistic
      describes exactly the network as it evaluates. One pass per layer, each only as deep as that layer, and for any
      batch size, one sample included.

    Args:
        model: Any model with layers of torch or of this package that keep running statistics.
        batches: Batches of data; iterated once (``sequential``: several times). A tensor is the model's argument; of a
            tuple or list, the first element is (the rest are targets); a mapping holds keyword arguments.
        sequential: See above.
        include: Only these layers, as of :func:`flexnorm.freeze`.
        exclude: Not these layers.
        forward: How to call the model, ``forward(model, batch)``, where the above does not fit.
        device: Where to move the batches; by default to the device of the model's first parameter.
        process_group: Pool over these processes, each with its own batches (as many or few as it has, none included):
            ``"world"`` for all of them where torch.distributed is initialized (then every process has to call this),
            a group, or ``None`` for this process alone. All of them end with the same statistics.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: If no layer has running statistics that are not frozen, there is no batch at all, or ``batches``
            can be iterated only once although ``sequential`` needs more.
        RuntimeError: If a layer's input is not finite. Nothing is changed then.

    Examples:
        >>> model = nn.Sequential(nn.BatchNorm1d(1))
        >>> _ = recalibrate(model, [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0]])])
        >>> model[0].running_mean, model[0].running_var
        (tensor([2.]), tensor([4.]))
    """
    inner = unwrap(model)
    places = select(find(inner, has_statistics), include, exclude)
    layers = {place.module: place.name for place in places if not is_frozen(place.module)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no normalization layer with running statistics to recalibrate")
    if sequential and iter(batches) is batches:
        raise ValueError(
            "sequential=True goes over the data once per layer, but batches can be iterated only once; "
            "pass a list, a DataLoader, or another object that can be iterated again"
        )
    group = _group(process_group)
    run = _Run(inner, batches, forward, device)
    with isolated(inner, 0):
        inner.eval()
        pools = run.layer_by_layer(layers, group) if sequential else run.at_once(layers, group)
    _refuse_non_finite(layers, pools)
    for module, pool in pools.items():
        _write(module, pool)
    return model


class _Run:
    """The passes over the data; works on the private buffers that :func:`isolated` has put into the model."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        forward: Callable[[nn.Module, Any], Any] | None,
        device: torch.device | str | None,
    ) -> None:
        self.model = model
        self.batches = batches
        self.forward = forward or _call
        first = next((t for t in (*model.parameters(), *model.buffers())), None)
        self.device = device if device is not None or first is None else first.device

    def moved(self) -> Iterator[Any]:
        for batch in self.batches:
            yield batch if self.device is None else _to(batch, self.device)

    def at_once(self, layers: Mapping[nn.Module, str], group: ProcessGroup | None) -> dict[nn.Module, Pool]:
        """One pass; every layer normalizes with the statistics of the batch."""
        pools = {module: _new_pool(module) for module in layers}

        def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            mean, var = _add(pools[module], inputs[0])
            # Evaluation with these is normalization with the batch, without counters and momenta to take care of.
            _put(module, mean, var)

        handles = [module.register_forward_pre_hook(look) for module in layers]
        try:
            seen = 0
            for batch in self.moved():
                self.forward(self.model, batch)
                seen += 1
        finally:
            for handle in handles:
                handle.remove()
        _refuse_nothing(seen, group)
        if group is not None:
            pool_processes(list(pools.values()), group)
        return pools

    def layer_by_layer(self, layers: Mapping[nn.Module, str], group: ProcessGroup | None) -> dict[nn.Module, Pool]:
        """A pass per layer, in the order of execution; the layers before it use their new statistics."""
        calls = self._order(layers)
        _refuse_nothing(len(calls), group)
        by_name = {name: module for module, name in layers.items()}
        order = [layers[module] for module in calls]
        if group is not None:
            # A process without data does not know the order; all have to agree on one.
            orders: list[Any] = [None] * torch.distributed.get_world_size(group)
            torch.distributed.all_gather_object(orders, order, group=group)
            order = next(filter(None, orders), order)
        pools: dict[nn.Module, Pool] = {}
        for name in order:
            module = by_name[name]
            pool = pools[module] = _new_pool(module)
            self._look_at(module, pool, calls.get(module, 0))
            if group is not None:
                pool_processes([pool], group)
            _put(module, *_final(module, pool))
        return pools

    def _order(self, layers: Mapping[nn.Module, str]) -> dict[nn.Module, int]:
        """Layers in the order in which the first batch reaches them, and how often it does."""
        calls: Counter[nn.Module] = Counter()

        def count(module: nn.Module, _: tuple[Any, ...]) -> None:
            calls[module] += 1

        handles = [module.register_forward_pre_hook(count) for module in layers]
        try:
            for batch in self.moved():
                self.forward(self.model, batch)
                break
        finally:
            for handle in handles:
                handle.remove()
        return dict(calls)

    def _look_at(self, module: nn.Module, pool: Pool, calls: int) -> None:
        reached = 0

        def look(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            nonlocal reached
            _add(pool, inputs[0])
            reached += 1
            if reached == calls:
                raise _Reached

        handle = module.register_forward_pre_hook(look)
        try:
            for batch in self.moved():
                reached = 0
                try:
                    self.forward(self.model, batch)
                except _Reached:
                    continue
        finally:
            handle.remove()


def _group(process_group: ProcessGroup | str | None) -> ProcessGroup | None:
    if isinstance(process_group, str) and process_group != "world":
        raise ValueError(f"process_group must be a ProcessGroup, 'world' or None, got {process_group!r}")
    if process_group is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    return torch.distributed.group.WORLD if isinstance(process_group, str) else process_group


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def _to(batch: Any, device: torch.device | str) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_to(item, device) for item in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(_to(item, device) for item in batch)
    return batch


def _new_pool(module: nn.Module) -> Pool:
    return Pool(module.get_buffer("running_mean"), between=not _averages_instances(module))


def _averages_instances(module: nn.Module) -> bool:
    """Instance normalization, whose running statistics are the average of the instances' own."""
    norm = norm_of(module)
    return norm is not None and norm.statistics_from == "sample"


def _add(pool: Pool, x: Tensor) -> tuple[Tensor, Tensor]:
    """Let the input of a layer enter its pool; returns mean and biased variance of this input alone, (C,)."""
    channels = pool.mean.numel()
    if pool.between is False and x.dim() >= 2 and x.shape[1] != channels and x.shape[0] == channels:
        x = x.unsqueeze(0)  # torch's instance normalization also takes (C, *spatial)
    values = x.float() if x.dtype in _HALF else x
    if not values.numel():
        return pool.mean, pool.var
    positions = values.numel() // (values.shape[0] * channels)
    if pool.between:
        var, mean = torch.var_mean(values, (0, *range(2, values.dim())), correction=0)
        pool.add(values.shape[0] * positions, mean, var)
        return mean, var
    var, mean = torch.var_mean(values, tuple(range(2, values.dim())), correction=min(1, positions - 1))
    mean, var = mean.mean(0), var.mean(0)
    pool.add(values.shape[0], mean, var)
    return mean, var


def _final(module: nn.Module, pool: Pool) -> tuple[Tensor, Tensor]:
    """What the layer shall keep: population normalization the biased variance, all others torch's unbiased one."""
    norm = norm_of(module)
    return pool.mean, pool.var if norm is not None and norm.statistics_from == "population" else pool.unbiased


def _put(module: nn.Module, mean: Tensor, var: Tensor) -> None:
    """Exchange the private buffers; the model's own are not touched before the end."""
    for name, value in (("running_mean", mean), ("running_var", var)):
        module._buffers[name] = value.to(module.get_buffer(name))


def _refuse_nothing(seen: int, group: ProcessGroup | None) -> None:
    if group is not None:
        counts: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(counts, seen, group=group)
        seen = sum(counts)
    if not seen:
        raise ValueError("batches is empty: there is nothing to take statistics of")


def _refuse_non_finite(layers: Mapping[nn.Module, str], pools: Mapping[nn.Module, Pool]) -> None:
    for module, pool in pools.items():
        if not bool(torch.isfinite(pool.mean).all() & torch.isfinite(pool.m2).all()):
            raise RuntimeError(
                f"the input of {layers[module] or 'the model'} ({type(module).__name__}) is not finite for some batch; "
                "no statistics were changed"
            )


def _write(module: nn.Module, pool: Pool) -> None:
    if not bool(pool.count > 0):
        return
    mean, var = _final(module, pool)
    module.get_buffer("running_mean").copy_(mean)
    module.get_buffer("running_var").copy_(var)
    tracked = module._buffers.get("num_batches_tracked")
    if tracked is not None and not isinstance(module, nn.modules.instancenorm._InstanceNorm):
        tracked.copy_(torch.where(tracked == 0, pool.batches, tracked))
