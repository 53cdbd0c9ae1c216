"""What the conversion to Normalization Propagation decides with: operations, scale and shift of values, layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from flexnorm.nn.normprop import NormPropConv2d, resolve_activation
from flexnorm.surgery._reading import RefusedError
from flexnorm.surgery.normprop import graph as ops
from flexnorm.surgery.normprop.layers import (
    HANDS_ON,
    Moments,
    ScaleShift,
    Tail,
    activation_layer,
    add_layer,
    joined,
    linear_layer,
    passed,
    plain_linear,
)
from flexnorm.surgery.normprop.layers import through as through_linear


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


UP, DOWN = ScaleShift(vector(2, 3), vector(0.5, -1)), ScaleShift(vector(-2, 3), vector(0.5, -1))


class Lambda(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def node_of(function: Any) -> fx.Node:
    """The last operation of a function of one tensor."""
    return list(fx.symbolic_trace(Lambda(function)).graph.nodes)[-2]


def undone(scaling: ScaleShift, x: torch.Tensor) -> torch.Tensor:
    ends = (1, -1, *(1,) * (x.dim() - 2))
    return scaling.scale.view(ends) * x + scaling.shift.view(ends)


OPERATIONS = {
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 2),
    "maximum": lambda x: F.max_pool2d(x, 2),
    "average": lambda x: F.avg_pool2d(x, 2),
    "average, padded": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "flatten": lambda x: torch.flatten(x, 1),
    "view": lambda x: x.view(x.shape[0], -1),
    "reshape": lambda x: x.reshape(2, 16, 2),
    "over positions": lambda x: x.mean((2, 3)),
    "over samples": lambda x: x.mean(0),
    "contiguous": lambda x: x.contiguous(),
    "sort": lambda x: torch.sort(x, 1).values,
    "square": lambda x: x * x,
}
MODULES = (
    nn.Identity(), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Upsample(scale_factor=2), nn.Flatten(), nn.MaxPool2d(2),
    nn.AdaptiveMaxPool2d(2), nn.AvgPool2d(2), nn.AvgPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    nn.Softmax(1), nn.ReLU(),
)  # fmt: skip


@pytest.mark.parametrize("scaling", [UP, DOWN], ids=["increasing", "decreasing"])
@pytest.mark.parametrize("operation", [*OPERATIONS.values(), *MODULES], ids=[*OPERATIONS, *map(str, MODULES)])
def test_what_passes_stands_for_the_original_in_the_same_way(operation: Any, scaling: ScaleShift) -> None:
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    module = operation.eval() if isinstance(operation, nn.Module) else None
    node = node_of(operation) if module is None else fx.Node(fx.Graph(), "m", "call_module", "m", (), {})
    out = operation(x)
    after = passed(node, module, scaling, x.shape, out.shape)
    if after is not None:
        torch.testing.assert_close(undone(after, out), operation(undone(scaling, x)))
    refused = {"average, padded", "reshape", "over samples", "sort", "square"}
    name = next((name for name, known in OPERATIONS.items() if known is operation), str(operation))
    maximum = "Max" in name or name == "maximum"
    padded = isinstance(module, nn.AvgPool2d) and module.padding == 1 and module.count_include_pad
    assert (after is None) == (
        name in refused or (maximum and scaling is DOWN) or padded or isinstance(module, (nn.Softmax, nn.ReLU))
    )
    assert module is None or type(module) not in HANDS_ON or after is not None or maximum or padded


def test_concatenations_join() -> None:
    both = joined([UP, None], [2, 1])
    assert both is not None
    assert both.scale.tolist() == [2, 3, 1]
    assert both.shift.tolist() == [0.5, -1, 0]
    assert joined([None, None], [2, 1]) is None


def test_operations_are_recognized() -> None:
    for function, name in (
        (F.relu, "relu"), (torch.tanh, "tanh"), (lambda x: x.sigmoid(), "sigmoid"), (lambda x: F.elu(x, 0.5), "elu"),
        (lambda x: F.leaky_relu(x, negative_slope=0.3), "leaky_relu"), (F.hardswish, "hardswish"),
    ):  # fmt: skip
        found = ops.activation_of(node_of(function), None)
        assert found is not None
        x = torch.randn(9)
        assert found[0].name == name
        assert torch.equal(found[0](x), function(x))
    assert ops.activation_of(node_of(torch.exp), None) is None
    assert ops.activation_of(node_of(F.relu), nn.Softmax(1)) is None
    slopes = nn.PReLU(3)
    found = ops.activation_of(node_of(F.relu), slopes)
    assert found is not None
    assert torch.equal(found[1], slopes.weight)
    assert ops.summands(node_of(lambda x: x.relu() + x)) is not None
    assert ops.summands(node_of(lambda x: x + 1)) is None
    assert ops.summands(node_of(lambda x: torch.add(x, x, alpha=2))) is None
    assert ops.is_cat(node_of(lambda x: torch.cat([x, x], dim=1)))
    assert not ops.is_cat(node_of(lambda x: torch.cat([x, x])))
    assert ops.in_place(node_of(lambda x: F.relu(x, inplace=True)), None)
    assert ops.in_place(node_of(lambda x: x.relu_()), None)
    assert not ops.in_place(node_of(F.relu), nn.ReLU())
    dropout = ops.dropout_of(node_of(lambda x: F.dropout(x, 0.3)))
    assert isinstance(dropout, nn.Dropout)
    assert dropout.p == 0.3
    assert ops.is_shape_query(node_of(lambda x: x.shape))
    assert ops.is_shape_query(node_of(lambda x: x.size(0)))


LINEAR = (
    nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.ConvTranspose2d(4, 6, 1, groups=2),
    nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
)  # fmt: skip


@pytest.mark.parametrize("kind", LINEAR, ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu", None])
def test_a_layer_computes_what_the_linear_map_and_its_followers_did(kind: nn.Module, activation: str | None) -> None:
    module = kind.double()
    inside = torch.randn(5, 4, 6, 6, dtype=torch.float64)
    before = ScaleShift(torch.rand(4).double() + 0.5, torch.randn(4).double())
    act = resolve_activation(activation)
    tail = Tail(vector(1, -2, 0.5, 3, 1, -1), torch.randn(6).double(), [], act)
    linear = through_linear(module, before, inside.shape, keep_padding=True)
    u = module(undone(before, inside))
    moments = Moments(u.mean((0, 2, 3)), u.std((0, 2, 3)))
    wanted = undone(ScaleShift(tail.scale, tail.shift), u)
    wanted = wanted if act is None else act(wanted)
    for known in (None, moments):
        new, after = linear_layer(module, linear, known, tail, {"eps": 1e-5})
        torch.testing.assert_close(undone(after, new(inside)), wanted)
        assert isinstance(new, NormPropConv2d) == isinstance(module, nn.Conv2d)
        if known is not None and act is None:
            assert new(inside).std((0, 2, 3)).allclose(torch.ones(6).double(), atol=0.01)
    if linear.pad is None:
        torch.testing.assert_close(plain_linear(module, linear)(inside), u)
    else:
        with pytest.raises(RefusedError, match="pads with zeros"):
            plain_linear(module, linear)


def test_a_shift_through_overlapping_windows_is_refused() -> None:
    module = nn.ConvTranspose2d(2, 3, 3, 2)
    with pytest.raises(RefusedError, match="another constant at every position"):
        through_linear(module, UP, torch.Size((1, 2, 4, 4)), keep_padding=True)


def test_activations_and_sums_stand_for_the_originals() -> None:
    x, y = (torch.randn(50, 2, 3, dtype=torch.float64) for _ in range(2))
    relu = resolve_activation("relu")
    assert relu is not None
    for moments in (None, Moments(vector(0.3, 1), vector(2, 0.0))):
        layer, after = activation_layer(DOWN, moments, (relu, None), 1, x, {"eps": 1e-5, "unitize": False})
        torch.testing.assert_close(undone(after, layer(x)), torch.relu(undone(DOWN, x)))
    for known in (None, Moments(vector(0, 0), vector(3, 1))):
        new, after = add_layer(UP, DOWN, known, 1, x)
        torch.testing.assert_close(undone(after, new(x, y)), undone(UP, x) + undone(DOWN, y))


def test_a_network_knows_its_modules() -> None:
    inner = nn.Linear(3, 3)
    model = nn.Sequential(inner, nn.ReLU(), inner, nn.Linear(3, 3))
    network = ops.Network(model, torch.randn(2, 3))
    with pytest.raises(RefusedError, match="more than once"):
        network.check(inner)
    network.check(model[3])
    model[3].register_forward_hook(lambda *_: None)
    with pytest.raises(RefusedError, match="hooks"):
        network.check(model[3])
    assert network.names[id(inner)] == ["0", "2"]
    assert sorted({tuple(shape) for shape in network.shapes.values()}) == [(2, 3)]
    data = torch.randn(40, 3) * 3 + 1
    stats = network.measure([data[:7], (data[7:], None)])
    torch.testing.assert_close(stats["input_1"][0], data.double().mean(0))
    torch.testing.assert_close(stats["input_1"][1], data.double().var(0, correction=0))
    with pytest.raises(RuntimeError, match="not finite"):
        network.measure([data / 0])
