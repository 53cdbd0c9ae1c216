"""What torch.compile makes of a call: one graph for all sizes, and as many kernels as of torch's own layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import metrics

from flexnorm import flex_norm
from flexnorm.nn import rules

C = 48


class Tokens(nn.Module):
    """A rule on tokens as a user would write the module."""

    def __init__(self, rule: Callable[..., Any], bias: bool = True, **where: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))
        self.bias = nn.Parameter(torch.zeros(C)) if bias else None
        self.rule, self.where = rule, where

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        params = (self.weight,) if self.bias is None else (self.weight, self.bias)
        return flex_norm(x, self.rule, *params, **self.where)


def _kernels_of(module: nn.Module, sizes: list[tuple[int, ...]]) -> tuple[int, int]:
    """Number of graphs that dynamo made for inputs of all sizes, and of kernels that Inductor made, both ways."""
    torch._dynamo.reset()
    metrics.reset()
    counters.clear()
    compiled = torch.compile(module, dynamic=True, fullgraph=True)
    for size in sizes:
        x = torch.randn(size, requires_grad=True)
        y = compiled(x)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        other = x.detach().requires_grad_()
        expected = module(other)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dx, torch.autograd.grad(expected.sum(), other)[0], rtol=1e-4, atol=1e-4)
    return counters["stats"]["unique_graphs"], metrics.generated_kernel_count


SEQUENCES = [(4, 17, C), (7, 17, C), (9, 5, C)]
FEATURES = [(40, C), (50, C), (3, C)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "peer", "sizes"),
    [
        (Tokens(rules.layer, channel_axis=-1), nn.LayerNorm(C), SEQUENCES),
        (Tokens(rules.rms, bias=False, channel_axis=-1), nn.RMSNorm(C), SEQUENCES),
        (Tokens(rules.batch), nn.BatchNorm1d(C, track_running_stats=False), FEATURES),
        (Tokens(rules.layer, per_position=True), None, [(4, C, 7, 6), (5, C, 9, 6), (2, C, 3, 3)]),
    ],
    ids=["layer", "rms", "batch", "layer at each position"],
)
def test_one_graph_for_all_sizes_and_no_more_kernels_than_torch(
    module: nn.Module, peer: nn.Module | None, sizes: list[tuple[int, ...]]
) -> None:
    graphs, kernels = _kernels_of(module, sizes)
    assert graphs == 1, "a new batch size, sequence length or number of nodes compiles nothing again"
    if peer is not None:
        # One more for the gradient of BatchNorm's bias, which torch's formula gets from the same loop.
        assert kernels <= _kernels_of(peer, sizes)[1] + 1
