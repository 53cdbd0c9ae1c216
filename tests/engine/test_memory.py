"""What a call writes and keeps: nothing as large as the activation but the result and the gradient of the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flexnorm.nn as fx
from flexnorm import flex_norm
from flexnorm.engine import Segments
from flexnorm.kernels import normalization
from flexnorm.nn import rules

C = 64
LAST = torch.channels_last
# Name: shape, above the sizes that go to torch's own functions, memory format, where the channels and samples are.
PLACES: dict[str, tuple[tuple[int, ...], torch.memory_format, dict[str, Any]]] = {
    "features": ((4200, C), torch.contiguous_format, {}),
    "tokens": ((60, 70, C), torch.contiguous_format, {"channel_axis": -1}),
    "sequences": ((60, 70, C), torch.contiguous_format, {"channel_axis": -1, "per_position": False}),
    "images": ((12, C, 20, 12), torch.contiguous_format, {}),
    "images channels last": ((12, C, 20, 12), LAST, {}),
    "positions of images": ((12, C, 20, 12), torch.contiguous_format, {"per_position": True}),
    "positions of images channels last": ((12, C, 20, 12), LAST, {"per_position": True}),
}
# Of samples that are single positions, these ask for the moments of all channels, or of the batch, alone.
OF_TABLES: dict[str, Callable[..., Any]] = {
    "batch": lambda m, w, b: rules.batch(m, w, b),
    "mean only": lambda m, w, b: (w, b - w * m.pool("batch").mean),
    "layer": lambda m, w, b: rules.layer(m, w, b),
    "rms": lambda m, w, b: (rules.rms(m, w)[0], b),
    "group": lambda m, w, b: rules.group(m, w, b, groups=4),
    "population": lambda m, w, b: rules.population(m, b.detach(), w.detach(), w, b),
}


class Written(TorchDispatchMode):
    """Operations that write what has as many numbers as an activation, into memory of its own."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known, self.operations = list(known), list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for t in tree_leaves(made):
            whole = isinstance(t, Tensor) and t.numel() >= self.known[0].numel()
            if whole and all(t.untyped_storage().data_ptr() != k.untyped_storage().data_ptr() for k in self.known):
                self.known.append(t)  # held, so that its memory is not given out again
                self.operations.append(str(func))
        return made


def activation(place: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    shape, memory_format, _ = PLACES[place]
    torch.manual_seed(0)
    x, g = (torch.randn(shape).to(memory_format=memory_format) for _ in range(2))
    return x.requires_grad_(), g, [torch.rand(C).requires_grad_() for _ in range(2)]


def by_itself(place: str) -> bool:
    shape, _, where = PLACES[place]
    return where.get("per_position", "channel_axis" in where or len(shape) == 2)


def kept_beside(x: Tensor, run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """The result, and how many numbers the graph keeps besides ``x``."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run()
    kept.pop(x.untyped_storage().data_ptr(), None)
    return y, sum(kept.values())


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if normalization.load() is None:
        pytest.skip("no C compiler on this machine: compositions write what they like")


@pytest.mark.quick(30)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", OF_TABLES)
def test_nothing_but_the_result_and_the_gradient_is_written(name: str, place: str, masked: bool) -> None:
    x, g, params = activation(place)
    where, rule = PLACES[place][2], OF_TABLES[name]
    mask = None
    if masked:
        axis = where.get("channel_axis", 1)
        mask = torch.rand([n for i, n in enumerate(x.shape) if i != axis % x.dim()]) < 0.8
    forward = Written(x)
    with forward:
        y, kept = kept_beside(x, lambda: flex_norm(x, rule, *params, **where, mask=mask))
    backward = Written(x, y, g)
    with backward:
        torch.autograd.grad(y, [x, *params], g)
    assert (len(forward.operations), len(backward.operations)) == (1, 1), (forward.operations, backward.operations)
    # Numbers of each position: mean, variance and factors, of one group or of four, a weight.
    apart = by_itself(place)
    of_positions = {"layer": 8, "rms": 6, "group": 17}.get(name, 0) + masked
    assert kept <= 8 * C + (x.numel() // C * of_positions if apart else x.shape[0] * 4 * C)


@pytest.mark.parametrize("order", ["sorted", "any"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["batch", "layer", "instance", "unitized"])
def test_graphs_of_various_sizes_write_nothing_else(name: str, masked: bool, order: str) -> None:
    x, g, _ = activation("features")
    index = torch.arange(20).repeat_interleave(torch.arange(20) * 21 + 10)[: len(x)]
    index = torch.cat([index, index.new_full((len(x) - len(index),), 19)])
    graphs = Segments(index if order == "sorted" else index[torch.randperm(len(x))], 20)
    layer = fx.make_norm(name, C, ndim=1)
    mask = torch.rand(len(x)) < 0.8 if masked else None
    forward = Written(x)
    with forward:
        y, kept = kept_beside(x, lambda: layer(x, mask, graphs))
    backward = Written(x, y, g)
    with backward:
        torch.autograd.grad(y, [x, *layer.parameters()], g)
    assert (len(forward.operations), len(backward.operations)) == (1, 1), (forward.operations, backward.operations)
    assert kept <= 20 * C * 12 + 4 * len(x)  # the numbers of the rows, sorted, and a weight of each


@pytest.mark.parametrize("place", ["sequences", "images", "images channels last"])
@pytest.mark.parametrize("name", ["unitized", "switchable", "batch_instance", "instance", "renorm", "population"])
def test_layers_of_samples_write_nothing_else(name: str, place: str) -> None:
    x, g, _ = activation(place)
    layer = fx.make_norm(name, C, ndim=max(1, x.dim() - 2), **PLACES[place][2])
    forward = Written(x)
    with forward:
        y = layer(x)
    backward = Written(x, y, g)
    with backward:
        torch.autograd.grad(y, [x, *layer.parameters()], g)
    assert (len(forward.operations), len(backward.operations)) == (1, 1), (forward.operations, backward.operations)


def test_moments_of_the_batch_before_those_of_samples_write_once_more() -> None:
    x, g, params = activation("images channels last")

    def rule(m: Any, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        scale = w * (m.pool("batch").var + 1).rsqrt()
        return scale * (m.var + 1).rsqrt(), b - scale * m.mean

    y = flex_norm(x, rule, *params)
    backward = Written(x, y, g)
    with backward:
        (found,) = torch.autograd.grad(y, x, g)
    assert len(backward.operations) == 2, backward.operations
    other = x.detach().contiguous().requires_grad_()
    (wanted,) = torch.autograd.grad(flex_norm(other, rule, *params), other, g)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["batch", "layer", "rms", "unitized", "population", "group"])
def test_layers_keep_the_input_and_tables(name: str, place: str) -> None:
    x, _, _ = activation(place)
    where = PLACES[place][2]
    if name == "unitized" and place.startswith("positions"):
        pytest.skip("the length of each position's vector is composed there")
    options = {"num_groups": 4} if name == "group" else {}
    layer = fx.make_norm(name, C, ndim=max(1, x.dim() - 2), **options, **where)
    _, kept = kept_beside(x, lambda: layer(x))
    apart = by_itself(place)
    assert kept <= 20 * C + (x.numel() // C * 17 if apart else 12 * x.shape[0] * C)
