"""The layers of a model that keep running statistics: what they average, and how to look at their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from flexnorm.engine import FlexNorm, Pool
from flexnorm.nn import norm_of


def has_statistics(module: nn.Module) -> bool:
    """Whether the layer ``module`` keeps running statistics."""
    normalizes = isinstance(module, (FlexNorm, nn.modules.batchnorm._NormBase))
    return normalizes and module._buffers.get("running_mean") is not None


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


@contextmanager
def watching(modules: Iterable[nn.Module], look: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """In the block ``look(module, x)`` is called with each input (N, C, *) of the layers, before they normalize it."""

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x, channels = inputs[0].detach(), module.get_buffer("running_mean").numel()
        if x.dim() >= 2 and x.shape[1] != channels and x.shape[0] == channels:
            x = x.unsqueeze(0)  # torch's instance normalization also takes (C, *spatial)
        look(module, x)

    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
