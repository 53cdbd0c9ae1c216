"""Population statistics of the normalization layers of a model: exact from batches of data, or renewed as it trains."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from flexnorm._messages import none_of, nothing_done
from flexnorm.engine import FlexNorm, Pool, Segments, active_group, pool_processes
from flexnorm.nn import called_norms, norm_of
from flexnorm.probe import (
    Mask,
    Masks,
    Selection,
    batch_inputs,
    channels_first,
    find_places,
    hooked,
    isolated,
    map_tensors,
    select_places,
    unwrap,
)
from flexnorm.statistics.frozen import has_statistics, is_frozen, without_statistics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def of_population(module: nn.Module) -> bool:
    """Whether a layer normalizes by the population, whose variance it keeps biased, in training too."""
    norm = norm_of(module)
    return norm is not None and norm.statistics_from == "population"


def new_pool(module: nn.Module) -> Pool:
    """An empty pool for a layer; of instance normalization, whose statistics are averages of the samples' own."""
    mean, norm = module.get_buffer("running_mean"), norm_of(module)
    return Pool(mean.numel(), mean.device, between=norm is None or norm.statistics_from != "sample")


def kept(module: nn.Module, pool: Pool) -> tuple[Tensor, Tensor]:
    """Mean and variance that a layer shall keep of a pool."""
    return pool.mean, pool.var if of_population(module) else pool.unbiased


def put(module: nn.Module, mean: Tensor, var: Tensor) -> None:
    """Exchange the private buffers of an isolated model; its own are not touched."""
    for name, value in (("running_mean", mean), ("running_var", var)):
        module._buffers[name] = value.to(module.get_buffer(name))


def replace(module: nn.Module, mean: Tensor, var: Tensor) -> None:
    """Write into the layer's own buffers."""
    module.get_buffer("running_mean").copy_(mean)
    module.get_buffer("running_var").copy_(var)


@dataclass
class Values:
    """An input of a layer, and what of it counts: the arguments of :meth:`flexnorm.engine.Pool.add_values`."""

    x: Tensor
    weights: Tensor | None = None
    segments: Tensor | None = None

    def into(self, pool: Pool) -> tuple[Tensor, Tensor]:
        """Add them to a pool; returns their own mean and variance."""
        return pool.add_values(self.x, self.weights, self.segments)


Masked: TypeAlias = Callable[[nn.Module, Sequence[int]], Tensor | None]
"""The mask of a layer for the present batch, given the shape of its input without the channels."""


