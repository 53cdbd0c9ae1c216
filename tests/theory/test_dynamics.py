"""The equations of motion against closed forms, quadrature, finite differences and the online SGD they describe."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexnorm.lab import simulations
from flexnorm.theory import dynamics
from flexnorm.theory.dynamics import Student

STUDENTS = [("bn", 0.125), ("wn", 0.0), ("sgd", 0.0)]
gammas = st.floats(0.1, 2.0)
overlaps = st.floats(-0.99, 1.0)


def monte_carlo(gamma, R, g, slope, n=2_000_000):
    rng = np.random.default_rng(1)
    a, z = rng.standard_normal((2, n))
    u, v = gamma * a, R * a + math.sqrt(1 - R * R) * z
    delta = slope(u) * (g(v) - g(u))
    samples = (delta * u, delta**2, delta * v, (g(v) - g(u)) ** 2)
    return [(s.mean(), s.std() / math.sqrt(n)) for s in samples]


@pytest.mark.parametrize(("gamma", "R"), [(0.7, 0.3), (1.3, -0.6), (1.0, 0.95)])
@pytest.mark.parametrize(
    ("name", "g", "slope"),
    [
        ("identity", lambda x: x, np.ones_like),
        ("relu", lambda x: np.maximum(x, 0), lambda x: (x > 0).astype(float)),
        ("tanh", np.tanh, lambda x: 1 - np.tanh(x) ** 2),
    ],
)
def test_averages_agree_with_sampling(name, g, slope, gamma, R):
    got = dynamics.averages(gamma, R, name)
    for value, (mean, error) in zip((got.i1, got.i2, got.i3, got.error), monte_carlo(gamma, R, g, slope), strict=True):
        assert abs(value - mean) < 4 * error


@given(gammas, overlaps)
@settings(deadline=None, max_examples=25, derandomize=True)
def test_quadrature_reproduces_the_closed_form(gamma, R):
    closed = dynamics.averages(gamma, R, "identity")
    quadrature = dynamics.averages(gamma, R, lambda x: x * 1.0)
    assert closed.i1 == pytest.approx(quadrature.i1, abs=1e-10)
    assert closed.i2 == pytest.approx(quadrature.i2, abs=1e-10)
    assert closed.i3 == pytest.approx(quadrature.i3, abs=1e-10)


def test_a_custom_function_equals_its_name():
    assert dynamics.averages(0.8, 0.4, torch.tanh) == dynamics.averages(0.8, 0.4, "tanh")


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["identity", "relu", "erf", "softplus"])
@pytest.mark.parametrize(("method", "zeta"), STUDENTS)
def test_ode_and_online_sgd_agree_within_three_standard_errors(method, zeta, activation):
    student = Student(method, activation, lr=0.5, zeta=zeta, gamma0=0.5, R0=0.2)
    times = [0, 1, 2, 4, 8]
    theory = dynamics.solve(student, times=times)
    runs = simulations.online_sgd(student, times=times, N=500, runs=16, seed=3)
    assert not theory.diverged
    assert not runs.diverged
    for name in ("gamma", "R", "L", "error"):
        gap = np.abs(getattr(theory, name) - getattr(runs, name))[1:]
        assert np.all(gap < 3 * runs.standard_error[name][1:]), (name, gap / runs.standard_error[name][1:])


def test_the_comparison_can_fail():
    times = [0, 1, 2, 4, 8]
    theory = dynamics.solve(Student("bn", "relu", 0.5, 0.125, gamma0=0.5, R0=0.2), times=times)
    runs = simulations.online_sgd(Student("bn", "relu", 0.5, 0.25, gamma0=0.5, R0=0.2), times=times, N=500, runs=16)
    assert np.max(np.abs(theory.gamma - runs.gamma)[1:] / runs.standard_error["gamma"][1:]) > 3


@pytest.mark.parametrize("zeta", [0.0, 1 / 64, 0.1, 0.5])
@pytest.mark.parametrize(
    ("activation", "expected"), [("relu", lambda z: 1 / (2 * z + 1)), ("identity", lambda z: 1 / (z + 1))]
)
def test_fixed_point_of_gamma(zeta, activation, expected):
    student = Student("bn", activation, 0.3, zeta, R0=0.5)
    point = student.fixed_point()
    assert point.gamma == pytest.approx(expected(zeta), abs=1e-14)
    assert student.rates([point.gamma, 1.0, 1.0])[0] == pytest.approx(0, abs=1e-14)
    assert (point.drift > 0) == (zeta > 0)
    path = dynamics.solve(student, times=600.0)
    assert path.gamma[-1] == pytest.approx(expected(zeta), abs=0.01)
    assert path.R[-1] > 0.99


def test_fixed_point_without_closed_form():
    student = Student("bn", "tanh", 0.3, 0.1)
    assert student.rates([student.fixed_point().gamma, 1.0, 1.0])[0] == pytest.approx(0, abs=1e-12)
    assert Student("sgd", "tanh").fixed_point(L=3.0) == dynamics.FixedPoint(1.0, 1.0, 1.0, 0.0)
    assert Student("bn", lambda x: x**2, zeta=1.5).fixed_point().gamma == pytest.approx(0.75**0.5)
    with pytest.raises(ValueError, match="decays to zero"):
        Student("bn", lambda x: x**2, zeta=6.5).fixed_point()  # pull 6 gamma (1 - gamma^2), decay 6.5 gamma


@pytest.mark.parametrize("activation", ["identity", "relu", "erf"])
@pytest.mark.parametrize(("method", "zeta"), STUDENTS)
def test_jacobian_against_finite_differences(method, zeta, activation):
    L, h = 1.3, 1e-6
    student = Student(method, activation, 0.5, zeta)
    point, f = student.fixed_point(L), student.rates
    x = np.array([point.gamma, 1.0, point.L])
    columns = [(f(x + h * e) - f(x - h * e)) / (2 * h) for e in np.eye(3)]
    columns[1] = (3 * f(x) - 4 * f(x - h * np.eye(3)[1]) + f(x - 2 * h * np.eye(3)[1])) / (2 * h)
    numeric = np.stack(columns, axis=1)
    if method == "sgd":
        numeric = numeric[1:, 1:]
    # The ReLU kernels are not smooth at R = 1: the difference quotient errs by sqrt(h) there.
    tolerance = 3e-4 if activation == "relu" else 1e-7
    np.testing.assert_allclose(student.jacobian(L), numeric, atol=tolerance)
    values = student.eigenvalues(L)
    assert np.all(np.diff(values.real) >= 0)
    assert np.sum(values) == pytest.approx(np.trace(numeric), abs=3 * tolerance)


@pytest.mark.parametrize("activation", ["identity", "relu", "erf"])
@pytest.mark.parametrize("method", ["bn", "wn", "sgd"])
def test_printed_eigenvalue_is_exact_without_decay(method, activation):
    student = Student(method, activation, 0.7)
    values, printed = student.eigenvalues(), student.printed_eigenvalue()
    assert np.min(np.abs(values - printed)) < 1e-6


@pytest.mark.parametrize("zeta", [0.01, 0.1])
def test_printed_eigenvalue_lacks_a_term_of_second_order(zeta):
    lr, L = 0.7, 1.2
    student = Student("bn", "relu", lr, zeta)
    entry = student.jacobian(L)[1, 1]
    gamma = 1 / (1 + 2 * zeta)
    missing = lr**2 * gamma**2 / (2 * L**4) * (1 - gamma) ** 2 / 2
    assert student.printed_eigenvalue(L) - missing == pytest.approx(entry, rel=1e-12)


@pytest.mark.parametrize("zeta", [0.0, 1 / 128, 1 / 64, 0.25])
def test_max_learning_rates(zeta):
    assert Student("wn", "relu").max_learning_rate() == pytest.approx(2)
    assert Student("sgd", "relu").max_learning_rate() == pytest.approx(2)
    bn = Student("bn", "relu", zeta=zeta).max_learning_rate()
    assert bn == pytest.approx(2 + 4 * zeta)
    assert bn >= Student("wn", "relu").max_learning_rate() + 2 * zeta  # Prop. 4
    assert Student("bn", "identity", zeta=zeta).max_learning_rate() == pytest.approx(2 + 2 * zeta)


def test_effective_learning_rates():
    assert Student("bn", lr=0.6).effective_learning_rate(0.5, 2.0) == pytest.approx(0.6 * 0.5 / 4)
    assert Student("wn", lr=0.6).effective_learning_rate(0.5, 2.0) == pytest.approx(0.15)
    assert Student("sgd", lr=0.6).effective_learning_rate(0.5, 2.0) == pytest.approx(0.6)
    path = dynamics.solve(Student("bn", lr=0.6, zeta=0.1, gamma0=0.5, L0=2.0))
    assert path.effective_lr[0] == pytest.approx(0.075)
    assert np.all(np.diff(path.L) > 0)  # decay keeps the noise of the steps alive, so L grows and the rate tunes itself


@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_sgd_diverges_above_the_bound_and_not_below_it(activation):
    bound = Student("sgd", activation).max_learning_rate()
    slow, fast = (Student("sgd", activation, factor * bound, R0=0.9) for factor in (0.75, 1.5))
    times = np.linspace(0, 60, 7)
    below = simulations.online_sgd(slow, N=200, runs=4, times=times)
    above = simulations.online_sgd(fast, N=200, runs=4, times=times)
    assert not below.diverged
    assert below.error[-1] < 1e-3
    assert above.diverged
    assert np.isnan(above.error[-1])
    assert not dynamics.solve(slow, times=times).diverged
    assert dynamics.solve(fast, times=times).diverged


@pytest.mark.quick(1)
@pytest.mark.parametrize(("method", "zeta"), [("wn", 0.0), ("bn", 0.125)])
def test_normalized_students_leave_above_the_bound_and_return_by_themselves(method, zeta):
    student = Student(method, "relu", zeta=zeta)
    gamma, bound = student.fixed_point().gamma, student.max_learning_rate()
    lr = 1.6 * bound / (gamma if method == "bn" else 1)  # at L = 1 the effective rate is 1.6 times the bound
    start, times = {"gamma0": gamma, "R0": 0.95}, [0, 0.25, 20.0]
    runs = simulations.online_sgd(Student(method, "relu", lr, zeta, **start), N=500, runs=8, times=times)
    assert runs.R[1] < 0.95 - 3 * runs.standard_error["R"][1]
    assert runs.effective_lr[2] < bound
    assert runs.R[2] > 0.95
    slow = simulations.online_sgd(Student(method, "relu", 0.3 * lr, zeta, **start), N=500, runs=8, times=times)
    assert slow.R[1] > 0.95 + 3 * slow.standard_error["R"][1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "bm"}, "did you mean 'bn'"),
        ({"activation": "rleu"}, "did you mean 'relu'"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"zeta": -1.0}, "must not be negative"),
        ({"method": "wn", "zeta": 0.1}, "has none, got zeta=0.1"),
        ({"times": [1, 2]}, "ascend from 0"),
        ({"times": [0, 2, 1]}, "ascend from 0"),
        ({"gamma0": 0.0}, "gamma0=0.0"),
        ({"R0": -1.0}, "R0=-1.0"),
    ],
)
@pytest.mark.parametrize("function", [dynamics.solve, simulations.online_sgd])
def test_errors_name_the_value(function, arguments, message):
    who = {name: value for name, value in arguments.items() if name != "times"}
    with pytest.raises(ValueError, match=message):
        function(Student(**who), times=arguments.get("times", 1.0))


def test_other_errors():
    with pytest.raises(ValueError, match="runs=1"):
        simulations.online_sgd(Student(), runs=1)
    with pytest.raises(TypeError, match="got int"):
        dynamics.averages(1.0, 1.0, 3)
    assert "relu" in dynamics.ACTIVATIONS
    assert dynamics.METHODS == ("bn", "wn", "sgd")


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("scipy.integrate", lambda: dynamics.solve(Student(), times=1.0)),
        ("scipy.optimize", lambda: Student("bn", "tanh", zeta=0.1).fixed_point()),
    ],
)
def test_what_needs_scipy_says_so(monkeypatch, module, call):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs {module}: pip install 'flexnorm\[lab\]'"):
        call()
