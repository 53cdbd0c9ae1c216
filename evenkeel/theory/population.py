"""PopulationEstimator: population statistics recomputed every k steps from a pool of training samples.

Luo et al. 2019, Sec. 5: PN takes its statistics from 10,000 training samples. For layers `PopulationNorm1d/2d/3d` with
``statistics="estimated"``, which change their statistics only from outside.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.nn import PopulationNorm1d, PopulationNorm2d, PopulationNorm3d

__all__ = ["PopulationEstimator", "estimate_population"]

_KINDS = (PopulationNorm1d, PopulationNorm2d, PopulationNorm3d)


@torch.no_grad()
def estimate_population(model: nn.Module, pool: Tensor) -> int:
    """Set the statistics of every PopulationNorm from a pool of samples, in one forward pass in evaluation mode.

    Each layer takes the mean and the variance of its own input just before it normalizes it, so that later layers see
    the earlier ones renewed and one pass is exact. Therefore the pool goes through as one batch; its activations need
    the memory of a forward without gradients. In a process group every process gives its own pool and the statistics
    are those of all of them. A layer whose input has a non-finite mean or variance in a channel keeps that channel's
    statistics.

    Args:
        model: The model.
        pool: (P, *), a part of the training set.

    Returns:
        Number of layers renewed.
    """
    handles = [m.register_forward_pre_hook(_renew) for m in model.modules() if isinstance(m, _KINDS)]
    if handles:
        try:
            with _evaluation(model):
                model(pool)
        finally:
            for handle in handles:
                handle.remove()
    return len(handles)


def _renew(module: nn.Module, args: tuple[Any, ...]) -> None:
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
    var = squares / count
    usable = torch.isfinite(mean) & torch.isfinite(var)
    for name, value in (("running_mean", mean), ("running_var", var)):
        kept = getattr(module, name)
        kept.copy_(torch.where(usable, value.to(kept), kept))


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class PopulationEstimator:
    """Renews the statistics of the PopulationNorm layers every few steps; call it once before each training step.

    The cost is one forward pass without gradients over `size` samples per renewal: with the defaults, batches of 128
    and a backward pass as long as two forwards, ``10,000 / (50 * 3 * 128)``, about half of the training itself; see
    `cost`.

    Args:
        model: The model.
        samples: The training samples to draw from, (N, *) - all of them or a part; under data parallelism, those of the
            process.
        size: Samples per renewal, drawn anew each time; the paper's 10,000 by default, at most N.
        every: Steps between two renewals.
        seed: Of the draws.

    Attributes:
        steps: Calls so far.
        renewals: Renewals so far.
        seconds: Time spent in them.

    Raises:
        ValueError: If the model has no PopulationNorm with estimated statistics, or an argument is not positive.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), PopulationNorm1d(8, statistics="estimated"))
        >>> estimate = PopulationEstimator(model, torch.randn(100, 4), every=10)
        >>> estimate(), estimate()  # renewed at the first step, not at the second
        (True, False)
    """

    def __init__(
        self, model: nn.Module, samples: Tensor, *, size: int = 10_000, every: int = 50, seed: int = 0
    ) -> None:
        layers = [m for m in model.modules() if isinstance(m, _KINDS) and m.source == "estimated"]
        if not layers:
            raise ValueError("the model has no PopulationNorm layer with statistics='estimated' to renew")
        if size < 1 or every < 1 or len(samples) < 1:
            raise ValueError(f"size, every and the samples must be at least 1, got {size}, {every} and {len(samples)}")
        self.model = model
        self.samples = samples
        self.size = min(size, len(samples))
        self.every = every
        self.seed = seed
        self.steps = 0
        self.renewals = 0
        self.seconds = 0.0

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
        estimate_population(self.model, self.samples[index.to(self.samples.device)].to(device))
        self.renewals += 1
        self.seconds += time.perf_counter() - began

    @property
    def cost(self) -> float:
        """Seconds per training step spent on the statistics so far; 0 before the first."""
        return self.seconds / self.steps if self.steps else 0.0

    def state_dict(self) -> dict[str, int]:
        """Return the counters, which also fix the draws to come."""
        return {"steps": self.steps, "renewals": self.renewals}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a `state_dict`."""
        self.steps, self.renewals = int(state["steps"]), int(state["renewals"])
