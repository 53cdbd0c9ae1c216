"""Constants and gains against scipy's adaptive integration, closed forms and their own definitions."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate
from scipy.stats import norm
from torch import nn

from flexnorm.nn.normprop import ACTIVATIONS, Activation, activation_gains, activation_moments
from flexnorm.nn.normprop.elementwise import resolve_activation
from flexnorm.nn.normprop.integrals import gaussian_nodes, plain_tables, rectifier_tables

SMOOTH_AND_KINKED = sorted(ACTIVATIONS)
POINTS = [(1.0, 0.0), (1.0, 0.5), (0.3, -0.8), (2.0, 1.0), (-1.5, 0.7), (0.01, 0.4)]


def scipy_expectation(f, breaks=()):
    """E[f(Z)] by adaptive quadrature, split at the kinks."""
    edges = sorted({-10.0, 10.0, *[b for b in breaks if -10 < b < 10]})
    return sum(
        integrate.quad(lambda z: f(z) * norm.pdf(z), a, b, epsabs=1e-13, epsrel=1e-12, limit=200)[0]
        for a, b in itertools.pairwise(edges)
    )


def scalar(activation):
    return lambda u: float(activation(torch.tensor(u, dtype=torch.float64)))


def breaks(activation, gamma, beta):
    kinks = (0.0,) if activation.homogeneous else activation.kinks
    return [(k - beta) / gamma for k in kinks]


@pytest.mark.quick(30)
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("name", SMOOTH_AND_KINKED)
def test_moments_match_adaptive_integration(name, point):
    gamma, beta = point
    activation = ACTIVATIONS[name]
    f, cut = scalar(activation), breaks(activation, gamma, beta)
    mean = scipy_expectation(lambda z: f(gamma * z + beta), cut)
    var = scipy_expectation(lambda z: (f(gamma * z + beta) - mean) ** 2, cut)
    got = activation_moments(name, gamma, beta)
    assert float(got.mean) == pytest.approx(mean, abs=1e-11)
    assert float(got.var) == pytest.approx(var, rel=1e-8)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "gelu", "silu", "tanh", "elu", "hardtanh"])
def test_gains_match_their_definitions(name):
    """chi by differentiating the mean square with respect to the sample's variance; the others from the derivative."""
    activation = ACTIVATIONS[name]
    f = scalar(activation)
    gamma, beta, step = 1.3, 0.4, 1e-3
    cut = breaks(activation, gamma, beta)
    mean = scipy_expectation(lambda z: f(gamma * z + beta), cut)
    var = scipy_expectation(lambda z: (f(gamma * z + beta) - mean) ** 2, cut)

    def mean_square(q):
        g = gamma * math.sqrt(q)
        return scipy_expectation(lambda z: (f(g * z + beta) - mean) ** 2, breaks(activation, g, beta))

    def slope(z):
        u = torch.tensor(gamma * z + beta, dtype=torch.float64, requires_grad=True)
        return gamma * float(torch.autograd.grad(activation(u), u)[0])

    got = activation_gains(name, gamma, beta)
    assert float(got.chi) == pytest.approx((mean_square(1 + step) - mean_square(1 - step)) / (2 * step * var), abs=1e-5)
    assert float(got.jacobian) == pytest.approx(scipy_expectation(lambda z: slope(z) ** 2, cut) / var, abs=1e-8)
    assert float(got.correlation) == pytest.approx(scipy_expectation(slope, cut) ** 2 / var, abs=1e-8)


def test_constants_of_the_paper():
    mean, var = activation_moments("relu")
    assert float(mean) == pytest.approx(1 / math.sqrt(2 * math.pi), abs=1e-15)
    assert float(var) == pytest.approx(0.5 * (1 - 1 / math.pi), abs=1e-15)
    gains = activation_gains("relu")
    assert float(gains.jacobian) ** 0.5 == pytest.approx(1.2112, abs=1e-4)
    assert float(gains.chi) == pytest.approx(1.0, abs=1e-12)
    for a in (0.0, 0.1, 0.25, 0.9):
        mean, var = activation_moments("prelu", 1.0, 0.0, slope=torch.tensor(a, dtype=torch.float64))
        assert float(mean) == pytest.approx((1 - a) / math.sqrt(2 * math.pi))
        assert float(var) == pytest.approx(0.5 * ((1 + a * a) - (1 - a) ** 2 / math.pi))


