"""The fused shift and clamp against the composition of torch's operations that it replaces."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from flexnorm.kernels import shift_clamp
from flexnorm.nn.normprop import NormPropConv2d, NormPropConv3d, NormPropLinear

SHAPES = [(5, 7), (3, 4, 9), (3, 5, 6, 2), (300, 3, 1, 1), (2, 3, 2, 3, 4), (600, 6)]

pytestmark = pytest.mark.skipif(shift_clamp._kernel() is None, reason="needs a C compiler")


def operands(shape: tuple[int, ...], last: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    u, g = torch.randn(2, *shape, generator=generator)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if last:
        u = u.contiguous(memory_format=formats[len(shape)])
    return u, torch.randn(shape[1], generator=generator), torch.randn(shape[1], generator=generator) - 0.5, g


def composed(u: Tensor, shift: Tensor, low: Tensor) -> Tensor:
    table = (-1, *(1,) * (u.dim() - 2))
    return torch.relu(u + (shift - low).view(table)) + low.view(table)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("shape", "last"), [(s, False) for s in SHAPES] + [(s, True) for s in SHAPES if len(s) > 3])
def test_equals_the_composition(shape: tuple[int, ...], last: bool, threads: int) -> None:
    u, shift, low, g = operands(shape, last)
    results = []
    for function in (lambda *x: shift_clamp.shift_and_clamp_(x[0] * 1, *x[1:]), composed):
        leaves = [t.double() if function is composed else t.clone() for t in (u, shift, low)]
        leaves = [t.requires_grad_() for t in leaves]
        with mock.patch.object(shift_clamp, "threads", return_value=threads):
            y = function(*leaves)
            results.append([y, *torch.autograd.grad(y, leaves, g.to(y.dtype))])
    assert results[0][0].stride() == u.stride()
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), wanted.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("last", [False, True])
def test_sums_do_not_depend_on_the_number_of_threads(last: bool) -> None:
    u, shift, low, g = operands((16, 9, 20, 20), last)
    found = []
    for threads in (1, 2, 3):
        leaves = [t.clone().requires_grad_() for t in (u, shift, low)]
        with mock.patch.object(shift_clamp, "threads", return_value=threads):
            found.append(torch.autograd.grad(shift_clamp.shift_and_clamp_(leaves[0] * 1, *leaves[1:]), leaves, g))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_second_derivatives() -> None:
    u, shift, low, _ = operands((4, 3, 5, 5), last=False)
    seconds = []
    for function in (lambda *x: shift_clamp.shift_and_clamp_(x[0] * 1, *x[1:]), composed):
        leaves = [t.clone().requires_grad_() for t in (u, shift, low)]
        loss = function(*leaves).pow(3).sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        seconds.append(torch.autograd.grad(sum(f.square().sum() for f in first), leaves))
    for ours, wanted in zip(*seconds, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("constants", ["exact", "paper"])
def test_layers_are_the_same_on_both_paths(constants: str) -> None:
    torch.manual_seed(0)
    images, volumes = torch.randn(4, 3, 8, 8), torch.randn(2, 3, 4, 4, 4)
    cases = [
        (NormPropConv2d(3, 6, 3, padding=1, constants=constants), images),
        (NormPropConv2d(3, 6, 3, constants=constants, border="exact", padding=1), images),
        (NormPropConv2d(3, 6, 3, constants=constants).to(memory_format=torch.channels_last), images),
        (NormPropConv3d(3, 5, 2, constants=constants), volumes),
        (NormPropLinear(8, 5, constants=constants), images[0, 0]),
        (NormPropLinear(8, 5, constants=constants), images),  # more axes: composed
        (NormPropConv2d(3, 6, 3, constants=constants), images[0]),  # no batch: composed
    ]
    for layer, x in cases:
        nn.init.normal_(layer.bias)
        found = []
        for kernel in (shift_clamp._kernel(), None):
            layer.zero_grad()
            with mock.patch.object(shift_clamp, "_kernel", return_value=kernel):
                y = layer(x)
                y.square().sum().backward()
            found.append([y.detach(), *(p.grad.clone() for p in layer.parameters())])
        for ours, plain in zip(*found, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_empty_batches_half_precision_and_transforms_are_composed() -> None:
    layer = NormPropConv2d(3, 4, 3)
    assert layer(torch.randn(0, 3, 5, 5)).shape == (0, 4, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 3, 5, 5)).shape == (2, 4, 3, 3)
    x = torch.randn(3, 3, 5, 5)
    torch.testing.assert_close(torch.vmap(lambda image: layer(image[None])[0])(x), layer(x), rtol=1e-5, atol=1e-5)


def test_a_gradient_of_another_layout() -> None:
    layer, x = NormPropConv2d(3, 4, 3), torch.randn(2, 3, 6, 6)
    weights = torch.randn(2, 4, 4, 4).contiguous(memory_format=torch.channels_last)
    found = []
    for kernel in (shift_clamp._kernel(), None):
        layer.zero_grad()
        with mock.patch.object(shift_clamp, "_kernel", return_value=kernel):
            layer(x).backward(weights)
        found.append(layer.weight.grad.clone())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 3, 6, 6), (6, 3)])
def test_compiled_layers_use_it_too(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = NormPropConv2d(3, 5, 3) if len(shape) == 4 else NormPropLinear(3, 5)
    found = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = call(x)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_exported_programs_hold_operations_of_torch_only() -> None:
    program = torch.export.export(NormPropConv2d(3, 5, 3), (torch.randn(2, 3, 6, 6),))
    assert "flexnorm" not in str(program.graph)


def test_the_operations_keep_to_the_rules_of_torch_library() -> None:
    u, shift, low, _ = operands((2, 3, 4, 4), last=False)
    torch.library.opcheck(shift_clamp._forward, tuple(t.requires_grad_() for t in (u, shift, low)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_programs_hold_operations_of_torch_only() -> None:
    layer, x = NormPropConv2d(3, 5, 3).eval(), torch.randn(2, 3, 6, 6)
    traced = torch.jit.trace(layer, x)
    torch.testing.assert_close(traced(2 * x), layer(2 * x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiled_gradients_per_sample_equal_eager_ones() -> None:
    layer, x = NormPropConv2d(3, 4, 3), torch.randn(5, 3, 6, 6)
    params = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(values: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(layer, values, (image[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))
    for ours, wanted in zip(
        torch.compile(per_sample, backend="aot_eager")(params, x).values(), per_sample(params, x).values(), strict=True
    ):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def test_the_output_may_be_overwritten() -> None:
    torch.manual_seed(0)
    layer, x = NormPropConv2d(3, 3, 3, padding=1), torch.randn(2, 3, 6, 6)
    found = []
    for add in (torch.add, torch.Tensor.add_):
        layer.zero_grad()
        add(layer(x), x).square().sum().backward()
        found.append([p.grad.clone() for p in layer.parameters()])
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_compiled_code_calls_the_kernel() -> None:
    called: list[str] = []

    def record(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(NormPropConv2d(3, 5, 3), backend=record)(torch.randn(2, 3, 6, 6))
    assert any("shift_and_clamp" in name for name in called)


def test_tables_that_have_a_chance() -> None:
    table = torch.zeros(3)
    assert shift_clamp.may(table)
    assert not shift_clamp.may(table.double())
    assert not shift_clamp.may(table.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not shift_clamp.may(table)
    seen = []
    torch.vmap(lambda t: (seen.append(shift_clamp.may(t)), t)[1])(torch.zeros(2, 3))
    assert seen == [False]
    with mock.patch.object(shift_clamp, "_kernel", return_value=None):
        assert not shift_clamp.may(table)


def test_activations_that_are_taken() -> None:
    x = torch.zeros(2, 3, 4, 5)
    assert shift_clamp._order(x) == (2, 3, 20)
    assert shift_clamp._order(x.to(memory_format=torch.channels_last)) == (40, 3, 1)
    assert shift_clamp._order(x[:, :, 0, 0].contiguous()) == (2, 3, 1)
    assert shift_clamp._order(x.transpose(2, 3)) is None
    assert shift_clamp.takes(x)
    for other in (x.double(), x[:0], x.transpose(2, 3), x[0, 0, 0], nn.Parameter(x)):
        assert not shift_clamp.takes(other)
