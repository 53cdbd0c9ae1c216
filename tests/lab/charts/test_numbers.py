"""Numbers as text, and text as markup."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexnorm.lab.charts.markup import Markup, element, escape, join, number
from flexnorm.lab.charts.numbers import (
    decimals_for,
    duration,
    fixed,
    listing,
    percent,
    plural,
    power_of_ten,
    signed,
    significant,
)

SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹−", "-0123456789-")


def read(text):
    """The number that a text says."""
    plain = text.replace("\u202f", "").translate(SUPERSCRIPTS)
    return float(plain.replace("×10", "e"))


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.floats(-1e300, 1e300), st.integers(1, 6))
def test_significant_keeps_so_many_digits(value, digits):
    got = read(significant(value, digits))
    assert got == pytest.approx(value, rel=0.51 * 10 ** (1 - digits), abs=1e-323)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.012345, "0.0123"),
        (0.09996, "0.100"),
        (12.345, "12.3"),
        (1234.5, "1\u202f234"),
        (-3.21, "−3.21"),
        (0.0, "0"),
        (math.nan, "–"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (1.234e-5, "1.23×10⁻⁵"),
        (9.999e8, "1.00×10⁹"),
    ],
)
def test_significant(value, text):
    assert significant(value) == text


def test_small_writers():
    assert fixed(-0.001, 2) == "0.00"
    assert fixed(-0.5, 2) == "−0.50"
    assert signed(0.4, 1) == "+0.4"
    assert signed(-0.4, 1) == "−0.4"
    assert signed(0.001, 1) == "0.0"
    assert percent(0.985) == "98.5\u202f%"
    assert percent(math.nan) == "–"
    assert power_of_ten(-12) == "10⁻¹²"
    assert plural(1, "run") == "1 run"
    assert plural(0, "run") == "0 runs"
    assert [listing(x) for x in ((), ("a",), ("a", "b"), ("a", "b", "c"))] == ["", "a", "a and b", "a, b and c"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.42, "0.42 s"), (73, "73 s"), (725, "12 min 5 s"), (10920, "3 h 2 min"), (math.nan, "–"), (-1, "–")],
)
def test_duration(seconds, text):
    assert duration(seconds).replace("\u202f", " ") == text


def test_decimals_follow_the_spread():
    assert decimals_for([0.34], least=0, most=4, default=1) == 2
    assert decimals_for([12.0], least=0, most=4, default=1) == 0
    assert decimals_for([1e-9], least=0, most=4, default=1) == 4
    assert decimals_for([math.nan, 0.0], least=0, most=4, default=1) == 1


def test_markup_escapes_everything_but_itself():
    got = element("p", "<b>", Markup("<i></i>"), None, [1, ("&", 'a"b')], title='"<', hidden=True, lang=None, x=1.50)
    assert got == '<p title="&quot;&lt;" hidden x="1.5">&lt;b&gt;<i></i>1&amp;a&quot;b</p>'
    assert element("br") == "<br>"
    assert element("rect", x=-0.0) == '<rect x="0"/>'
    assert join(["a", "<"], " & ") == "a &amp; &lt;"
    assert escape("\x00\x85\ud800ok\n") == "\ufffd\ufffd\ufffdok\n"
    assert number(12.0) == "12"