@pytest.mark.parametrize(("r", "chi"), [(-2.0, 3.91), (-1.0, 2.02), (0.5, 0.81), (1.0, 0.77)])
def test_chi_of_relu(r, chi):
    assert float(activation_gains("relu", 1.0, r).chi) == pytest.approx(chi, abs=0.01)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(s=st.floats(0.01, 10), gamma=st.floats(-4, 4), beta=st.floats(-4, 4))
def test_rectifiers_are_homogeneous(s, gamma, beta):
    one = activation_moments("leaky_relu", gamma, beta)
    scaled = activation_moments("leaky_relu", s * gamma, s * beta)
    assert float(scaled.mean) == pytest.approx(s * float(one.mean), rel=1e-9, abs=1e-12)
    assert float(scaled.var) == pytest.approx(s * s * float(one.var), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "prelu", "gelu", "elu", "hardtanh", "tanh"])
def test_gradients_and_second_gradients(name):
    gamma = torch.tensor([0.7, -1.2, 2.0, 1.0], dtype=torch.float64, requires_grad=True)
    beta = torch.tensor([0.3, 0.4, -1.1, 0.0], dtype=torch.float64, requires_grad=True)
    inputs = (gamma, beta)
    if name == "prelu":
        inputs = (*inputs, torch.tensor([0.25], dtype=torch.float64, requires_grad=True))

    def function(g, b, slope=None):
        return tuple(activation_moments(name, g, b, slope=slope))

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    if name in ("relu", "gelu", "elu"):
        assert torch.autograd.gradcheck(lambda g, b: tuple(activation_gains(name, g, b)), (gamma, beta))


def test_relu_stays_accurate_in_float32_at_both_ends():
    """The variance relative to float64: a linear unit (r large), and a nearly dead one (r = -6)."""
    r = torch.tensor([-6.0, -4.0, -2.0, 0.0, 3.0, 30.0, 1e4])
    single = activation_moments("relu", torch.ones(7), r).var.double()
    double = activation_moments("relu", torch.ones(7, dtype=torch.float64), r.double()).var
    assert torch.allclose(single, double, rtol=1e-6, atol=0)
    assert double[-1] == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("name", SMOOTH_AND_KINKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_everywhere(name, dtype):
    gamma = torch.tensor([0.0, 0.0, 0.0, 1e-30, -1e-8, 1e-3, 50.0, -50.0, 1.0, 1.0], dtype=dtype, requires_grad=True)
    beta = torch.tensor([0.0, 1.0, -1.0, 0.5, 0.5, 30.0, -300.0, 300.0, 1e4, -1e4], dtype=dtype, requires_grad=True)
    mean, var = activation_moments(name, gamma, beta)
    assert mean.isfinite().all()
    assert var.isfinite().all()
    assert (var >= 0).all()
    for grad in torch.autograd.grad(mean.sum() + var.sum(), (gamma, beta)):
        assert grad.isfinite().all()


def test_zero_gamma_has_the_limits():
    zero = torch.zeros(3, dtype=torch.float64)
    mean, var = activation_moments("relu", zero, torch.tensor([-2.0, 0.0, 2.0], dtype=torch.float64))
    assert torch.equal(mean, torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64))
    assert torch.equal(var, zero)


def test_half_precision_parameters_are_computed_in_float32():
    assert activation_moments("relu", torch.ones(3, dtype=torch.bfloat16)).mean.dtype == torch.float32
    assert activation_moments("gelu", torch.ones(3, dtype=torch.float16)).var.dtype == torch.float32


