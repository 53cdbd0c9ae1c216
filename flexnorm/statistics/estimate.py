"""PopulationEstimator: population statistics recomputed every k steps from a pool of training samples.

Luo et al. 2019, Sec. 5: PN takes its statistics from 10,000 training samples. For layers `PopulationNorm1d/2d/3d` with
``statistics="estimated"``, which change their statistics only from outside.
"""

from __future__ import annotations

import time
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from flexnorm.nn import PopulationNorm1d, PopulationNorm2d, PopulationNorm3d
from flexnorm.probe.capture import evaluation

__all__ = ["PopulationEstimator", "estimate_population"]

_KINDS = (PopulationNorm1d, PopulationNorm2d, PopulationNorm3d)
_BUFFERS = ("running_mean", "running_var")


@torch.no_grad()
def estimate_population(model: nn.Module, pool: Tensor, *, chunk: int | None = None) -> int:
    """Set the statistics of every PopulationNorm from a pool of samples, in one pass in evaluation mode.

    Each layer takes the mean and the variance of its own input just before it normalizes it, so that later layers see
    the earlier ones renewed and one pass is exact. For that the pool goes through as one batch; its activations need
    the memory of a forward without gradients. In a process group every process gives its own pool, in equally many
    chunks, and the statistics are those of all of them. A layer whose input has a non-finite mean or variance in a
    channel keeps that channel's statistics. Gradients, modes and the global random state stay as they are.

    Args:
        model: The model.
        pool: (P, *), a part of the training set.
        chunk: Samples that go through at a time, where the memory does not take all. Each chunk is then normalized by
            its own statistics on the way, and the statistics of the chunks are pooled: those of all layers but the
            first are off by terms of the order of 1/chunk. ``None``: all at once.

    Returns:
        Number of layers renewed.

    Raises:
        ValueError: If ``chunk`` is below 2.
    """
    if chunk is not None and chunk < 2:
        raise ValueError(f"chunk must be at least 2 samples, whose statistics stand for the pool's, got {chunk}")
    layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, _KINDS)]
    if not layers:
        return 0
    sums: dict[nn.Module, _Moments] = {}
    before = {layer: [layer.get_buffer(name).clone() for name in _BUFFERS] for layer in layers}
    handles = [layer.register_forward_pre_hook(partial(_renew, sums)) for layer in layers]
    try:
        with evaluation(model):
            for part in [pool] if chunk is None else torch.split(pool, chunk):
                model(part)
    finally:
        for handle in handles:
            handle.remove()
    for layer, (mean, squares, count) in sums.items():
        # What is not finite in any part keeps the value that it had before the first.
        for name, value in zip(_BUFFERS, before[layer], strict=True):
            layer.get_buffer(name).copy_(value)
        _set(layer, mean, squares / count)
    return len(layers)


_Moments = tuple[Tensor, Tensor, Tensor]  # mean, sum of squares about it, number of values


def _renew(sums: dict[nn.Module, _Moments], module: nn.Module, args: tuple[Any, ...]) -> None:
    x: Tensor = args[0].detach()
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    axes = [axis for axis in range(x.dim()) if axis != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    count = x.new_tensor(float(x.numel() // max(x.shape[1], 1)))
    total = x.sum(axes)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed:
        torch.distributed.all_reduce(count)
        torch.distributed.all_reduce(total)
    mean = total / count
    squares = (x - mean.view(shape)).square().sum(axes)
    if distributed:
        torch.distributed.all_reduce(squares)
    _set(module, mean, squares / count)
    if module in sums:
        old_mean, old_squares, old_count = sums[module]
        both, gap = old_count + count, mean - old_mean
        squares = old_squares + squares + gap.square() * (old_count * count / both)
        sums[module] = old_mean + gap * (count / both), squares, both
    else:
        sums[module] = mean, squares, count


def _set(module: nn.Module, mean: Tensor, var: Tensor) -> None:
    usable = torch.isfinite(mean) & torch.isfinite(var)
    for name, value in zip(_BUFFERS, (mean, var), strict=True):
        kept = module.get_buffer(name)
        kept.copy_(torch.where(usable, value.to(kept), kept))


class PopulationEstimator:
    """Renews the statistics of the PopulationNorm layers every few steps.

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
            process.
        size: Samples per renewal, drawn anew each time; the paper's 10,000 by default, at most N.
        every: Steps between two renewals.
        chunk: Samples that go through at a time, see `estimate_population`; ``None``: all at once.
        seed: Of the draws.

    Attributes:
        steps: Steps so far.
        renewals: Renewals so far.
        seconds: Time spent in them.

    Raises:
        ValueError: If the model has no PopulationNorm with estimated statistics, or an argument is not positive.

    Examples:
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
        samples: Tensor,
        *,
        size: int = 10_000,
        every: int = 50,
        chunk: int | None = None,
        seed: int = 0,
    ) -> None:
        layers = [m for m in model.modules() if isinstance(m, _KINDS) and m.statistics == "estimated"]
        if not layers:
            raise ValueError("the model has no PopulationNorm layer with statistics='estimated' to renew")
        if size < 1 or every < 1 or len(samples) < 1:
            raise ValueError(f"size, every and the samples must be at least 1, got {size}, {every} and {len(samples)}")
        self.model = model
        self.samples = samples
        self.size = min(size, len(samples))
        self.every = every
        self.chunk = chunk
        self.seed = seed
        self.steps = 0
        self.renewals = 0
        self.seconds = 0.0
        self._handle: torch.utils.hooks.RemovableHandle | None = None

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
        index = torch.randperm(len(self.samples), generator=generator)[: self.size]
        device = next((p.device for p in self.model.parameters()), self.samples.device)
        pool = self.samples[index.to(self.samples.device)].to(device)
        estimate_population(self.model, pool, chunk=self.chunk)
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

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
