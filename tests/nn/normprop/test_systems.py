"""What surrounds a layer: transforms, compilers, exporters, serialization, checkpointing, optimizers, folding."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from flexnorm.nn.normprop import (
    Activation,
    NormPropAvgPool2d,
    NormPropConv1d,
    NormPropConv2d,
    NormPropConv3d,
    NormPropConvTranspose1d,
    NormPropConvTranspose2d,
    NormPropConvTranspose3d,
    NormPropLayer,
    NormPropLinear,
    NormPropMaxPool2d,
    NormPropResidual,
    normalize_weights_,
    register_unit_norm,
)

ACTIVATIONS = ["relu", "leaky_relu", "prelu", "gelu", "silu", "tanh", "elu", None]


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + seed), dtype=dtype)


def network(activation="relu", unitize=False, dtype=torch.float64):
    torch.manual_seed(0)
    kwargs = {"activation": activation, "unitize": unitize, "dtype": dtype}
    return nn.Sequential(
        NormPropConv2d(2, 4, 3, padding=1, border="exact", **kwargs),
        NormPropMaxPool2d(2, correlation=0.5),
        NormPropResidual(NormPropConv2d(4, 4, 3, padding=1, **kwargs)),
        NormPropAvgPool2d(correlation=0.2),
        nn.Flatten(),
        NormPropLinear(4, 3, None, dtype=dtype),
    )


@pytest.mark.parametrize("unitize", [False, True])
@pytest.mark.parametrize("activation", ["relu", "prelu", "gelu", "elu"])
def test_per_sample_gradients_equal_a_loop(activation, unitize):
    net = network(activation, unitize)
    x, target = gaussian(5, 2, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    params = dict(net.named_parameters())

    def loss(params, sample, label):
        logits = torch.func.functional_call(net, params, (sample.unsqueeze(0),))
        return F.cross_entropy(logits, label.unsqueeze(0))

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, x, target)
    for i in range(5):
        net.zero_grad()
        F.cross_entropy(net(x[i : i + 1]), target[i : i + 1]).backward()
        for name, parameter in net.named_parameters():
            assert torch.allclose(per_sample[name][i], parameter.grad, atol=1e-10)


@pytest.mark.quick(1)
@pytest.mark.parametrize("activation", ["relu", "gelu", "elu", "prelu"])
def test_compiles_to_one_graph(activation):
    torch._dynamo.reset()
    net, x = network(activation, True), gaussian(3, 2, 6, 6, dtype=torch.float64)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), net(x), atol=1e-12)
    compiled(x).square().sum().backward()
    got = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    net(x).square().sum().backward()
    for a, p in zip(got, net.parameters(), strict=True):
        assert torch.allclose(a, p.grad, atol=1e-10)


@pytest.mark.parametrize("activation", ["relu", "gelu", "elu"])
def test_exports(activation):
    net, x = network(activation).eval(), gaussian(3, 2, 6, 6, dtype=torch.float64)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    other = gaussian(7, 2, 6, 6, dtype=torch.float64)
    assert torch.allclose(program.module()(other), net(other), atol=1e-10)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, nn.PReLU(4), "identity", Activation("sine", torch.sin)])
def test_copies_pickles_and_state(activation):
    torch.manual_seed(0)
    layer = NormPropConv2d(2, 4, 3, activation=activation)
    x = gaussian(2, 2, 5, 5)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        twin.weight.data.zero_()
        assert layer.weight.abs().sum() > 0
    other = NormPropConv2d(2, 4, 3, activation=activation)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), layer(x))


def test_builds_on_the_meta_device():
    layer = NormPropConv2d(2, 4, 3, activation="gelu", constants="paper", device="meta")
    assert layer(torch.empty(1, 2, 5, 5, device="meta")).shape == (1, 4, 3, 3)
    real = layer.to_empty(device="cpu")
    real.reset_parameters()
    assert real(gaussian(1, 2, 5, 5)).isfinite().all()
    with torch.device("meta"):
        assert NormPropLinear(2, 2, "silu").weight.device.type == "meta"


def test_checkpointing_gives_the_same_gradients():
    net, x = network(), gaussian(3, 2, 6, 6, dtype=torch.float64)
    net(x).square().sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    checkpoint(net, x.requires_grad_(), use_reentrant=False).square().sum().backward()
    for a, p in zip(expected, net.parameters(), strict=True):
        assert torch.equal(a, p.grad)


def test_forward_mode_derivatives():
    for activation in ("relu", "gelu"):
        net, x = network(activation, True), gaussian(2, 2, 6, 6, dtype=torch.float64)
        dx = gaussian(2, 2, 6, 6, seed=1, dtype=torch.float64)
        _, tangent = torch.func.jvp(net, (x,), (dx,))
        difference = (net(x + 1e-6 * dx) - net(x - 1e-6 * dx)) / 2e-6
        assert torch.allclose(tangent, difference, atol=1e-6)


def test_unit_norm_after_every_step_does_not_change_the_function():
    net, x = network(), gaussian(3, 2, 6, 6, dtype=torch.float64)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    handle = register_unit_norm(optimizer, net)
    for _ in range(5):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
        for layer in net.modules():
            if isinstance(layer, NormPropLayer):
                assert torch.allclose(layer.weight.flatten(1).norm(dim=1), torch.ones(layer.out_channels).double())
    handle.remove()
    net(x).square().sum().backward()
    optimizer.step()
    before = net(x)
    assert not torch.allclose(net[0].weight.flatten(1).norm(dim=1), torch.ones(4).double())
    assert normalize_weights_(net) is net
    assert torch.allclose(net(x), before, atol=1e-12)
    pickle.dumps(optimizer.state_dict())
    with pytest.raises(TypeError, match="Optimizer"):
        register_unit_norm(object(), net)


def test_training_without_projection_lengthens_filters():
    """The gradient is tangent to the sphere, so a plain step can only make a filter longer: why the paper projects."""
    layer = NormPropLinear(8, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer(gaussian(16, 8)).pow(3).sum().backward()
    optimizer.step()
    assert (layer.weight.norm(dim=1) > 1).all()


CASES = [
    (NormPropLinear, (6, 4), {}, (3, 6)),
    (NormPropConv1d, (6, 4, 3), {"padding": 1}, (2, 6, 7)),
    (NormPropConv2d, (6, 4, 3), {"padding": 1, "groups": 2, "stride": 2}, (2, 6, 7, 7)),
    (NormPropConv2d, (6, 4, 3), {"padding": "same", "padding_mode": "reflect"}, (2, 6, 7, 7)),
    (NormPropConv3d, (6, 4, 3), {"padding": 1}, (2, 6, 4, 4, 4)),
    (NormPropConvTranspose1d, (6, 4, 3), {"stride": 2}, (2, 6, 5)),
    (NormPropConvTranspose2d, (6, 4, 3), {"stride": 2, "groups": 2, "output_padding": 1}, (2, 6, 5, 5)),
    (NormPropConvTranspose3d, (6, 4, 2), {"dilation": 2}, (2, 6, 3, 3, 3)),
]
FOLDED = [*ACTIVATIONS, "identity", nn.PReLU(4), Activation("sine", torch.sin)]


@pytest.mark.parametrize("constants", ["exact", "paper"])
@pytest.mark.parametrize("activation", FOLDED, ids=lambda a: getattr(a, "name", str(a)))
def test_fold_is_exact(activation, constants):
    for kind, args, kwargs, shape in CASES:
        for unitize in (False, True):
            layer = kind(
                *args, **kwargs, activation=activation, constants=constants, unitize=unitize, dtype=torch.float64
            )
            with torch.no_grad():
                layer.weight.mul_(2.5)
                if layer.gamma is not None:
                    layer.gamma.uniform_(-1, 2)
                    layer.bias.uniform_(-1, 1)
            folded = layer.fold()
            x = gaussian(*shape, dtype=torch.float64)
            assert torch.allclose(folded(x), layer(x), atol=1e-11)
            assert not any(isinstance(m, NormPropLayer) for m in folded.modules())
            assert pickle.loads(pickle.dumps(folded))(x).equal(folded(x))


def test_folded_relu_is_a_convolution_and_one_maximum():
    folded = NormPropConv2d(3, 4, 3).fold()
    assert [type(m).__name__ for m in folded] == ["Conv2d", "ChannelFloor"]
    assert isinstance(NormPropConv2d(3, 4, 3, activation=None).fold(), nn.Conv2d)
    assert "sine" in repr(NormPropLinear(2, 2, Activation("sine", torch.sin)).fold())
    assert "sample_dims=3" in repr(NormPropConv2d(3, 4, 3, unitize=True).fold())


def test_folding_copies_and_keeps_dtype():
    layer = NormPropLinear(3, 2, "gelu", dtype=torch.bfloat16)
    folded = layer.fold()
    assert {t.dtype for t in [*folded.parameters(), *folded.buffers()]} == {torch.bfloat16}
    before = layer.weight.clone()
    folded[0].weight.data.zero_()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("kind", [NormPropConv2d, NormPropConvTranspose2d])
def test_a_border_correction_does_not_fold(kind):
    with pytest.raises(RuntimeError, match="border='paper'"):
        kind(3, 4, 3, border="exact").fold()


def test_base_class_is_abstract():
    layer = NormPropLayer(
        (2, 2), 2, activation="relu", constants="exact", init=None, unitize=False, eps=0.0, device=None, dtype=None
    )
    for call in (
        layer.fold,
        lambda: layer(torch.zeros(1, 2)),
        lambda: layer._linear(torch.zeros(1, 2), layer.weight, None),
    ):
        with pytest.raises(NotImplementedError):
            call()