def watching(
    modules: Iterable[nn.Module], look: Callable[[nn.Module, Values], None], masked: Masked | None = None
) -> contextlib.AbstractContextManager[None]:
    """In the block ``look(module, values)`` is called with each input of the layers, before they normalize it.

    What counts in it is what ``masked`` says, or if it says nothing, what the layer itself is given as its mask.
    """

    def before(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        x, channels = inputs[0].detach(), module.get_buffer("running_mean").numel()
        mask = segments = None
        if isinstance(module, FlexNorm):
            mask = keywords.get("mask", inputs[1] if len(inputs) > 1 else None)
            segments = keywords.get("segments", inputs[2] if len(inputs) > 2 else None)
        if not isinstance(module, FlexNorm) and x.dim() >= 2 and x.shape[1] != channels and x.shape[0] == channels:
            x = x.unsqueeze(0)  # torch's instance normalization also takes (C, *spatial)
        x = channels_first(module, x)
        shape = (x.shape[0], *x.shape[2:])
        mask = mask if masked is None or (given := masked(module, shape)) is None else given
        weights = None if mask is None else mask.detach().to(x.device).reshape(shape)
        look(module, Values(x, weights, segments.index if isinstance(segments, Segments) else segments))

    return hooked(modules, before, with_kwargs=True)


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
    mask: Mask = None,
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
        mask: What counts, where batches hold padding: the name of an entry of the batches (``"attention_mask"``), a
            function of the batch, or a mapping from layers to these, as of :class:`flexnorm.probe.Masks`. The
            statistics are then those of what counts alone. A layer that the model itself calls with a mask or segments
            uses these where nothing else is said.
        device: Where to move the batches; by default to the device of the model's first parameter.
        process_group: Pool over these processes, each with its own batches (as many or few as it has, none included):
            ``"world"`` for all of them where torch.distributed is initialized (then every process has to call this),
            a group, or ``None`` for this process alone. All of them end with the same statistics.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: If no layer has running statistics that are not frozen, there is no batch at all, or ``batches``
            can be iterated only once although ``sequential`` needs more; if a mask does not fit a layer.
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
        none = none_of("norms", without_statistics(inner, places))
        raise ValueError(
            f"{type(model).__name__} has no normalization layer with running statistics to recalibrate: {none}"
        )
    if sequential and iter(batches) is batches:
        raise ValueError(
            "sequential=True goes over the data once per layer, but batches can be iterated only once; "
            "pass a list, a DataLoader, or another object that can be iterated again"
        )
    device = device or next(iter((*inner.parameters(), *inner.buffers()))).device
    masks = Masks({name: module for module, name in layers.items()}, mask)
    run = _Run(inner, batches, forward or _call, device, active_group(process_group), layers, masks)
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
            replace(module, *kept(module, pool))
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
    layers: Mapping[nn.Module, str]
    masks: Masks
    batch: Any = None

    def masked(self, module: nn.Module, shape: Sequence[int]) -> Tensor | None:
        """The mask of a layer for the present batch."""
        return self.masks.of(self.layers[module], self.batch, shape)

    def calls(self) -> Iterator[None]:
        """Call the model on one batch after the other, and yield after each; `_Reached` ends a call alone."""
        for batch in self.batches:
            self.batch = map_tensors(lambda tensor: tensor.to(self.device), batch)
            with contextlib.suppress(_Reached):
                self.forward(self.model, self.batch)
            yield

    def at_once(self, layers: Mapping[nn.Module, str]) -> dict[nn.Module, Pool]:
        """One pass; every layer normalizes with the statistics of the batch."""
        pools = {module: new_pool(module) for module in layers}
        # Evaluation with a batch's own moments is normalization with the batch, without counters and momenta.
        with watching(layers, lambda module, values: put(module, *values.into(pools[module])), self.masked):
            self._refuse_nothing(sum(1 for _ in self.calls()))
        pool_processes(list(pools.values()), self.group)
        return pools

    def layer_by_layer(self, layers: Mapping[nn.Module, str]) -> dict[nn.Module, Pool]:
        """A pass per layer, in the order of execution; the layers before it use their new statistics."""
        calls: Counter[nn.Module] = Counter()  # in the order in which the first batch reaches them
        with watching(layers, lambda module, _: calls.update([module])):
            next(self.calls(), None)
        self._refuse_nothing(len(calls))
        by_name = {name: module for module, name in layers.items()}
        # A process without data does not know the order; all have to agree on one.
        orders = self._gathered([layers[module] for module in calls])
        pools: dict[nn.Module, Pool] = {}
        for module in (by_name[name] for name in next(filter(None, orders), [])):
            pool = pools[module] = new_pool(module)
            reached: list[nn.Module] = []

            def look(module: nn.Module, values: Values, pool: Pool = pool, reached: list[nn.Module] = reached) -> None:
                values.into(pool)
                reached.append(module)
                if len(reached) == calls[module]:
                    raise _Reached

            with watching([module], look, self.masked):
                for _ in self.calls():
                    reached.clear()
            pool_processes([pool], self.group)
            put(module, *kept(module, pool))
        return pools

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


@torch.no_grad()
def estimate_population(
    model: nn.Module, samples: Tensor | Mapping[str, Tensor], *, chunk: int | None = None, mask: Mask = None
) -> int:
    """Set the statistics of every PopulationNorm from some samples, in one pass in evaluation mode.

    Each layer takes the mean and the variance of its own input just before it normalizes it, so that later layers see
    the earlier ones renewed and one pass is exact. For that they go through as one batch; its activations need the
    memory of a forward without gradients. In a process group every process gives its own samples, in equally many
    chunks, and the statistics are those of all of them. A layer whose input has a non-finite mean or variance in a
    channel keeps that channel's statistics. Gradients, modes and the global random state stay as they are.

    Args:
        model: The model.
        samples: (P, *), a part of the training set; or a mapping from the model's arguments to such tensors.
        chunk: Samples that go through at a time, where the memory does not take all. Each chunk is then normalized by
            its own statistics on the way, and the statistics of the chunks are pooled: those of all layers but the
            first are off by terms of the order of 1/chunk. ``None``: all at once.
        mask: What counts, as of :func:`recalibrate`; a batch is a chunk.

    Returns:
        Number of layers renewed.

    Raises:
        ValueError: If ``chunk`` is below 2.

    Warns:
        flexnorm.NothingDone: If there is no such layer.
    """
    if chunk is not None and chunk < 2:
        raise ValueError(f"chunk must be at least 2 samples, whose statistics stand for the pool's, got {chunk}")
    pools = {module: new_pool(module) for module in model.modules() if of_population(module)}
    if not pools:
        others = [(name, f"{type(norm).__name__}, another kind") for name, norm in called_norms(model).items()]
        said, advice = "estimate_population(model) renewed nothing", 'convert(model, "population") makes such layers.'
        nothing_done(said, "norms by the population", others, advice, stacklevel=4)  # one is of no_grad
        return 0
    group = active_group()

    def renew(module: nn.Module, values: Values) -> None:
        part = new_pool(module)
        values.into(part)
        pool_processes([part], group)
        pools[module].merge(part)
        put(module, *_usable(module, part))

    inner = unwrap(model)
    names = {module: name for name, module in inner.named_modules() if module in pools}
    masks = Masks({name: module for module, name in names.items()}, mask)
    part: Any = None
    with isolated(inner, 0), watching(pools, renew, lambda module, shape: masks.of(names[module], part, shape)):
        inner.eval()
        for part in _chunks(samples, chunk):
            _call(inner, part)
    for module, whole in pools.items():
        replace(module, *_usable(module, whole))
    return len(pools)


def _chunks(samples: Any, chunk: int | None) -> Iterator[Any]:
    if chunk is None:
        yield samples
    elif isinstance(samples, Mapping):
        for parts in zip(*(torch.split(value, chunk) for value in samples.values()), strict=True):
            yield dict(zip(samples, parts, strict=True))
    else:
        yield from torch.split(samples, chunk)


def _usable(module: nn.Module, pool: Pool) -> tuple[Tensor, Tensor]:
    """Mean and variance of a pool; in channels where it holds nothing finite, or nothing, those of the layer."""
    mean, var = module.get_buffer("running_mean"), module.get_buffer("running_var")
    usable = pool.finite & (pool.count > 0)
    return torch.where(usable, pool.mean.to(mean), mean), torch.where(usable, pool.var.to(var), var)


def _first(samples: Any) -> Tensor:
    tensor: Tensor = next(iter(samples.values())) if isinstance(samples, Mapping) else samples
    return tensor


class PopulationEstimator:
    """Renews the statistics of the PopulationNorm layers with ``statistics="estimated"`` every few steps.

    Luo et al. 2019, Sec. 5: population normalization takes its statistics from 10,000 training samples.

    Call it once before each training step; or use it as a context, within which every forward pass of the model in
    training mode counts as a step, so that it works in any loop or trainer. Call `renew` before an evaluation, so that
    the statistics follow the last weights.

    The cost is one forward pass without gradients over `size` samples per renewal: with the defaults, batches of 128
    and a backward pass as long as two forwards, ``10,000 / (50 * 3 * 128)``, about half of the training itself; see
    `cost` for the seconds measured. Neither gradients nor modes nor the global random state change.

    Args:
        model: The model, not wrapped for data parallelism. In a process group the statistics are those of the pools of
            all processes, so every process must call the estimator alike.
        samples: The training samples to draw from, (N, *) - all of them or a part; under data parallelism, those of the
            process. Or a mapping from the model's arguments to such tensors.
        size: Samples per renewal, drawn anew each time; the paper's 10,000 by default, at most N.
        every: Steps between two renewals.
        chunk: Samples that go through at a time, see `estimate_population`; ``None``: all at once.
        seed: Of the draws.
        mask: What counts, as of `estimate_population`.

    Attributes:
        steps: Steps so far.
        renewals: Renewals so far.
        seconds: Time spent in them.

    Raises:
        ValueError: If the model has no PopulationNorm with estimated statistics, or an argument is not positive.

    Examples:
        >>> from flexnorm.nn import PopulationNorm1d
        >>> model = nn.Sequential(nn.Linear(4, 8), PopulationNorm1d(8, statistics="estimated"))
        >>> estimate = PopulationEstimator(model, torch.randn(100, 4), every=10)
        >>> estimate(), estimate()  # renewed at the first step, not at the second
        (True, False)
        >>> with estimate:
        ...     for step in range(9):
        ...         y = model(torch.randn(16, 4))  # the ninth is step 11, the second to be due
        >>> estimate.renewals
        2
    """

    def __init__(
        self,
        model: nn.Module,
        samples: Tensor | Mapping[str, Tensor],
        *,
        size: int = 10_000,
        every: int = 50,
        chunk: int | None = None,
        seed: int = 0,
        mask: Mask = None,
    ) -> None:
        layers = [m for m in model.modules() if of_population(m) and getattr(m, "statistics", "") == "estimated"]
        if not layers:
            raise ValueError("the model has no PopulationNorm layer with statistics='estimated' to renew")
        number = len(_first(samples))
        if size < 1 or every < 1 or number < 1:
            raise ValueError(f"size, every and the samples must be at least 1, got {size}, {every} and {number}")
        self.model, self.samples, self.size = model, samples, min(size, number)
        self.every, self.chunk, self.seed, self.mask = every, chunk, seed, mask
        self.steps, self.renewals, self.seconds = 0, 0, 0.0

    def __call__(self) -> bool:
        """Count a step, renew the statistics if it is time, and return whether that was so."""
        due = self.steps % self.every == 0
        self.steps += 1
        if due:
            self.renew()
        return due

    def renew(self) -> None:
        """Renew the statistics now."""
        began = time.perf_counter()
        generator = torch.Generator().manual_seed(self.seed + self.renewals)
        first = _first(self.samples)
        index = torch.randperm(len(first), generator=generator)[: self.size]
        device = next((p.device for p in self.model.parameters()), first.device)
        pool = map_tensors(lambda tensor: tensor[index.to(tensor.device)].to(device), self.samples)
        estimate_population(self.model, pool, chunk=self.chunk, mask=self.mask)
        self.renewals += 1
        self.seconds += time.perf_counter() - began

    @property
    def cost(self) -> float:
        """Seconds per training step spent on the statistics so far; 0 before the first."""
        return self.seconds / self.steps if self.steps else 0.0

    def state_dict(self) -> dict[str, int | float]:
        """Return the counters, which also fix the draws to come; the statistics are in the model's own state."""
        return {"steps": self.steps, "renewals": self.renewals, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, int | float]) -> None:
        """Continue from a `state_dict`."""
        self.steps, self.renewals = int(state["steps"]), int(state["renewals"])
        self.seconds = float(state.get("seconds", 0.0))

    def __enter__(self) -> PopulationEstimator:
        self._handle = self.model.register_forward_pre_hook(self._step)
        return self

    def _step(self, model: nn.Module, _: tuple[Any, ...]) -> None:
        if model.training:
            self()

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