def test_user_functions_and_modules():
    expected = activation_moments("elu", 1.2, 0.1)
    for given_as in (nn.ELU(), F.elu, Activation("mine", F.elu, kinks=(0.0,)), lambda u: F.elu(u)):
        got = activation_moments(given_as, 1.2, 0.1)
        assert float(got.var) == pytest.approx(float(expected.var), abs=1e-5)
    leaky = activation_moments(nn.LeakyReLU(0.3), 1.2, 0.1)
    prelu = activation_moments(nn.PReLU(init=0.3), 1.2, 0.1)
    assert float(leaky.var) == pytest.approx(float(prelu.var))
    # A kink that nobody declared costs little.
    hidden = activation_moments(lambda u: F.relu(u), 1.0, 0.3)
    exact = activation_moments("relu", 1.0, 0.3)
    assert float(hidden.var) == pytest.approx(float(exact.var), rel=2e-3)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.ReLU(), "relu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (nn.GELU(), "gelu"),
        (nn.SiLU(), "silu"),
        (nn.Identity(), "identity"),
        (nn.CELU(1.5), "celu"),
        (nn.Hardtanh(-2, 3), "hardtanh"),
        (nn.Softplus(2.0), "softplus"),
        (nn.Softsign(), "softsign"),
    ],
)
def test_modules_keep_their_settings(module, name):
    activation = resolve_activation(module)
    u = torch.linspace(-4, 4, 33)
    assert activation.name == name
    assert torch.equal(activation(u), module(u))


def test_quadrature_integrates_moments_exactly():
    gamma, beta = torch.tensor([1.0, 2.0]).double(), torch.tensor([0.3, -9.0]).double()
    for kinks in ((), (0.0,), (-1.0, 1.0)):
        z, w = gaussian_nodes(gamma, beta, kinks)
        for power, moment in ((0, 1.0), (1, 0.0), (2, 1.0), (4, 3.0), (6, 15.0)):
            value = (z**power * w).sum(-1)
            assert np.allclose(value, moment, atol=1e-11)


def test_bad_arguments():
    with pytest.raises(ValueError, match="did you mean 'relu'"):
        activation_moments("rellu")
    with pytest.raises(ValueError, match="identity"):
        activation_moments(None)
    with pytest.raises(TypeError, match="floating point"):
        activation_moments("relu", torch.ones(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="activation must be"):
        activation_moments(3.0)
    with pytest.raises(TypeError, match="parameters or buffers"):
        activation_moments(nn.Linear(1, 1))


@pytest.mark.parametrize("a", [0.0, 0.2])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_tables_of_a_rectifier_in_one_node_equal_the_plain_expression(a, eps):
    gamma = torch.tensor([0.7, -1.2, 2.0, 1.0, 0.3], dtype=torch.float64, requires_grad=True)
    beta = torch.tensor([0.3, 0.4, -1.1, 0.0, -0.9], dtype=torch.float64, requires_grad=True)
    for fast, plain in zip(rectifier_tables(gamma, beta, a, eps), plain_tables(gamma, beta, a, eps), strict=True):
        assert torch.allclose(fast, plain, atol=1e-12)
    assert torch.autograd.gradcheck(lambda g, b: rectifier_tables(g, b, a, eps), (gamma, beta), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda g, b: rectifier_tables(g, b, a, eps), (gamma, beta))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tables_are_finite_at_the_extremes(dtype):
    gamma = torch.tensor([0.0, 0.0, 1e-30, 1.0, 1.0, -50.0], dtype=dtype, requires_grad=True)
    beta = torch.tensor([0.0, -1.0, 0.5, 1e4, -1e4, 3.0], dtype=dtype, requires_grad=True)
    tables = rectifier_tables(gamma, beta, 0.0, 1e-5)
    grads = torch.autograd.grad(sum(t.sum() for t in tables), (gamma, beta))
    assert all(t.isfinite().all() for t in (*tables, *grads))
    assert grads[0].dtype == dtype
