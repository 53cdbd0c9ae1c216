"""The fast layers against the equation written out unit by unit, and against autograd's own checks."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flexnorm.nn.normprop import ACTIVATIONS as ALL_ACTIVATIONS
from flexnorm.nn.normprop import (
    Activation,
    NormPropConv1d,
    NormPropConv2d,
    NormPropConv3d,
    NormPropConvTranspose1d,
    NormPropConvTranspose2d,
    NormPropConvTranspose3d,
    NormPropLinear,
    length_or_one,
    resolve_activation,
    unitize_samples,
)

ACTIVATIONS = ["relu", "leaky_relu", "prelu", "identity", "gelu", "silu", "tanh", "sigmoid", "elu", "hardtanh", None]


# -- slow, obvious layers straight from the equations, in float64

STEPS = 200_001


def reference_moments(activation, gamma: float, beta: float) -> tuple[float, float]:
    """Mean and variance of ``act(gamma z + beta)`` by a Riemann sum of 200,001 steps over [-12, 12]."""
    act = resolve_activation(activation)
    z = torch.linspace(-12, 12, STEPS, dtype=torch.float64)
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    y = gamma * z + beta if act is None else act(gamma * z + beta)
    mean = float((y * density).sum())
    return mean, float(((y - mean) ** 2 * density).sum())


def reference_normprop(
    x: torch.Tensor,
    weight: torch.Tensor,
    gamma: torch.Tensor,
    bias: torch.Tensor,
    activation="relu",
    *,
    constants: str = "exact",
    unitize: bool = False,
    eps: float = 0.0,
) -> torch.Tensor:
    """Eq. 9 of arXiv 1603.01431, unit by unit: ``(act(gamma W x / ||W|| + bias) - mean) / sqrt(var + eps)``.

    ``x`` (N, K) are samples (for a convolution: patches), ``weight`` (C, K) the filters, ``gamma`` and ``bias`` (C,);
    the other arguments are those of the layers. ``eps`` is added for exact constants only.
    """
    act = resolve_activation(activation)
    x, weight = x.double(), weight.double()
    if unitize:
        x = x / x.square().mean(1, keepdim=True).sqrt()
    columns = []
    for w, g, b in zip(weight, gamma.tolist(), bias.tolist(), strict=True):
        u = g * (x @ w) / w.square().sum().sqrt() + b
        at, added = ((g, b), eps) if constants == "exact" else ((1.0, 0.0), 0.0)
        mean, var = reference_moments(act or "identity", *at)
        columns.append(((u if act is None else act(u)) - mean) / math.sqrt(var + added))
    return torch.stack(columns, 1)


def randomize(layer, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=g) * 3)
        if layer.gamma is not None:
            layer.gamma.copy_(torch.rand(layer.gamma.shape, generator=g) * 1.5 + 0.5)
            layer.gamma[0] = -0.8
            layer.bias.copy_(torch.rand(layer.bias.shape, generator=g) * 2 - 1)
    return layer


def noise(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + seed), dtype=dtype)


@pytest.mark.quick(15)
@pytest.mark.parametrize("unitize", [False, True])
@pytest.mark.parametrize("constants", ["exact", "paper"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_equals_the_equation(activation, constants, unitize):
    layer = randomize(NormPropLinear(7, 5, activation, constants, unitize=unitize, dtype=torch.float64))
    x = noise(9, 7)
    y = layer(x)
    gamma, bias = layer.affine()
    if activation is None:
        unit = layer.weight / layer.weight.norm(dim=1, keepdim=True)
        source = x / x.square().mean(1, keepdim=True).sqrt() if unitize else x
        expected = gamma * (source @ unit.T) + bias
    else:
        eps = 0.0 if activation == "identity" else layer.eps
        expected = reference_normprop(
            x, layer.weight, gamma, bias, activation, constants=constants, unitize=unitize, eps=eps
        )
    assert torch.allclose(y, expected, atol=3e-5 if unitize else 1e-8)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize(
    ("kind", "size", "kwargs"),
    [
        (NormPropConv1d, (11,), {"kernel_size": 3, "stride": 2, "padding": 1}),
        (NormPropConv2d, (8, 7), {"kernel_size": (3, 2), "stride": (1, 2), "dilation": (2, 1)}),
        (NormPropConv2d, (8, 8), {"kernel_size": 3, "padding": 1, "groups": 2}),
        (NormPropConv2d, (8, 8), {"kernel_size": 3, "padding": "same", "padding_mode": "reflect"}),
        (NormPropConv2d, (8, 8), {"kernel_size": 2, "padding": "same", "padding_mode": "circular"}),
        (NormPropConv2d, (8, 8), {"kernel_size": 3, "padding": 2, "padding_mode": "replicate", "stride": 2}),
        (NormPropConv2d, (8, 8), {"kernel_size": 3, "padding": "valid"}),
        (NormPropConv3d, (5, 4, 6), {"kernel_size": 3, "padding": 1, "groups": 4}),
    ],
)
def test_convolutions_equal_a_plain_convolution_with_the_equation(kind, size, kwargs, activation):
    layer = randomize(kind(4, 8, activation=activation, dtype=torch.float64, **kwargs))
    x = noise(3, 4, *size)
    plain = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[layer.spatial](4, 8, bias=False, dtype=torch.float64, **kwargs)
    norms = layer.weight.flatten(1).norm(dim=1).view(-1, *(1,) * (layer.weight.dim() - 1))
    plain.weight.data = (layer.weight / norms).data
    z = plain(x)
    # One "filter" per unit on the pre-activations: the equation then reads act(gamma z + bias), standardized.
    flat = z.movedim(1, -1).reshape(-1, 8)
    columns = [
        reference_normprop(flat[:, [c]], torch.ones(1, 1), layer.gamma[[c]], layer.bias[[c]], activation, eps=layer.eps)
        for c in range(8)
    ]
    expected = torch.cat(columns, 1).view(*z.movedim(1, -1).shape).movedim(-1, 1)
    assert torch.allclose(layer(x), expected, atol=1e-8)
    assert torch.allclose(layer(x[0]), layer(x)[0], atol=1e-10)


@pytest.mark.parametrize(
    ("kind", "size", "kwargs"),
    [
        (NormPropConvTranspose1d, (6,), {"kernel_size": 4, "stride": 2, "padding": 1}),
        (NormPropConvTranspose2d, (5, 4), {"kernel_size": 3, "stride": 2, "output_padding": 1, "groups": 2}),
        (NormPropConvTranspose3d, (3, 4, 3), {"kernel_size": 2, "stride": 1, "dilation": 2}),
    ],
)
def test_transposed_convolutions_equal_plain_ones(kind, size, kwargs):
    layer = randomize(kind(4, 6, activation=None, dtype=torch.float64, **kwargs))
    x = noise(2, 4, *size)
    plain = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[layer.spatial](
        4, 6, dtype=torch.float64, **kwargs
    )
    groups, stride = kwargs.get("groups", 1), kwargs["stride"] ** layer.spatial
    with torch.no_grad():
        for c in range(6):
            g, j = divmod(c, 6 // groups)
            rows = slice(g * 4 // groups, (g + 1) * 4 // groups)
            unit = layer.weight[rows, j] / layer.weight[rows, j].norm()
            plain.weight[rows, j] = layer.gamma[c] * stride**0.5 * unit
        plain.bias.copy_(layer.bias)
    assert torch.allclose(layer(x), plain(x), atol=1e-12)
    assert layer.unit_rows().norm(dim=1).allclose(torch.ones(6, dtype=torch.float64))


@pytest.mark.quick(4)
@pytest.mark.parametrize("unitize", [False, True])
@pytest.mark.parametrize("activation", ["relu", "prelu", "gelu", "tanh", "elu", None])
def test_gradients_and_second_gradients(activation, unitize):
    layer = randomize(NormPropConv2d(2, 3, 2, activation=activation, unitize=unitize, dtype=torch.float64))
    names = [n for n, _ in layer.named_parameters()]
    x = noise(2, 2, 3, 3).requires_grad_()

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    inputs = (x, *[p.detach().clone().requires_grad_() for p in layer.parameters()])
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs, atol=1e-4)


def test_gradients_of_the_other_layers():
    layers = [
        (NormPropLinear(3, 2, "silu", dtype=torch.float64), noise(2, 3)),
        (NormPropConv2d(2, 2, 3, padding=1, border="exact", dtype=torch.float64), noise(1, 2, 3, 3)),
        (NormPropConvTranspose2d(2, 2, 3, 2, groups=2, border="exact", dtype=torch.float64), noise(1, 2, 2, 2)),
        (NormPropLinear(3, 2, nn.PReLU(2), "paper", dtype=torch.float64), noise(2, 3)),
    ]
    for layer, x in layers:
        params = tuple(randomize(layer).parameters())
        assert torch.autograd.gradcheck(lambda x, *_, layer=layer: layer(x), (x.requires_grad_(), *params))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_weight_length_does_not_matter(activation):
    layer = randomize(NormPropConv2d(3, 4, 3, activation=activation, dtype=torch.float64))
    x = noise(2, 3, 6, 6)
    before = layer(x)
    layer(x).square().sum().backward()
    # A scale-invariant filter has a gradient that is tangent to the sphere.
    assert (layer.weight * layer.weight.grad).flatten(1).sum(1).abs().max() < 1e-10
    layer.weight.data.mul_(torch.rand(4, 1, 1, 1).double() * 1e3)
    assert torch.allclose(layer(x), before, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-30, 1e-15, 1e18])
def test_degenerate_filters_are_finite(scale):
    layer = NormPropLinear(4, 3)
    layer.weight.data[1] *= scale
    x = noise(5, 4, dtype=torch.float32).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert layer.weight.grad.isfinite().all()
    if scale == 0:
        # The unit is constant, act(bias) standardized, and its filter gets a gradient by which it can leave zero.
        assert y[:, 1].std() == 0
        assert layer.weight.grad[1].norm() > 0
    layer.unit_norm_()
    assert layer.weight.isfinite().all()


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh", "prelu"])
@pytest.mark.parametrize(("gamma", "bias"), [(0.0, 0.0), (0.0, 1.0), (1e-20, -1.0), (1.0, -30.0), (-2.0, 30.0)])
def test_degenerate_affine_parameters_are_finite(activation, gamma, bias):
    layer = NormPropLinear(4, 3, activation)
    layer.gamma.data.fill_(gamma)
    layer.bias.data.fill_(bias)
    y = layer(noise(64, 4, dtype=torch.float32))
    y.square().sum().backward()
    assert y.isfinite().all()
    assert y.abs().max() < 30
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["relu", "gelu", "prelu"])
@pytest.mark.parametrize("unitize", [False, True])
def test_dtypes(dtype, activation, unitize):
    layer = randomize(NormPropConv2d(3, 4, 3, padding=1, activation=activation, unitize=unitize, dtype=dtype))
    assert {p.dtype for p in layer.parameters()} == {dtype}
    x = noise(2, 3, 6, 6).to(dtype).requires_grad_()
    y = layer(x)
    y.float().square().sum().backward()
    assert y.dtype == dtype
    assert x.grad.dtype == dtype
    reference = randomize(
        NormPropConv2d(3, 4, 3, padding=1, activation=activation, unitize=unitize, dtype=torch.float64)
    )
    reference.load_state_dict({k: v.double() for k, v in layer.state_dict().items()})
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert torch.allclose(y.double(), reference(x.double()), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("activation", ["relu", "gelu", None])
@pytest.mark.parametrize("border", ["paper", "exact"])
def test_autocast(activation, border):
    layer = randomize(NormPropConv2d(3, 4, 3, padding=1, activation=activation, unitize=True, border=border))
    x = noise(2, 3, 6, 6, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert torch.allclose(y.float(), layer(x), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("unitize", [False, True])
def test_memory_format(activation, unitize):
    layer = randomize(NormPropConv2d(3, 8, 3, padding=1, activation=activation, unitize=unitize))
    x = noise(2, 3, 6, 6, dtype=torch.float32)
    expected = layer(x)
    y = layer.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "gelu", "prelu", None, "identity"])
@pytest.mark.parametrize("unitize", [False, True])
def test_empty_single_and_odd_batches(activation, unitize):
    conv = NormPropConv2d(3, 4, 3, padding=1, activation=activation, unitize=unitize)
    linear = NormPropLinear(3, 4, activation, unitize=unitize)
    for layer, shape, out in [
        (conv, (0, 3, 5, 5), (0, 4, 5, 5)),
        (linear, (0, 3), (0, 4)),
        (linear, (2, 0, 3), (2, 0, 4)),
    ]:
        x = torch.zeros(shape, requires_grad=True)
        y = layer(x)
        assert y.shape == out
        y.sum().backward()
        assert x.grad.shape == shape
    x = noise(4, 3, 5, 5, dtype=torch.float32)
    whole = conv(x)
    # No statistics: a sample's output does not depend on the batch it comes in, nor on the mode.
    for i in range(4):
        assert torch.allclose(conv(x[i : i + 1])[0], whole[i], atol=1e-6)
    assert torch.equal(conv.eval()(x), whole)
    v = noise(2, 3, 4, 3, dtype=torch.float32)
    assert torch.allclose(linear(v)[1, 2], linear(v[1, 2]), atol=1e-6)
    strided = x.transpose(2, 3)
    assert torch.allclose(conv(strided), conv(strided.contiguous()), atol=1e-6)


def test_unitized_layers_ignore_the_scale_of_a_sample():
    layer = NormPropConv2d(3, 4, 3, unitize=True, dtype=torch.float64)
    x = noise(2, 3, 6, 6)
    scaled = x * torch.tensor([1e3, 50.0]).view(2, 1, 1, 1)
    assert torch.allclose(layer(scaled), layer(x), atol=1e-5)
    zero = torch.zeros(1, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    layer(zero).sum().backward()
    assert zero.grad.isfinite().all()


def test_unitize_samples_gives_unit_mean_square():
    x = noise(4, 3, 5) * torch.tensor([0.1, 1.0, 7.0, 0.0]).double().view(4, 1, 1)
    mean_square = unitize_samples(x, 2).square().mean((1, 2))
    assert torch.allclose(mean_square, torch.tensor([1.0, 1.0, 1.0, 0.0]).double(), atol=1e-3)


def test_initialization():
    stable, paper = NormPropConv2d(3, 8, 3), NormPropConv2d(3, 8, 3, constants="paper")
    assert stable.init == "stable"
    assert paper.init == "paper"
    assert torch.equal(stable.gamma, torch.ones(8))
    assert torch.equal(stable.bias, torch.full((8,), 0.5))
    assert paper.gamma[0].item() == pytest.approx(1 / 1.2112, abs=1e-4)
    assert torch.equal(paper.bias, torch.zeros(8))
    for layer in (stable, paper):
        assert layer.weight.flatten(1).norm(dim=1).allclose(torch.ones(8))
    # The function that decides for the activations without a row in the documentation.
    assert NormPropLinear(2, 2, "silu").bias[0] == 1.0
    assert NormPropLinear(2, 2, "tanh").bias[0] == 0.0
    assert NormPropLinear(2, 2, None).bias[0] == 0.0
    assert NormPropLinear(2, 2, "prelu").slope.item() == 0.25
    assert NormPropLinear(2, 3, nn.PReLU(3, 0.1)).slope.tolist() == pytest.approx([0.1] * 3)
    assert NormPropLinear(2, 2, "softplus").gains().chi.max() < 1


@pytest.mark.parametrize(
    "activation",
    sorted(set(ALL_ACTIVATIONS) - {"identity"}),
)
def test_stable_initialization_contracts(activation):
    assert NormPropLinear(2, 2, activation).gains().chi.max() <= 0.95


def test_user_activation_in_a_layer():
    layer = randomize(NormPropLinear(6, 5, Activation("mine", F.softsign, kinks=(0.0,)), dtype=torch.float64))
    x = noise(7, 6)
    expected = reference_normprop(x, layer.weight, layer.gamma, layer.bias, F.softsign, eps=layer.eps)
    assert torch.allclose(layer(x), expected, atol=1e-7)


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: NormPropLinear(0, 3), ValueError, "in_features must be a positive integer, got 0"),
        (lambda: NormPropLinear(3, 2.5), ValueError, "out_features"),
        (lambda: NormPropLinear(3, 2, "rleu"), ValueError, "did you mean 'relu'"),
        (lambda: NormPropLinear(3, 2, constants="exakt"), ValueError, "did you mean 'exact'"),
        (lambda: NormPropLinear(3, 2, init="stabel"), ValueError, "did you mean 'stable'"),
        (lambda: NormPropLinear(3, 2, eps=-1.0), ValueError, "eps"),
        (lambda: NormPropLinear(3, 2, dtype=torch.int32), TypeError, "floating point"),
        (lambda: NormPropLinear(3, 2, nn.PReLU(5)), ValueError, "5 slopes"),
        (lambda: NormPropConv2d(3, 4, 3, groups=2), ValueError, "divisible by groups"),
        (lambda: NormPropConv2d(3, 4, (3, 3, 3)), ValueError, "kernel_size"),
        (lambda: NormPropConv2d(3, 4, 3, stride=0), ValueError, "stride"),
        (lambda: NormPropConv2d(3, 4, 3, padding=-1), ValueError, "padding"),
        (lambda: NormPropConv2d(3, 4, 3, padding="sme"), ValueError, "did you mean 'same'"),
        (lambda: NormPropConv2d(3, 4, 3, padding="same", stride=2), ValueError, "stride 1"),
        (lambda: NormPropConv2d(3, 4, 3, padding_mode="zero"), ValueError, "did you mean 'zeros'"),
        (lambda: NormPropConv2d(3, 4, 3, border="exat"), ValueError, "did you mean 'exact'"),
        (lambda: NormPropConv2d(3, 4, 3, border="exact", padding_mode="circular"), ValueError, "zero padding"),
        (lambda: NormPropConvTranspose2d(3, 4, 3, groups=2), ValueError, "divisible by groups"),
        (lambda: NormPropConvTranspose2d(3, 4, 3, border="x"), ValueError, "unknown border"),
        (lambda: NormPropLinear(3, 2)(torch.zeros(2, 4)), ValueError, r"last axis of 3 features.*\(2, 4\)"),
        (lambda: NormPropConv2d(3, 2, 1)(torch.zeros(2, 4, 5, 5)), ValueError, r"\(N, 3, H, W\)"),
        (lambda: NormPropConv1d(3, 2, 1)(torch.zeros(2, 4, 5, 5)), ValueError, r"\(N, 3, L\)"),
        (lambda: NormPropConvTranspose2d(3, 2, 1)(torch.zeros(2, 4, 5, 5)), ValueError, "3 channels"),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(build, error, text):
    with pytest.raises(error, match=text):
        build()


def test_repr_shows_the_arguments():
    text = repr(NormPropConv2d(4, 8, 3, 2, 1, 2, 2, "zeros", "gelu", unitize=True, border="exact", eps=1e-4))
    for part in (
        "4, 8",
        "stride=(2, 2)",
        "padding=(1, 1)",
        "dilation=(2, 2)",
        "groups=2",
        "'gelu'",
        "unitize",
        "border",
        "eps",
    ):
        assert part in text
    assert "padding_mode='reflect'" in repr(NormPropConv2d(4, 8, 3, padding=1, padding_mode="reflect"))
    assert "activation=None" in repr(NormPropLinear(3, 2, None))
    text = repr(NormPropConvTranspose2d(4, 8, 3, 2, 1, 1, 2, 2, border="exact"))
    for part in ("output_padding=(1, 1)", "groups=2", "dilation=(2, 2)", "border='exact'"):
        assert part in text


def test_length_or_one():
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-30, 0.0]], requires_grad=True)
    lengths = length_or_one(rows)
    assert lengths.tolist() == [5.0, 1.0, 1.0]
    (rows / lengths.unsqueeze(1)).sum().backward()
    assert torch.isfinite(rows.grad).all()
    assert rows.grad[1].tolist() == [1.0, 1.0]
    assert length_or_one(torch.full((1, 70000), 1.0, dtype=torch.float16)).dtype == torch.float32
