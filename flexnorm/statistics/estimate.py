"""PopulationEstimator: population statistics recomputed every k steps from a pool of training samples.

Luo et al. 2019, Sec. 5: PN takes its statistics from 10,000 training samples. For layers `PopulationNorm1d/2d/3d` with
``statistics="estimated"``, which change their statistics only from outside.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from flexnorm.engine import Pool, active_group, pool_processes
from flexnorm.probe import isolated, unwrap
from flexnorm.statistics._layers import new_pool, of_population, put, watching


@torch.no_grad()
def estimate_population(model: nn.Module, samples: Tensor, *, chunk: int | None = None) -> int:
    """Set the statistics of every PopulationNorm from some samples, in one pass in evaluation mode.

    Each layer takes the mean and the variance of its own input just before it normalizes it, so that later layers see
    the earlier ones renewed and one pass is exact. For that they go through as one batch; its activations need the
    memory of a forward without gradients. In a process group every process gives its own samples, in equally many
    chunks, and the statistics are those of all of them. A layer whose input has a non-finite mean or variance in a
    channel keeps that channel's statistics. Gradients, modes and the global random state stay as they are.

    Args:
        model: The model.
        samples: (P, *), a part of the training set.
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
    pools = {module: new_pool(module) for module in model.modules() if of_population(module)}
    group = active_group()

    def renew(module: nn.Module, x: Tensor) -> None:
        part = new_pool(module)
        part.add_values(x)
        pool_processes([part], group)
        pools[module].merge(part)
        put(module, *_usable(module, part))

    inner = unwrap(model)
    with isolated(inner, 0), watching(pools, renew):
        inner.eval()
        for part in [samples] if chunk is None else torch.split(samples, chunk):
            inner(part)
    for module, whole in pools.items():
        mean, var = _usable(module, whole)
        module.get_buffer("running_mean").copy_(mean)
        module.get_buffer("running_var").copy_(var)
    return len(pools)


def _usable(module: nn.Module, pool: Pool) -> tuple[Tensor, Tensor]:
    """Mean and variance of a pool; in channels where it holds nothing finite, or nothing, those of the layer."""
    mean, var = module.get_buffer("running_mean"), module.get_buffer("running_var")
    usable = pool.finite & (pool.count > 0)
    return torch.where(usable, pool.mean.to(mean), mean), torch.where(usable, pool.var.to(var), var)


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
        samples: Tensor,
        *,
        size: int = 10_000,
        every: int = 50,
        chunk: int | None = None,
        seed: int = 0,
    ) -> None:
        layers = [m for m in model.modules() if of_population(m) and getattr(m, "statistics", "") == "estimated"]
        if not layers:
            raise ValueError("the model has no PopulationNorm layer with statistics='estimated' to renew")
        if size < 1 or every < 1 or len(samples) < 1:
            raise ValueError(f"size, every and the samples must be at least 1, got {size}, {every} and {len(samples)}")
        self.model, self.samples, self.size = model, samples, min(size, len(samples))
        self.every, self.chunk, self.seed = every, chunk, seed
        self.steps, self.renewals, self.seconds = 0, 0, 0.0
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

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
