"""Exact population statistics of the normalization layers of a model, from batches of data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexnorm.engine import Pool, active_group, pool_processes
from flexnorm.probe import Selection, batch_inputs, find_places, isolated, map_tensors, select_places, unwrap
from flexnorm.statistics._layers import has_statistics, kept, new_pool, put, watching
from flexnorm.statistics.frozen import is_frozen

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _Reached(BaseException):
    """Ends a forward pass at the layer that was to be looked at. No model's ``except Exception`` may swallow it."""


@torch.no_grad()
def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    sequential: bool = False,
    include: Selection | None = None,
    exclude: Selection | None = None,
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
    places = select_places(find_places(inner, has_statistics), include, exclude)
    layers = {place.module: place.name for place in places if not is_frozen(place.module)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no normalization layer with running statistics to recalibrate")
    if sequential and iter(batches) is batches:
        raise ValueError(
            "sequential=True goes over the data once per layer, but batches can be iterated only once; "
            "pass a list, a DataLoader, or another object that can be iterated again"
        )
    device = device or next(iter((*inner.parameters(), *inner.buffers()))).device
    run = _Run(inner, batches, forward or _call, device, active_group(process_group))
    with isolated(inner, 0):
        inner.eval()
        pools = run.layer_by_layer(layers) if sequential else run.at_once(layers)
    for module, pool in pools.items():
        if not bool(pool.finite.all()):
            raise RuntimeError(
                f"the input of {layers[module] or 'the model'} ({type(module).__name__}) is not finite for some batch; "
                "no statistics were changed"
            )
    for module, pool in pools.items():
        if bool(pool.count > 0):
            mean, var = kept(module, pool)
            module.get_buffer("running_mean").copy_(mean)
            module.get_buffer("running_var").copy_(var)
            tracked = module._buffers.get("num_batches_tracked")
            if tracked is not None and not isinstance(module, nn.modules.instancenorm._InstanceNorm):
                tracked.copy_(torch.where(tracked == 0, pool.batches, tracked))
    return model


@dataclass
class _Run:
    """The passes over the data; works on the private buffers that :func:`isolated` has put into the model."""

    model: nn.Module
    batches: Iterable[Any]
    forward: Callable[[nn.Module, Any], Any]
    device: torch.device | str
    group: ProcessGroup | None

    def moved(self) -> Iterator[Any]:
        for batch in self.batches:
            yield map_tensors(lambda tensor: tensor.to(self.device), batch)

    def at_once(self, layers: Mapping[nn.Module, str]) -> dict[nn.Module, Pool]:
        """One pass; every layer normalizes with the statistics of the batch."""
        pools = {module: new_pool(module) for module in layers}
        seen = 0
        # Evaluation with a batch's own moments is normalization with the batch, without counters and momenta.
        with watching(layers, lambda module, x: put(module, *pools[module].add_values(x))):
            for batch in self.moved():
                self.forward(self.model, batch)
                seen += 1
        self._refuse_nothing(seen)
        pool_processes(list(pools.values()), self.group)
        return pools

    def layer_by_layer(self, layers: Mapping[nn.Module, str]) -> dict[nn.Module, Pool]:
        """A pass per layer, in the order of execution; the layers before it use their new statistics."""
        calls: Counter[nn.Module] = Counter()  # in the order in which the first batch reaches them
        with watching(layers, lambda module, _: calls.update([module])):
            for batch in self.moved():
                self.forward(self.model, batch)
                break
        self._refuse_nothing(len(calls))
        by_name = {name: module for module, name in layers.items()}
        # A process without data does not know the order; all have to agree on one.
        orders = self._gathered([layers[module] for module in calls])
        pools: dict[nn.Module, Pool] = {}
        for module in (by_name[name] for name in next(filter(None, orders), [])):
            pool = pools[module] = new_pool(module)
            self._look_at(module, pool, calls[module])
            pool_processes([pool], self.group)
            put(module, *kept(module, pool))
        return pools

    def _look_at(self, module: nn.Module, pool: Pool, calls: int) -> None:
        reached = 0

        def look(_: nn.Module, x: Tensor) -> None:
            nonlocal reached
            pool.add_values(x)
            reached += 1
            if reached == calls:
                raise _Reached

        with watching([module], look):
            for batch in self.moved():
                reached = 0
                with suppress(_Reached):
                    self.forward(self.model, batch)

    def _gathered(self, value: Any) -> list[Any]:
        if self.group is None:
            return [value]
        values: list[Any] = [None] * torch.distributed.get_world_size(self.group)
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    def _refuse_nothing(self, seen: int) -> None:
        if not sum(self._gathered(seen)):
            raise ValueError("batches is empty: there is nothing to take statistics of")


def _call(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, Mapping) else model(batch_inputs(batch))
