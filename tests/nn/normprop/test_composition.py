"""Residual sums, concatenation, pooling, borders and the data layer."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flexnorm.nn.normprop import (
    NormPropAvgPool1d,
    NormPropAvgPool2d,
    NormPropAvgPool3d,
    NormPropConcat,
    NormPropConv2d,
    NormPropConvTranspose2d,
    NormPropInput,
    NormPropLinear,
    NormPropMaxPool1d,
    NormPropMaxPool2d,
    NormPropMaxPool3d,
    NormPropResidual,
    average_pool_variance,
    border_variance,
    max_pool_moments,
    normprop_add,
    window_correlation,
)


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + seed), dtype=dtype)


# -- sums


@settings(deadline=None, max_examples=25, derandomize=True)
@given(a=st.floats(0.1, 5), b=st.floats(0.1, 5), rho=st.floats(-0.9, 1))
def test_sum_keeps_unit_variance(a, b, rho):
    x, noise = gaussian(40_000, dtype=torch.float64), gaussian(40_000, seed=1, dtype=torch.float64)
    fx = rho * x + (1 - rho**2) ** 0.5 * noise
    assert float(normprop_add(x, fx, a, b, rho).std()) == pytest.approx(1.0, abs=0.03)


def test_sum_with_tensor_weights_equals_numbers():
    x, fx = gaussian(5, 3), gaussian(5, 3, seed=1)
    numbers = normprop_add(x, fx, 0.7, 2.0, 0.1)
    assert torch.allclose(normprop_add(x, fx, torch.tensor(0.7), torch.tensor(2.0), 0.1), numbers)
    assert torch.allclose(normprop_add(x, fx, 0.7, torch.tensor([2.0] * 3), 0.1), numbers)
    assert torch.allclose(numbers, (0.7 * x + 2 * fx) / (0.49 + 4 + 0.28) ** 0.5)


def test_residual_block():
    x = gaussian(4, 3, 8, 8)
    branch = NormPropConv2d(3, 6, 3, stride=2, padding=1)
    shortcut = NormPropConv2d(3, 6, 1, stride=2, activation="identity")
    assert sorted(n for n, _ in shortcut.named_parameters()) == ["weight"]
    block = NormPropResidual(branch, shortcut, a=2.0, b=1.0)
    assert torch.allclose(block(x), (2 * shortcut(x) + branch(x)) / 5**0.5, atol=1e-6)
    assert torch.equal(NormPropResidual(nn.Identity(), a=0.0, b=3.0)(x), x)
    with pytest.raises(ValueError, match="activation='identity'"):
        NormPropResidual(branch)(x)
    for bad in ({"a": 0.0, "b": 0.0}, {"correlation": -1.0}, {"a": float("nan")}):
        with pytest.raises(ValueError, match="positive variance"):
            NormPropResidual(branch, **bad)
    assert "a=2" in repr(block)


def test_trainable_residual_weights():
    block = NormPropResidual(NormPropLinear(3, 3, dtype=torch.float64), trainable=True).double()
    assert {"a", "b"} <= dict(block.named_parameters()).keys()
    x = gaussian(4, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a, b: block(x), (x, block.a, block.b))
    with torch.no_grad():
        block.a.mul_(10)
        block.b.mul_(10)
    # Only the ratio counts.
    assert torch.allclose(block(x), NormPropResidual(block.branch)(x))
    assert "trainable=True" in repr(block)


def test_concatenation():
    x = gaussian(4, 3, 5, 5)
    branches = [nn.Identity(), NormPropConv2d(3, 9, 1)]
    plain, balanced = NormPropConcat(branches), NormPropConcat(branches, balance=True)
    assert torch.equal(plain(x), torch.cat([x, branches[1](x)], 1))
    y = balanced(x)
    assert torch.allclose(y[:, :3], x * 2**0.5)
    # Both halves of the next pre-activation's variance come from one branch each.
    shares = [y[:, :3].square().sum(), y[:, 3:].square().sum()]
    assert float((shares[0] / shares[1]).detach()) == pytest.approx(1.0, rel=0.3)
    assert "balance=True" in repr(balanced)
    with pytest.raises(ValueError, match="at least one"):
        NormPropConcat([])


# -- pooling


@pytest.mark.parametrize(
    ("k", "activation", "mean", "std"),
    [(9, None, 1.4850, 0.5978), (4, None, 1.0291, 0.7010), (4, "relu", 1.106, 1.150), (9, "relu", 1.861, 1.022)],
)
def test_moments_of_the_maximum(k, activation, mean, std):
    got = max_pool_moments(k, 0.0, activation)
    assert got[0] == pytest.approx(mean, abs=3e-3)
    assert got[1] ** 0.5 == pytest.approx(std, abs=3e-3)


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.9, 1.0])
def test_moments_of_the_maximum_match_simulation(rho):
    n = 400_000
    z = rho**0.5 * gaussian(n, 1) + (1 - rho) ** 0.5 * gaussian(n, 4, seed=1)
    mean, var = max_pool_moments(4, rho)
    largest = z.amax(1)
    assert float(largest.mean()) == pytest.approx(mean, abs=0.01)
    assert float(largest.var()) == pytest.approx(var, abs=0.01)


def test_full_correlation_needs_no_correction():
    for activation in (None, "relu", "tanh"):
        mean, var = max_pool_moments(9, 1.0, activation)
        assert mean == pytest.approx(0.0, abs=3e-4)
        assert var == pytest.approx(1.0, abs=1e-3)
    assert average_pool_variance(9, 1.0) == 1.0
    assert max_pool_moments(1)[1] == pytest.approx(1.0)
    assert max_pool_moments(10_000)[0] == pytest.approx(3.85, abs=0.02)


POOLS = [
    (NormPropAvgPool1d, nn.AvgPool1d, (2, 3, 8)),
    (NormPropAvgPool2d, nn.AvgPool2d, (2, 3, 8, 8)),
    (NormPropAvgPool3d, nn.AvgPool3d, (2, 3, 8, 8, 8)),
    (NormPropMaxPool1d, nn.MaxPool1d, (2, 3, 8)),
    (NormPropMaxPool2d, nn.MaxPool2d, (2, 3, 8, 8)),
    (NormPropMaxPool3d, nn.MaxPool3d, (2, 3, 8, 8, 8)),
]


@pytest.mark.parametrize(("ours", "torchs", "shape"), POOLS)
def test_uncorrected_pooling_is_the_papers(ours, torchs, shape):
    x = gaussian(*shape)
    assert torch.equal(ours(2)(x), torchs(2)(x))
    assert torch.equal(ours(3, 2, ceil_mode=True)(x), torchs(3, 2, ceil_mode=True)(x))
    kwargs = {"count_include_pad": False} if "Avg" in ours.__name__ else {}
    assert torch.equal(ours(3, 2, 1)(x), torchs(3, 2, 1, **kwargs)(x))


@pytest.mark.parametrize("ours", [NormPropAvgPool2d, NormPropMaxPool2d])
@pytest.mark.parametrize("correlation", [0.0, 0.4])
def test_corrected_pooling_is_standardized(ours, correlation):
    """Units of the stable ReLU layer whose pre-activations have the stated correlation within a window."""
    n = 20_000
    z = correlation**0.5 * gaussian(n, 1, 1, 1) + (1 - correlation) ** 0.5 * gaussian(n, 1, 3, 3, seed=1)
    layer = NormPropConv2d(1, 1, 1)
    layer.weight.data.fill_(1.0)
    x = z if ours is NormPropAvgPool2d else layer(z)
    y = ours(3, correlation=correlation)(x).detach()
    assert float(y.mean()) == pytest.approx(0.0, abs=0.03)
    assert float(y.std()) == pytest.approx(1.0, abs=0.03)


def test_global_average_pooling():
    x = gaussian(500, 4, 6, 6)
    assert torch.allclose(NormPropAvgPool2d()(x), x.mean((2, 3), keepdim=True))
    assert float(NormPropAvgPool2d(correlation=0.0)(x).std()) == pytest.approx(1.0, abs=0.05)
    assert "None" in repr(NormPropAvgPool2d())
    assert "correlation=0.5" in repr(NormPropMaxPool2d(2, correlation=0.5))


def test_window_correlation_is_measured():
    common = gaussian(3000, 2, 2, 2)
    x = 0.6**0.5 * common.repeat_interleave(2, 2).repeat_interleave(2, 3) + 0.4**0.5 * gaussian(3000, 2, 4, 4, seed=1)
    assert window_correlation(x, 2) == pytest.approx(0.6, abs=0.02)
    assert window_correlation(gaussian(3000, 2, 4, 4), 2) == pytest.approx(0.0, abs=0.02)
    with pytest.raises(ValueError, match="no pairs"):
        window_correlation(x, 1)


def test_pooling_errors():
    for bad in (-0.1, 1.5):
        with pytest.raises(ValueError, match="correlation"):
            NormPropMaxPool2d(2, correlation=bad)
    with pytest.raises(ValueError, match="gamma"):
        max_pool_moments(4, gamma=-1.0)
    with pytest.raises(ValueError, match="kernel_size"):
        NormPropAvgPool2d((2, 2, 2))


# -- borders


def test_border_variance_matches_simulation():
    layer = NormPropConv2d(8, 4, 3, padding=1, activation="identity")
    y = layer(gaussian(4000, 8, 4, 4))
    predicted = border_variance(layer, (4, 4))
    assert predicted.shape == (4, 4, 4)
    assert torch.allclose(y.var(0), predicted, atol=0.12)
    assert (predicted[:, 0, 0] < 0.8).all()
    assert predicted[:, 1:3, 1:3].allclose(torch.ones(4, 2, 2))


@pytest.mark.parametrize("kind", [NormPropConv2d, NormPropConvTranspose2d])
def test_exact_borders_have_unit_variance(kind):
    layer = kind(8, 4, 3, stride=2, padding=1, border="exact")
    x = gaussian(4000, 8, 5, 5)
    y = layer(x)
    assert (y.var(0) - 1).abs().max() < 0.2
    assert (y.mean(0)).abs().max() < 0.1
    assert torch.allclose(layer(x[0]), y[0], atol=1e-5)
    assert border_variance(layer, (5, 5)).std() > 0.1


def test_transposed_layers_have_unit_variance_on_average():
    layer = NormPropConvTranspose2d(16, 16, 4, 2, 1)
    y = layer(gaussian(200, 16, 8, 8))[:, :, 2:-2, 2:-2].detach()
    assert float(y.std()) == pytest.approx(1.0, abs=0.05)


def test_positions_that_see_only_padding():
    layer = NormPropConv2d(1, 2, 1, padding=1, border="exact")
    y = layer(gaussian(3, 1, 2, 2))
    assert y.isfinite().all()


def test_border_errors():
    with pytest.raises(ValueError, match="axes"):
        border_variance(NormPropLinear(2, 2), ())
    with pytest.raises(ValueError, match="2 axes"):
        border_variance(NormPropConv2d(2, 2, 3), (5,))


# -- the data layer


def test_global_input_statistics_are_exact_whatever_the_batches():
    data = gaussian(100, 3, 4, 4, dtype=torch.float64) * 5 + 100
    whole = NormPropInput((3, 4, 4), dtype=torch.float64).fit(data)
    parts = NormPropInput((3, 4, 4), dtype=torch.float64).fit((b, None) for b in data.split(7))
    assert torch.allclose(whole.mean, data.mean(0))
    assert torch.allclose(whole.var, data.var(0, correction=0))
    assert torch.allclose(parts.mean, whole.mean)
    assert torch.allclose(parts.var, whole.var)
    assert int(parts.samples) == 100
    y = whole(data)
    assert torch.allclose(y.mean(0), torch.zeros(3, 4, 4).double(), atol=1e-9)
    assert torch.allclose(y.std(0, correction=0), torch.ones(3, 4, 4).double(), atol=1e-4)
    assert torch.equal(whole(data[:1]), y[:1])


def test_per_channel_statistics():
    data = gaussian(50, 3, 4, 4) * 3 + 7
    layer = NormPropInput((3, 4, 4), per="channel").fit(data)
    assert torch.allclose(layer.mean, data.mean((0, 2, 3)), atol=1e-5)
    assert layer(data).std().item() == pytest.approx(1.0, abs=1e-3)
    batch = NormPropInput((3, 4, 4), "batch", per="channel")
    reference = nn.BatchNorm2d(3, affine=False)
    assert torch.allclose(batch(data), reference(data), atol=1e-5)
    assert torch.allclose(batch.eval()(data), reference.eval()(data), atol=1e-2)
    vector = NormPropInput(5, per="channel").fit(data[:, 0, 0, :1].expand(50, 5))
    assert vector(torch.zeros(2, 5)).shape == (2, 5)


def test_batch_input_normalization():
    layer = NormPropInput((2, 3), "batch", momentum=0.25, dtype=torch.float64)
    data = gaussian(64, 2, 3, dtype=torch.float64) * 2 + 3
    y = layer(data)
    assert torch.allclose(y.mean(0), torch.zeros(2, 3).double(), atol=1e-9)
    assert torch.allclose(y.var(0, correction=0), torch.ones(2, 3).double(), atol=1e-4)
    assert torch.allclose(layer.mean, 0.25 * data.mean(0))
    layer.eval()
    expected = (data - layer.mean) / (layer.var + layer.eps).sqrt()
    assert torch.allclose(layer(data), expected)
    assert torch.allclose(layer(data[:1]), expected[:1])


def test_input_errors_and_state():
    layer = NormPropInput((3, 4))
    with pytest.raises(RuntimeError, match="fit"):
        layer(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="no sample"):
        layer.fit([torch.zeros(0, 3, 4)])
    with pytest.raises(ValueError, match=r"\(N, 3, 4\)"):
        layer.fit(torch.zeros(2, 4, 3))
    with pytest.raises(ValueError, match="mode='global'"):
        NormPropInput((3, 4), "batch")(torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match="did you mean 'global'"):
        NormPropInput((3, 4), "globl")
    with pytest.raises(ValueError, match="per"):
        NormPropInput((3, 4), per="pixel")
    with pytest.raises(ValueError, match="momentum"):
        NormPropInput((3, 4), momentum=0.0)
    with pytest.raises(ValueError, match="shape"):
        NormPropInput(())
    layer.fit(gaussian(20, 3, 4))
    x = gaussian(2, 3, 4, seed=3)
    loaded = NormPropInput((3, 4))
    loaded.load_state_dict(layer.state_dict())
    for twin in (loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.fitted
        assert torch.equal(twin(x), layer(x))
    assert "fitted=True" in repr(layer)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
