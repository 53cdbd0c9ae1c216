"""Bounds from parameters alone hold for measured outputs, grow as the paper says, and can be attained."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flexnorm.nn import GroupNorm, make_norm
from flexnorm.shift import batch_norm_radius, layer_bound, second_moment_excess, unitized_radius, wasserstein

NORMS = ("batch", "population", "unitized")


def randomize(layer: nn.Module, g: torch.Generator) -> nn.Module:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    return layer


@given(
    st.sampled_from(NORMS),
    st.sampled_from(["paper", "rms"]),
    st.sampled_from(["position", "image"]),
    st.integers(0, 10**6),
    st.booleans(),
)
def test_measured_shift_is_below_the_bound(name: str, norm: str, samples: str, seed: int, training: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    options = {"norm": norm} if name == "unitized" else {}
    before, after = (randomize(make_norm(name, 3, **options), g).train(training) for _ in range(2))
    inputs = [torch.randn(5, 3, 2, 2, generator=g) * 3 + 1 for _ in range(2)]
    noises: list[Tensor] = []
    clouds = []
    for layer, x in zip((before, after), inputs, strict=True):
        y = layer(x).detach()
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        own = training and name != "population"
        used = (mean, var) if own else (layer.running_mean, layer.running_var)
        noises.append(second_moment_excess(mean, var, *used))
        if name == "population" and training:
            # The guard keeps the deviation used within a factor 3 of the batch, the mean within 2 deviations.
            noises[-1] = noises[-1].clamp_min(9 * 5)
        clouds.append((y.flatten(1) if samples == "image" else y.movedim(1, -1).reshape(-1, 3)).double())
    bound = layer_bound(before, after, noise=noises[0], noise_after=noises[1], positions=4, samples=samples)
    assert float(wasserstein(*clouds, "exact")) <= bound * (1 + 1e-5)


def test_batch_norm_grows_with_dimension_and_noise_and_the_unitized_layer_does_not() -> None:
    for d in (16, 64, 256, 1024):
        batch, unitized = make_norm("batch", d, ndim=1), make_norm("unitized", d, ndim=1)
        nn.init.ones_(unitized.alpha)
        assert layer_bound(batch) == pytest.approx(2 * math.sqrt(d))
        assert layer_bound(batch, noise=3.0) == pytest.approx(4 * math.sqrt(d))
        assert layer_bound(unitized) == layer_bound(unitized, noise=3.0) == pytest.approx(2)
        nn.init.zeros_(unitized.alpha)
        assert layer_bound(unitized) == pytest.approx(layer_bound(batch))


def test_the_unitized_bound_is_attained_by_opposite_points() -> None:
    layer = make_norm("unitized", 4, ndim=1, eps=1e-12)
    nn.init.ones_(layer.alpha)
    layer.eval()
    x = torch.full((6, 4), 2.0)
    with torch.no_grad():
        distance = wasserstein(layer(x), layer(-x), "exact")
    assert float(distance) == pytest.approx(layer_bound(layer), rel=1e-5)


def test_bias_moves_the_output_and_images_count_every_position() -> None:
    before, after = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    with torch.no_grad():
        after.bias += torch.tensor([3.0, 4.0])
    still = layer_bound(before)
    assert layer_bound(before, after) == pytest.approx(still + 5)
    assert layer_bound(before, after, positions=9, samples="image") == pytest.approx(3 * (still + 5))
    assert layer_bound(nn.BatchNorm2d(2, affine=False)) == still


def test_constrained_alpha_is_clamped() -> None:
    layer = make_norm("unitized", 4, ndim=1, constrain_alpha=True)
    nn.init.constant_(layer.alpha, 5.0)
    assert layer_bound(layer) == pytest.approx(2)


def test_noise_of_own_statistics_is_zero() -> None:
    mean, var = torch.randn(5), torch.rand(5) + 0.1
    assert second_moment_excess(mean, var, mean, var, eps=0.0).abs().max() < 1e-6
    assert second_moment_excess(mean, var, mean + 1, var, eps=0.0) == pytest.approx(1 / var)
    assert float(batch_norm_radius(torch.ones(4), torch.tensor([0.0, 3.0, 0.0, 0.0]))) == pytest.approx(math.sqrt(7))
    assert float(unitized_radius(torch.ones(4), torch.ones(4), positions=9, unit_norm="rms")) == pytest.approx(2)


def test_errors() -> None:
    with pytest.raises(TypeError, match="no bound is known for GroupNorm"):
        layer_bound(GroupNorm(1, 4))
    with pytest.raises(ValueError, match="at least -1"):
        batch_norm_radius(torch.ones(2), -2.0)


@pytest.mark.parametrize(
    "norm", ["mean_only", "variance_only", "renorm", "switchable", "batch_instance", "group", "none"]
)
def test_layers_that_do_not_standardize_have_no_bound(norm: str) -> None:
    with pytest.raises(TypeError, match="no bound is known"):
        layer_bound(make_norm(norm, 16))


def test_without_noise_nothing_is_claimed_of_running_statistics() -> None:
    """In evaluation the input may be anything: a finite bound from the parameters alone would be false."""
    from flexnorm.nn import BatchNorm1d, PopulationNorm1d

    before, after = nn.BatchNorm1d(4).eval(), nn.BatchNorm1d(4).eval()
    nn.init.constant_(after.weight, -1.0)
    assert layer_bound(before, after) == math.inf
    assert layer_bound(PopulationNorm1d(4)) == math.inf
    assert layer_bound(BatchNorm1d(4).freeze()) == math.inf
    assert layer_bound(BatchNorm1d(4)) == pytest.approx(4)
    assert layer_bound(before, after, noise=0.0) == pytest.approx(4)


def test_a_batch_norm_with_a_forward_of_its_own_has_no_bound_from_its_parameters() -> None:
    class Activated(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return 10 * super().forward(x)

    with pytest.raises(TypeError, match="no bound is known for Activated"):
        layer_bound(Activated(3), positions=4)


def test_a_subclass_with_a_rule_of_its_own_has_no_bound():
    from flexnorm.nn import BatchNorm2d

    class Doubled(BatchNorm2d):
        def rule(self, moments):
            scale, shift = super().rule(moments)
            return 2 * scale, 2 * shift

    assert layer_bound(BatchNorm2d(4)) > 0
    with pytest.raises(TypeError, match="no bound is known for Doubled"):
        layer_bound(Doubled(4))
