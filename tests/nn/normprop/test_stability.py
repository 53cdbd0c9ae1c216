"""Forward stability through many random layers, and chi and the Jacobian gain against simulation."""

import pytest
import torch
from torch import nn

from flexnorm.nn.normprop import NormPropConv2d, NormPropLinear, NormPropResidual


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + seed))


def random_affine(layer):
    with torch.no_grad():
        layer.gamma.uniform_(0.5, 2.0)
        layer.bias.uniform_(-1.0, 1.0)
    return layer


@torch.no_grad()
def trace(x, build, depth):
    """Mean and standard deviation of the output of each of ``depth`` fresh layers."""
    rows = []
    for _ in range(depth):
        x = build()(x)
        rows.append((float(x.mean()), float(x.std())))
    return torch.tensor(rows)


def assert_even_keel(rows, mean=0.05, std=0.05):
    assert rows[:, 0].abs().max() < mean
    assert (rows[:, 1] - 1).abs().max() < std


WIDTH = 384


@pytest.mark.quick(1)
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
def test_hundred_layers_of_any_affine_parameters_with_unitized_samples(activation):
    torch.manual_seed(1)
    build = lambda: random_affine(NormPropLinear(WIDTH, WIDTH, activation, unitize=True))  # noqa: E731
    assert_even_keel(trace(gaussian(1024, WIDTH), build, 100))


@pytest.mark.quick(2)
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh", "elu", "prelu"])
def test_hundred_layers_at_the_stable_initialization(activation):
    torch.manual_seed(1)
    rows = trace(gaussian(1024, WIDTH), lambda: NormPropLinear(WIDTH, WIDTH, activation), 100)
    assert_even_keel(rows)


def test_hundred_convolutions():
    torch.manual_seed(0)

    def build(**kwargs):
        return NormPropConv2d(64, 64, 3, padding=1, padding_mode="circular", **kwargs)

    x = gaussian(16, 64, 8, 8)
    assert_even_keel(trace(x, build, 100))
    assert_even_keel(trace(x, lambda: random_affine(build(unitize=True)), 100))


@pytest.mark.parametrize("unitize", [False, True])
def test_residual_network_of_110_layers(unitize):
    torch.manual_seed(0)

    def block():
        conv = [NormPropConv2d(32, 32, 3, padding=1, border="exact", unitize=unitize) for _ in range(2)]
        return NormPropResidual(nn.Sequential(*conv))

    assert_even_keel(trace(gaussian(24, 32, 8, 8), block, 55), mean=0.06)


def test_the_papers_layer_drifts():
    """Mean -0.12 and deviation 0.83 after one layer, about -0.34 and 0.5 after nine."""
    torch.manual_seed(0)
    rows = trace(gaussian(1024, WIDTH), lambda: NormPropLinear(WIDTH, WIDTH, constants="paper"), 9)
    assert rows[0, 0] == pytest.approx(-0.119, abs=0.01)
    assert rows[0, 1] == pytest.approx(0.826, abs=0.01)
    assert rows[8, 0] == pytest.approx(-0.34, abs=0.05)
    assert rows[8, 1] == pytest.approx(0.49, abs=0.05)


def test_bias_zero_fails_at_depth_and_the_stable_one_does_not():
    """chi = 1 is marginal: with exact constants the paper's bias of zero runs away between 30 and 100 layers."""
    torch.manual_seed(0)
    rows = trace(gaussian(512, 256), lambda: NormPropLinear(256, 256, init="paper"), 100)
    assert abs(rows[9, 1] - 1) < 0.15
    assert rows[:, 1].max() > 5


def relative(a, b):
    return abs(a - b) / abs(b)


@pytest.mark.quick(6)
@pytest.mark.parametrize("constants", ["exact", "paper"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "prelu", "gelu", "silu", "tanh", "elu", "hardtanh", None])
def test_gains_match_simulation(activation, constants):
    """Random filters, samples of variance q near 1: slope of the output's mean square, gain of a perturbation."""
    torch.manual_seed(0)
    layer = NormPropLinear(256, 1024, activation, constants, dtype=torch.float64)
    if layer.gamma is not None:
        random_affine(layer)
    gains = layer.gains()
    x = gaussian(1024, 256).double()
    with torch.no_grad():
        step = 0.01
        up, down = (layer(x * (1 + s) ** 0.5).square().mean() for s in (step, -step))
        assert relative((up - down) / (2 * step), gains.chi.mean()) < 0.05
        dx = 1e-4 * gaussian(1024, 256, seed=5).double()
        gain = (layer(x + dx) - layer(x)).square().mean() / (dx.square().mean())
        assert relative(gain, gains.jacobian.mean()) < 0.05
        # Two samples of correlation 0.05: the output's correlation, for outputs of zero mean and unit variance.
        if constants == "exact":
            rho = 0.05
            partner = rho * x + (1 - rho**2) ** 0.5 * gaussian(1024, 256, seed=6).double()
            first, second = layer(x), layer(partner)
            slope = ((first - first.mean(0)) * (second - second.mean(0))).mean() / rho
            assert relative(slope, gains.correlation.mean()) < 0.08
        predicted = layer.predicted_moments()
        assert (layer(x).mean(0) - predicted.mean).abs().mean() < 0.05
        assert relative(layer(x).var(0).mean(), predicted.var.mean()) < 0.05


def test_unitized_layers_have_no_radial_gain():
    assert NormPropLinear(8, 8, unitize=True).gains().chi.tolist() == [0.0] * 8
    assert NormPropLinear(8, 8, None, unitize=True).gains().chi.tolist() == [0.0] * 8
    assert NormPropLinear(8, 8, None).gains().chi.tolist() == [1.0] * 8


def test_chi_is_differentiable():
    """It can be a penalty: a gradient step on the bias lowers it."""
    layer = NormPropLinear(8, 8, init="paper")
    layer.gains().chi.sum().backward()
    assert (layer.bias.grad < 0).all()
