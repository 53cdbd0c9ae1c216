"""Layers that do small inputs, or tokens, in one node: the same function as their rule, in every respect."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn

import flexnorm.nn as fx
from flexnorm import FlexNorm, flex_norm
from flexnorm.kernels import normalization
from flexnorm.nn import rules

needs_kernels = pytest.mark.skipif(normalization.load() is None, reason="no C compiler on this machine")

LAYERS: dict[str, tuple[Callable[..., FlexNorm], tuple[int, ...]]] = {
    "batch, features": (fx.BatchNorm1d, (40, 12)),
    "batch, images": (fx.BatchNorm2d, (5, 12, 3, 4)),
    "batch, tokens": (lambda c, **kwargs: fx.BatchNorm1d(c, channel_axis=-1, **kwargs), (4, 9, 12)),
    "batch, many features": (fx.BatchNorm1d, (2100, 512)),
    "batch, many tokens": (lambda c, **kwargs: fx.BatchNorm1d(c, channel_axis=-1, **kwargs), (40, 300, 96)),
    "population, many features": (fx.PopulationNorm1d, (11000, 12)),
    "layer": (fx.LayerNorm1d, (40, 12)),
    "layer, images": (fx.LayerNorm2d, (5, 12, 3, 4)),
    "rms": (fx.RMSNorm1d, (40, 12)),
    "group": (lambda c, **kwargs: fx.GroupNorm(3, c, **kwargs), (40, 12)),
    "population, features": (fx.PopulationNorm1d, (40, 12)),
    "population, sequences": (fx.PopulationNorm1d, (6, 12, 7)),
    "population, images": (fx.PopulationNorm2d, (5, 12, 3, 4)),
    "population, channels last": (lambda c, **kwargs: fx.PopulationNorm2d(c, channel_axis=-1, **kwargs), (5, 3, 4, 12)),
    "unitized, features": (fx.UnitizedBatchNorm1d, (64, 300)),
    "unitized, rms": (lambda c, **kwargs: fx.UnitizedBatchNorm1d(c, unit_norm="rms", **kwargs), (1400, 12)),
    "unitized, tokens": (lambda c, **kwargs: fx.UnitizedBatchNorm1d(c, channel_axis=-1, **kwargs), (5, 300, 12)),
    "unitized, clamped": (lambda c, **kwargs: fx.UnitizedBatchNorm1d(c, constrain_alpha=True, **kwargs), (64, 300)),
}


def _pair(name: str, dtype: torch.dtype) -> tuple[FlexNorm, FlexNorm, tuple[int, ...]]:
    """A layer with random parameters, and one in float64 that goes by its rule."""
    build, shape = LAYERS[name]
    channels = shape[-1] if "tokens" in name or "channels last" in name else shape[1]
    layer = build(channels, dtype=dtype)
    for p in layer.parameters():
        nn.init.normal_(p)
    by_rule = copy.deepcopy(layer).double()
    by_rule.twin = lambda _: None  # type: ignore[method-assign]
    return layer, by_rule, shape


@needs_kernels
@pytest.mark.quick(8)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_rule_with_gradients_and_statistics(name: str, dtype: torch.dtype) -> None:
    layer, by_rule, shape = _pair(name, dtype)
    rtol, atol = (1e-10, 1e-11) if dtype == torch.float64 else (2e-4, 2e-5)
    for step, mode in enumerate([True, True, False]):
        layer.train(mode), by_rule.train(mode)
        x = (torch.randn(shape, dtype=dtype) * (step + 1) + step).requires_grad_()
        other = x.detach().double().requires_grad_()
        y, expected = layer(x), by_rule(other)
        assert y.grad_fn is not None
        if "many" in name and not mode:
            continue  # one affine pass, and nothing before it
        assert not {type(y.grad_fn).__name__} & {"_AffineBackward", "AddcmulBackward0", "ToCopyBackward0"}
        g = torch.randn(shape, dtype=dtype)
        grads = torch.autograd.grad(y, [x, *layer.parameters()], g)
        wanted = torch.autograd.grad(expected, [other, *by_rule.parameters()], g.double())
        for got, want in zip((y, *grads), (expected, *wanted), strict=True):
            torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol * float(want.detach().abs().max() + 1))
    for got, want in zip(layer.buffers(), by_rule.buffers(), strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=rtol, atol=atol)


@needs_kernels
@pytest.mark.parametrize(
    "name", ["batch, features", "population, images", "population, features", "unitized, features"]
)
def test_second_derivatives_and_batched_gradients(name: str) -> None:
    layer, by_rule, shape = _pair(name, torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    found = []
    for module in (layer, by_rule):
        torch.manual_seed(0)
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        (first,) = torch.autograd.grad(y.square().sum() + y.sum(), leaf, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), [leaf, module.weight])
        several = torch.autograd.grad(module(leaf), leaf, torch.randn(3, *shape).double(), is_grads_batched=True)
        found.append((first, *second, *several))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9 * float(want.detach().abs().max() + 1))


@needs_kernels
def test_threads_do_not_change_the_bits() -> None:
    layer = fx.UnitizedBatchNorm1d(300)
    nn.init.normal_(layer.alpha)
    x, results, threads = torch.randn(257, 300, requires_grad=True), [], torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            y = layer(x)
            results.append((y, *torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ["batch, features", "population, features"])
def test_a_batch_that_is_not_finite_is_left_out(name: str) -> None:
    layer, _, shape = _pair(name, torch.float32)
    layer(torch.randn(shape))
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(shape)
    x[3, 2] = float("inf")
    layer(x)
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


def test_rules_reach_torchs_functions_with_their_options() -> None:
    from functools import partial

    x, weight = torch.randn(30, 12), torch.rand(12) + 0.5
    y = flex_norm(x, partial(rules.layer, eps=0.3), weight)
    torch.testing.assert_close(y, nn.functional.layer_norm(x, (12,), weight, None, 0.3))
    y = flex_norm(x, partial(rules.group, groups=4, eps=0.1), weight)
    torch.testing.assert_close(y, nn.functional.group_norm(x, 4, weight, None, 0.1))
    mixed = flex_norm(x, rules.layer, weight.double())  # torch's function refuses types that differ
    torch.testing.assert_close(mixed, nn.functional.layer_norm(x, (12,), weight))


@pytest.mark.quick(4)
@pytest.mark.parametrize("weight", [2.0, torch.tensor(2.0), torch.rand(1), torch.rand(1, 12), torch.rand(12).double()])
@pytest.mark.parametrize("name", ["layer", "rms", "batch", "group"])
def test_rules_take_parameters_that_torchs_functions_refuse(name: str, weight: torch.Tensor | float) -> None:
    x, rule = torch.randn(5, 7, 12), getattr(rules, name)
    rule = functools.partial(rule, groups=3) if name == "group" else rule
    expected = flex_norm(x, rule, channel_axis=-1) * weight
    for function, params in ((rule, (weight,)), (functools.partial(rule, weight=weight), ())):
        y = flex_norm(x, function, *params, channel_axis=-1)
        torch.testing.assert_close(y, expected.to(x.dtype), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 4, 0), (0, 0), (0, 6), (3, 0, 6), (1, 6), (1, 1)])
@pytest.mark.parametrize("name", ["layer", "rms", "batch"])
def test_rules_take_tokens_of_any_number_and_size(name: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    y = flex_norm(x, getattr(rules, name), channel_axis=-1)
    y.sum().backward()
    assert y.shape == x.shape
    assert x.grad is not None
    assert bool(y.isfinite().all() & x.grad.isfinite().all())
    if name != "rms" and (shape[-1] if name == "layer" else x.numel() // max(shape[-1], 1)) == 1:
        assert y.abs().max() < 1e-4  # one value is its own mean


@pytest.mark.filterwarnings("ignore:.*jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["batch, features", "population, images", "unitized, tokens"])
def test_traces_pass_torchs_check(name: str) -> None:
    layer, _, shape = _pair(name, torch.float32)
    traced = torch.jit.trace(layer.eval(), torch.randn(shape))  # type: ignore[no-untyped-call]
    x = torch.randn(shape)
    torch.testing.assert_close(traced(x), layer(x))
