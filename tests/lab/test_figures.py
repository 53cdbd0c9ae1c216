"""The figures: their data are those of the formulas and simulations, and plots come out."""

import json
import math

import pytest

from flexnorm.lab import figures
from flexnorm.theory import dynamics, generalization, regularization


def curve(figure, label):
    return next(c for c in figure.curves if c.label == label)


def test_figure_1a_holds_the_formulas_and_the_students():
    figure = figures.figure_1a(alphas=(0.5, 1.0, 2.0), N=48, runs=2, epochs=(5,), batch_size=8)
    line = curve(figure, "WN + gamma decay 1/(2M)")
    for alpha, value in zip(line.x[::40], line.y[::40], strict=True):
        assert value == generalization.gamma_decay_linear(alpha, alpha / 16, 0.25)
    optimal = curve(figure, "optimal decay")
    assert all(a <= b for a, b in zip(optimal.y, line.y, strict=True))
    points = curve(figure, "BN, M=8, 5 epochs")
    assert points.points
    assert points.x == (0.5, 1.0, 2.0)
    direct = generalization.simulate("batchnorm", 2.0, 0.25, N=48, runs=2, epochs=5, batch_size=8)
    assert points.y[2] == direct.error
    assert points.error[2] == direct.standard_error
    assert curve(figure, "SGD, simulated").x == (0.5, 2.0)  # not where it diverges
    json.dumps(figure.asdict())


def test_figure_1b_holds_the_formula_and_the_students():
    figure = figures.figure_1b(alphas=(0.5, 2.5), N=48, runs=2, epochs=(5,), batch_size=8)
    line = curve(figure, "SGD, as printed")
    assert line.y[-1] == generalization.sgd_relu(line.x[-1], 0.25)
    assert curve(figure, "regression on positive labels, simulated").x == (0.5,)
    assert len(figure.curves) == 5


def test_dynamics_figure():
    figure = figures.dynamics_figure(times=2.0, N=50, runs=3)
    assert [c.label for c in figure.curves[:2]] == ["BN", "BN, simulated"]
    path = dynamics.solve(dynamics.Student("sgd", "relu", 0.5), times=2.0)
    assert curve(figure, "SGD").y == tuple(path.error.tolist())
    points = curve(figure, "SGD, simulated")
    assert len(points.x) == len(points.error) == 11
    rates = figures.dynamics_figure(times=2.0, N=50, runs=3, quantity="effective_lr")
    assert rates.curves[1].error == ()
    with pytest.raises(ValueError, match="did you mean 'gamma'"):
        figures.dynamics_figure(quantity="gama")


def test_regularization_figure():
    figure = figures.regularization_figure(batch_sizes=(16, 64), samples=64_000)
    line = curve(figure, "linear: zeta gamma^2")
    assert line.y[0] == pytest.approx(0.75 / 16, rel=0.02)
    assert line.y[0] == pytest.approx(4 * line.y[1])
    own = curve(figure, "ReLU: with the first-order term of own batches")
    simulated = curve(figure, "ReLU: simulated, own statistics")
    for value, mean, error, size in zip(own.y, simulated.y, simulated.error, own.x, strict=True):
        assert abs(value - mean) < 4 * error + 1.5 / size**2
    assert regularization.zeta(regularization.Curvature(1, 1), regularization.statistics_noise(16)) == 0.75 / 16


def test_every_named_figure_is_a_function():
    assert set(figures.FIGURES) == {"1a", "1b", "dynamics", "regularization"}


@pytest.mark.parametrize("log", ["", "xy"])
def test_plot_writes_a_file(tmp_path, log):
    pytest.importorskip("matplotlib")
    line = figures.Curve("theory", (1.0, 2.0, 4.0), (1.0, math.inf, 0.25))
    points = figures.Curve("theory, simulated", (1.0, 4.0), (1.1, 0.3), (0.1, 0.1), points=True)
    figure = figures.Figure("f", "title", "x", "y", (line, points), log=log, y_limit=None if log else 2.0)
    path = tmp_path / "f.png"
    axes = figures.plot(figure, str(path))
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert axes.get_xscale() == ("log" if log else "linear")
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["theory", "theory, simulated"]
    assert axes.lines[0].get_color() == axes.containers[0].lines[0].get_color()
    assert figures.plot(figure, ax=axes) is axes


def test_a_line_with_errors_has_a_band():
    pytest.importorskip("matplotlib")
    line = figures.Curve("measured", (1.0, 2.0), (1.0, 3.0), (0.5, 0.25))
    axes = figures.plot(figures.Figure("f", "t", "x", "y", (line,)))
    (band,) = axes.collections
    corners = {tuple(map(float, corner)) for corner in band.get_paths()[0].vertices}
    assert {(1.0, 0.5), (1.0, 1.5), (2.0, 2.75), (2.0, 3.25)} <= corners


def test_plot_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"flexnorm\[plot\]"):
        figures.plot(figures.Figure("f", "t", "x", "y", ()))
