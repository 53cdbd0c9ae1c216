"""Running statistics over an accumulated batch: one update per optimizer step, however many micro-batches it has."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flexnorm.engine import FlexNorm, Moments, Pool, recomputing
from flexnorm.kernels.tables import track
from flexnorm.probe import Selection
from flexnorm.statistics.frozen import places_with_statistics
from flexnorm.statistics.recalibrate import new_pool

# The unbiased and the biased variance of that many values are the same number.
_MANY = 2**60


class Accumulation:
    """Handle of :func:`accumulate`: a context manager, or an object to call :meth:`step` and :meth:`close` on."""

    def __init__(self, layers: list[nn.Module], optimizer: Optimizer | None) -> None:
        self._parts = [_Ours(m) if isinstance(m, FlexNorm) else _Torchs(m) for m in layers]
        self._handles: list[Any] = [handle for part in self._parts for handle in part.handles]
        if optimizer is not None:
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self.step()))

    @torch.no_grad()
    def step(self) -> None:
        """Update the running statistics once, from all training forwards since the last step."""
        for part in self._parts:
            if part.pool.batches:
                part.update(part.pool)
                part.pool = new_pool(part.module)

    def close(self) -> None:
        """Give the layers back their ordinary updates; what has been collected since the last step is dropped."""
        for handle in self._handles:
            handle.remove()
        for part in self._parts:
            part.module.__dict__.pop("track", None)
        self._handles, self._parts = [], []

    def __enter__(self) -> Accumulation:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self.step()
        self.close()


def accumulate(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    include: Selection | None = None,
    exclude: Selection | None = None,
) -> Accumulation:
    """Hold back the updates of running statistics, and make one per optimizer step from the pooled micro-batches.

    BatchNorm makes one per micro-batch, from few values and without the variance between them. The pooled moments
    (Chan's formula) are exactly those of the large batch that the step stands for; the forward still normalizes each
    micro-batch with its own, as it has to, since the others are not there yet.

    Either around the micro-batches of one step (the update happens when the block ends)::

        with accumulate(model):
            for x, y in micro_batches:
                loss(model(x), y).backward()
        optimizer.step()

    or around the whole training, with the optimizer (the update follows each ``optimizer.step()``)::

        with accumulate(model, optimizer):
            train(model, optimizer)

    Works with the layers of torch and of this package, synchronized ones included. Forwards in evaluation, frozen
    layers and the recomputation of activation checkpointing do not count. Population normalization in its running
    mode normalizes with the statistics of the last step meanwhile. Pooled statistics that are not finite do not
    enter. Enter it before ``torch.compile`` compiles the model: compiled code does not see later hooks.

    Args:
        model: Any model.
        optimizer: Update after each of its steps; ``None`` to update at the end of the block or by ``step()``.
        include: Only these layers, as of :func:`flexnorm.freeze`.
        exclude: Not these layers.

    Returns:
        The handle. It is active at once, with or without a ``with`` block. Leaving the block by an exception drops
        what was collected.

    Warns:
        flexnorm.NothingDone: If no layer keeps running statistics that are not frozen.

    Examples:
        >>> model = nn.BatchNorm1d(1, momentum=1.0)
        >>> with accumulate(model):
        ...     for x in (torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [6.0]])):
        ...         _ = model(x)
        >>> model.running_mean, model.num_batches_tracked
        (tensor([3.]), tensor(1))
    """
    places = places_with_statistics("accumulate(model) holds back nothing", model, include, exclude, frozen=False)
    return Accumulation([place.module for place in places], optimizer)


class _Ours:
    """A layer of this package whose updates are held back: its ``track`` is exchanged on the instance."""

    def __init__(self, module: FlexNorm) -> None:
        self.module = module
        self.pool = new_pool(module)
        self.handles: list[Any] = []
        module.__dict__["track"] = functools.partial(self._record)

    @torch.no_grad()
    def _record(self, pooled: Moments) -> None:
        if not (self.module.frozen or recomputing()):
            self.pool.add(pooled.count, pooled.mean.detach(), pooled.var.detach())

    def update(self, pool: Pool) -> None:
        dtype = self.module.get_buffer("running_mean").dtype
        count = pool.count if pool.between else _MANY
        type(self.module).track(self.module, Moments(pool.mean.to(dtype)[None], pool.var.to(dtype)[None], count))


class _Torchs:
    """A layer of torch: during the forward it writes the bare batch statistics into scratch buffers."""

    _names = ("running_mean", "running_var", "num_batches_tracked")

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.pool = new_pool(module)
        self.saved: dict[str, Any] | None = None
        self.handles = [
            module.register_forward_pre_hook(self._before),
            module.register_forward_hook(self._after, always_call=True),
        ]

    def _before(self, module: nn.Module, _: tuple[Any, ...]) -> None:
        if not module.training:
            return
        self.saved = {"momentum": module.momentum, **{name: module._buffers[name] for name in self._names}}
        for name in self._names:
            # Scratch tensors, because autograd keeps the buffers and must not find them changed later.
            buffer = module._buffers[name]
            module._buffers[name] = None if buffer is None else torch.zeros_like(buffer)
        module.__dict__["momentum"] = 1.0  # the update then is the batch statistic itself

    @torch.no_grad()
    def _after(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self.saved is None:
            return
        mean, var = module.get_buffer("running_mean"), module.get_buffer("running_var")
        saved, self.saved = self.saved, None
        module.__dict__["momentum"] = saved.pop("momentum")
        module._buffers.update(saved)
        if output is None or recomputing():
            return
        if not self.pool.between:
            batched = inputs[0].dim() > int(module._get_no_batch_dim())  # type: ignore[operator]
            self.pool.add(inputs[0].shape[0] if batched else 1, mean, var)
            return
        count: Tensor | int = inputs[0].numel() // mean.numel()
        if isinstance(module, nn.SyncBatchNorm) and torch.distributed.is_initialized():
            count = torch.tensor(count, device=mean.device)
            torch.distributed.all_reduce(count, group=module.process_group)
        self.pool.add(count, mean, var * ((count - 1) / count))

    def update(self, pool: Pool) -> None:
        mean, var = (self.module.get_buffer(name) for name in self._names[:2])
        counter, momentum = self.module._buffers["num_batches_tracked"], self.module.__dict__["momentum"]
        if counter is None or not pool.between:
            # torch's instance normalization does not count; what does not count takes no momentum for no update.
            counter, momentum = torch.zeros((), dtype=torch.int64, device=mean.device), momentum or 0.0
        track((pool.mean, pool.unbiased), (mean, var), counter, momentum, _MANY, "torch")
