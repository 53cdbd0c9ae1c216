"""The formulas of generalization against trained students, and what the printed ones leave out."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexnorm.lab import simulations
from flexnorm.theory import generalization as gen

NOISE = 0.25


def agrees(simulated, value, systematic=0.02):
    """Within three standard errors and a finite-size allowance of 2 percent (it falls as 1/N; N is 256)."""
    return abs(simulated.error - value) < 3 * simulated.standard_error + systematic * value


@pytest.mark.parametrize("noise", [0.0, NOISE])
@pytest.mark.parametrize("alpha", [0.3, 0.6, 1.5, 3.0])
def test_sgd_linear(alpha, noise):
    got = simulations.train_students("sgd", alpha, noise, runs=10)
    assert agrees(got, gen.sgd_linear(alpha, noise)) or got.error < 1e-12 > gen.sgd_linear(alpha, noise)
    if alpha < 1:
        assert got.training_loss < 1e-12


@pytest.mark.parametrize("zeta", [1 / 64, 0.25])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_gamma_decay_linear(alpha, zeta):
    got = simulations.train_students("gamma_decay", alpha, NOISE, zeta=zeta, runs=12)
    ridge = gen.ridge_strength(zeta, alpha)
    assert agrees(got, gen.gamma_decay_linear(alpha, ridge, NOISE))


def test_the_two_conventions_of_zeta_are_told_apart_by_simulation():
    alpha, zeta = 3.0, 0.25
    got = simulations.train_students("gamma_decay", alpha, NOISE, zeta=zeta, runs=12)
    assert not agrees(got, gen.gamma_decay_linear(alpha, zeta, NOISE))
    assert agrees(got, gen.gamma_decay_linear(alpha, alpha * zeta, NOISE))


def test_weight_normalization_with_gamma_decay_is_ridge_regression():
    """Descent in (gamma, w) of mean (y - sqrt(N) gamma w^T x / ||w||)^2 + zeta gamma^2 ends at the solved student."""
    rng = np.random.default_rng(0)
    N, alpha, zeta = 40, 2.0, 0.1
    x, y, _ = simulations.training_set(alpha, NOISE, N, rng)
    w, gamma = rng.standard_normal(N), 1.0
    for _ in range(4000):
        norm = np.linalg.norm(w)
        u = np.sqrt(N) * (x @ w) / norm
        gap = 2 * (gamma * u - y) / len(y)
        pull = np.sqrt(N) * gamma * (x.T @ gap) / norm
        gamma, w = gamma - 0.05 * (gap @ u + 2 * zeta * gamma), w - 0.05 * N * (pull - w * (w @ pull) / norm**2)
    ridge = np.linalg.solve(x.T @ x + gen.ridge_strength(zeta, alpha) * np.eye(N), x.T @ y)
    np.testing.assert_allclose(np.sqrt(N) * gamma * w / np.linalg.norm(w), ridge, atol=1e-6)


@given(st.floats(0.05, 5.0), st.floats(1e-3, 3.0))
@settings(deadline=None, max_examples=40, derandomize=True)
def test_resolvent_solves_its_equation(alpha, zeta):
    g = gen.resolvent(alpha, zeta)
    # Marchenko-Pastur in its implicit form: 1/G = zeta + alpha / (1 + G)
    assert 1 / g == pytest.approx(zeta + alpha / (1 + g), rel=1e-8)


@given(st.floats(0.05, 5.0), st.floats(0.01, 2.0))
@settings(deadline=None, max_examples=40, derandomize=True)
def test_error_uses_the_derivatives_of_g_and_the_optimum_is_the_noise(alpha, noise):
    zeta, h = 0.3, 1e-5

    def slope(f):
        return (f(zeta + h) - f(zeta - h)) / (2 * h)

    numeric = noise * slope(lambda z: z * gen.resolvent(alpha, z)) - zeta**2 * slope(lambda z: gen.resolvent(alpha, z))
    assert gen.gamma_decay_linear(alpha, zeta, noise) == pytest.approx(numeric, rel=1e-5)
    best = gen.gamma_decay_linear(alpha, gen.optimum(noise), noise)
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert gen.gamma_decay_linear(alpha, factor * noise, noise) > best


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_no_decay_is_the_limit(alpha):
    assert gen.gamma_decay_linear(alpha, 1e-7, NOISE) == pytest.approx(gen.sgd_linear(alpha, NOISE), rel=1e-4)


def test_printed_relu_formula_is_regression_on_the_positive_labels():
    for alpha in (0.5, 1.0, 1.5, 2.5):
        got = simulations.train_students("positive", alpha, NOISE, runs=12)
        # beyond alpha = 2 the same reasoning gives half the linear student's error on alpha/2, which is not printed
        expected = gen.sgd_relu(alpha, NOISE) if alpha < 2 else 0.5 + 0.5 * gen.sgd_linear(alpha / 2, NOISE)
        assert agrees(got, expected)


@pytest.mark.slow
def test_trained_relu_student_is_better_than_printed_and_does_not_diverge():
    for alpha in (1.0, 1.9):
        got = simulations.train_students("sgd", alpha, NOISE, activation="relu", runs=6)
        assert got.error < gen.sgd_relu(alpha, NOISE) - 3 * got.standard_error
    peak = simulations.train_students("sgd", 2.0, NOISE, activation="relu", runs=4)
    assert peak.error < 1.5
    assert gen.sgd_relu(2.0, NOISE) == math.inf
    assert gen.sgd_relu(2.0) == 0.5


@pytest.mark.quick(1)
@pytest.mark.parametrize("alpha", [0.5, 2.0, 3.0])
def test_linear_bn_falls_near_the_curve_at_a_moderate_length_of_training(alpha):
    """Away from alpha = 1, 300 passes: BN and WN + gamma decay agree within 10 percent on the same training sets."""
    bn = simulations.train_students("batchnorm", alpha, NOISE, batch_size=32, epochs=300, runs=4)
    decay = simulations.train_students("gamma_decay", alpha, NOISE, zeta=1 / 64, runs=4)
    gaps = np.array(bn.errors) - np.array(decay.errors)
    assert abs(gaps.mean()) < 3 * gaps.std(ddof=1) / 2 + 0.1 * decay.error


@pytest.mark.quick(1)
@pytest.mark.parametrize("alpha", [0.5, 1.5, 2.5])
def test_relu_bn_falls_near_the_curve_at_a_moderate_length_of_training(alpha):
    bn = simulations.train_students("batchnorm", alpha, NOISE, activation="relu", batch_size=16, epochs=300, runs=4)
    decay = simulations.train_students("gamma_decay", alpha, NOISE, activation="relu", zeta=1 / 64, epochs=100, runs=4)
    gaps = np.array(bn.errors) - np.array(decay.errors)
    assert abs(gaps.mean()) < 3 * gaps.std(ddof=1) / 2 + 0.1 * decay.error


def test_linear_bn_trained_to_the_end_is_shrunken_least_squares_and_no_ridge():
    """The loss of linear BN sees of the direction only its correlation with the labels: it ends at s times OLS."""
    alpha, size, N, runs = 1.5, 16, 64, 3
    bn = simulations.train_students("batchnorm", alpha, NOISE, batch_size=size, epochs=1500, N=N, runs=runs)
    decay = simulations.train_students("gamma_decay", alpha, NOISE, zeta=1 / (2 * size), N=N, runs=runs)
    s = math.sqrt(2 / size) * math.exp(math.lgamma(size / 2) - math.lgamma((size - 1) / 2))  # E[sigma_B] / sigma
    for run, error in enumerate(bn.errors):
        x, y, teacher = simulations.training_set(alpha, NOISE, N, np.random.default_rng([0, run]))
        weight = s * np.linalg.lstsq(x - x.mean(0), y - y.mean(), rcond=None)[0]
        assert error == pytest.approx(simulations.generalization_error(weight, teacher), rel=0.1)
    assert bn.error > 1.2 * decay.error


def test_error_in_closed_form_against_sampling():
    rng = np.random.default_rng(0)
    N = 20
    w, teacher = rng.standard_normal((2, N))
    x = rng.standard_normal((400_000, N)) / np.sqrt(N)
    for activation, g in (("identity", lambda h: h), ("relu", lambda h: np.maximum(h, 0))):
        for bias in (-0.4, 0.0, 0.7):
            gaps = (x @ teacher - g(x @ w + bias)) ** 2
            error = gaps.std() / math.sqrt(len(x))
            assert abs(simulations.generalization_error(w, teacher, activation, bias) - gaps.mean()) < 4 * error
    assert simulations.generalization_error(0 * w, teacher, "relu") == pytest.approx(teacher @ teacher / N)


def test_a_single_run_has_no_standard_error():
    assert math.isnan(simulations.train_students("sgd", 0.5, N=16, runs=1).standard_error)
    assert gen.sgd_linear(1.0, NOISE) == math.inf
    assert gen.sgd_linear(1.0) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gen.sgd_linear(0.0), "positive, got 0.0"),
        (lambda: gen.sgd_relu(0.5, -1.0), "got -1.0"),
        (lambda: gen.resolvent(1.0, 0.0), "zeta must be positive, got 0.0"),
        (lambda: simulations.train_students("batch", 1.0), "did you mean 'batchnorm'"),
        (lambda: simulations.train_students("sgd", 1.0, activation="tanh"), "Valid: identity, relu"),
        (lambda: simulations.train_students("sgd", 1.0, runs=0), "runs=0"),
        (lambda: simulations.train_students("batchnorm", 0.1, N=100), "between 2 and the 10 samples, got 32"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
