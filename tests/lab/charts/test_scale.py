"""Axes: every value lands where it should, and every tick is a round number that says its own value."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexnorm.lab.charts import Chart
from flexnorm.lab.charts.scale import accuracy, linear, log_label, log_or_linear, logarithmic, nice_step
from flexnorm.lab.charts.svg import fit, text_width

numbers = st.floats(-1e6, 1e6, allow_nan=False)


def check(scale):
    places = [scale(tick.value) for tick in scale.ticks]
    assert places == sorted(places)
    assert all(-1e-6 <= place <= 1 + 1e-6 for place in places)
    assert len({tick.label for tick in scale.ticks}) == len(scale.ticks)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.lists(numbers, min_size=1, max_size=9), st.booleans(), st.integers(2, 8))
def test_linear(values, zero, count):
    scale = linear(values, zero=zero, count=count)
    slack = 1e-8 * (scale.high - scale.low)
    assert scale.low <= min(values) + slack
    assert scale.high >= max(values) - slack
    assert 2 <= len(scale.ticks) <= count + 3
    check(scale)
    assert all(0 <= scale(v) <= 1 for v in values)
    if zero:
        assert scale.low <= 0 <= scale.high


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=9), st.integers(3, 7))
def test_logarithmic(values, count):
    scale = logarithmic(values, count=count)
    assert scale.low < min(values)
    assert scale.high > max(values)
    assert 0 < len(scale.ticks) <= count + 1
    check(scale)
    middle = math.sqrt(scale.low * scale.high)
    assert scale(middle) == pytest.approx(0.5)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.lists(st.floats(0, 1), max_size=9))
def test_accuracy(values):
    scale = accuracy(values)
    check(scale)
    assert all(0 <= scale(v) <= 1 for v in values)
    assert all(tick.label.endswith("\u202f%") for tick in scale.ticks)
    assert 0 <= scale.low < scale.high <= 1


def test_accuracy_is_logarithmic_in_the_error():
    scale = accuracy([0.5, 0.9, 0.99])
    assert scale.kind == "accuracy"
    assert scale(0.98) - scale(0.96) == pytest.approx(scale(0.96) - scale(0.92))
    labels = {tick.label.replace("\u202f", "") for tick in scale.ticks}
    assert {"50%", "90%"} <= labels
    assert accuracy([0.5, 1.0, 0.99])(1.0) == 1.0


def test_ticks_say_what_they_mark():
    assert [t.label for t in linear([0, 1]).ticks] == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert [t.label for t in linear([1, 10], integer=True, tight=True).ticks] == ["2", "4", "6", "8", "10"]
    assert next(t.label for t in linear([0.975, 0.98], percent=True).ticks) == "97.5\u202f%"
    assert [t.label for t in linear([0, 3e7]).ticks][-1] == "3.00×10⁷"
    assert [t.label for t in logarithmic([0.001, 1]).ticks] == ["0.001", "0.01", "0.1", "1"]
    assert [log_label(v) for v in (0.02, 500.0, 1e-5, 2e6)] == ["0.02", "500", "10⁻⁵", "2×10⁶"]
    assert nice_step(1.0, 4) == 0.25


@pytest.mark.parametrize("values", [[], [math.nan], [math.inf, 1.0], [0.0], [-5.0, -5.0], [1e308, -1e308], [5e-324]])
def test_strange_values_give_an_axis(values):
    for scale in (linear(values), linear(values, integer=True, tight=True), logarithmic(values), log_or_linear(values)):
        check(scale)
        assert scale.high > scale.low
    assert math.isnan(linear(values)(math.nan))


def test_zeros_lie_on_the_edge_of_a_logarithmic_axis():
    scale = log_or_linear([0.0, 0.001, 1.0])
    assert scale.kind == "log"
    assert scale.zero_at_edge
    assert scale(0.0) == 0.0
    assert scale(0.001) > 0.0
    assert log_or_linear([0.0, 0.0]).kind == "linear"
    assert ">0</text>" in Chart("t", scale, scale, ()).frame()


def test_text_is_cut_to_its_room():
    name = "a-very-long-name" * 9
    assert fit("short", 100, 12) == "short"
    assert fit(name, 100, 12).endswith("…")
    assert text_width(fit(name, 100, 12), 12) <= 100
