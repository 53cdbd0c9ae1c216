"""The figures: their data are those of the formulas and simulations, and plots come out."""

import json
import math
import re
from xml.etree import ElementTree

import pytest

from flexnorm.lab import figures, simulations
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
    direct = simulations.train_students("batchnorm", 2.0, 0.25, N=48, runs=2, epochs=5, batch_size=8)
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
    line = figures.Curve("theory", (1.0, 2.0, 4.0), (1.0, math.inf, 0.25))
    points = figures.Curve("theory, simulated", (1.0, 4.0), (1.1, 0.3), (0.1, 0.1), points=True)
    figure = figures.Figure("f", "title", "x", "y", (line, points), log=log, y_limit=None if log else 2.0)
    path = figures.plot(figure, tmp_path / "f.svg")
    text = "".join(ElementTree.parse(path).getroot().itertext())
    assert all(text.count(label) for label in ("title", "theory", "theory, simulated"))
    drawn = figures.chart(figure)
    assert drawn.x.kind == ("log" if log else "linear")
    assert list(dict.fromkeys(s.label for s in drawn.series)) == ["theory", "theory, simulated"]
    assert len({s.hue for s in drawn.series}) == 1
    assert [s.x for s in drawn.series if s.kind == "curve"] == [[1.0], [4.0]]  # broken where it diverges


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF")])
def test_pictures_that_are_converted(tmp_path, suffix, start):
    pytest.importorskip("vl_convert")
    line = figures.Curve("theory", (1.0, 2.0, 4.0), (1.0, 3.0, 0.25))
    path = figures.plot(figures.Figure("f", "title", "x", "y", (line,)), str(tmp_path / f"f{suffix}"))
    assert path.read_bytes()[:4] == start
    assert path.stat().st_size > 5000


def test_a_line_with_errors_has_a_band():
    line = figures.Curve("measured", (1.0, 2.0), (1.0, 3.0), (0.5, 0.25))
    drawn = figures.chart(figures.Figure("f", "t", "x", "y", (line,)))
    (series,) = drawn.series
    assert list(zip(series.x, series.low, series.high, strict=True)) == [(1.0, 0.5, 1.5), (2.0, 2.75, 3.25)]
    assert drawn.y.low <= 0.5
    assert drawn.y.high >= 3.25
    corners = {drawn.point(x, y) for x, y in ((1.0, 0.5), (1.0, 1.5), (2.0, 2.75), (2.0, 3.25))}
    (band,) = re.findall('d="M([^"]*)Z" class="band"', drawn.svg("key"))
    assert {tuple(map(float, corner.split())) for corner in band.split("L")} == {
        (round(x, 2), round(y, 2)) for x, y in corners
    }


def test_what_lies_above_the_limit_is_not_drawn():
    line = figures.Curve("f", (1.0, 2.0, 3.0, 4.0, 5.0, 6.0), (1.0, 3.0, 9.0, 9.0, 3.0, 1.0))
    points = figures.Curve("g", (1.0, 2.0, 3.0), (1.0, 5.0, 1.5), points=True)
    first, second, marks = figures.chart(figures.Figure("f", "t", "x", "y", (line, points), y_limit=2.0)).series
    assert (first.x, second.x) == ([1.0, 2.0], [5.0, 6.0])  # up to the edge, and down from it
    assert marks.x == [1.0, 3.0]


def test_formats(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    figure = figures.Figure("f", "t", "x", "y", (figures.Curve("a", (1.0,), (1.0,)),))
    with pytest.raises(ImportError, match=r"a picture as \.png needs vl_convert: pip install 'flexnorm\[plot\]'"):
        figures.plot(figure, tmp_path / "f.png")
    with pytest.raises(ValueError, match=r"did you mean '\.png'"):
        figures.plot(figure, tmp_path / "f.pn")
    with pytest.raises(FileNotFoundError, match="no folder"):
        figures.plot(figure, tmp_path / "absent" / "f.svg")
    assert list(tmp_path.iterdir()) == []
