"""Scales of plots: from a value to a place in [0, 1], with round ticks.

Four kinds. `linear`; `logarithmic`; `accuracy`, which is logarithmic in the error 1 - value: a step along it cuts the
mistakes by the same factor everywhere, while the axis still reads as accuracy; and `rows`, which has names.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from flexnorm.lab.charts.numbers import fixed, power_of_ten, significant


@dataclass(frozen=True)
class Tick:
    """One mark of an axis.

    Attributes:
        value: Where it is, in data units.
        label: What it says; empty for a mark without a label.
        hue: Index of the colour that a row of this name has.
    """

    value: float
    label: str
    hue: int = 0


@dataclass(frozen=True)
class Scale:
    """A map from data to [0, 1].

    Attributes:
        kind: ``"linear"``, ``"log"``, ``"accuracy"`` or ``"rows"``.
        low: The value at 0.
        high: The value at 1.
        ticks: Labelled marks, ascending.
        zero_at_edge: Whether zeros, which a logarithmic axis cannot show, occur and are drawn at its lower edge.
    """

    kind: str
    low: float
    high: float
    ticks: tuple[Tick, ...]
    zero_at_edge: bool = False

    def __call__(self, value: float) -> float:
        """Return the place of a value; what lies outside is put on the nearer edge, NaN stays NaN."""
        warp = _WARPS[self.kind]
        if math.isnan(value):
            return math.nan
        ends = sorted((self.low, self.high))
        clipped = min(max(value, ends[0]), ends[1])
        start, end = warp(self.low), warp(self.high)
        return (warp(clipped) - start) / (end - start)


_WARPS: dict[str, Callable[[float], float]] = {
    "linear": float,
    "log": math.log10,
    "accuracy": lambda value: -math.log10(1.0 - value),
    "rows": float,
}


_HUGE = 1e100
"""Beyond this, and below its inverse, numbers no longer stretch an axis: their ratio would overflow."""


def nice_step(span: float, count: int) -> float:
    """Return the smallest step (1, 2, 2.5 or 5 times a power of ten) that cuts a span into at most count parts."""
    raw = span / max(count, 1)
    base = 10.0 ** math.floor(math.log10(raw))
    return next(step * base for step in (1.0, 2.0, 2.5, 5.0, 10.0) if step * base >= raw * (1 - 1e-9))


def linear(
    values: Iterable[float],
    *,
    count: int = 5,
    zero: bool = False,
    percent: bool = False,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    integer: bool = False,
    tight: bool = False,
) -> Scale:
    """Return a linear scale around values, its ends on round numbers.

    Args:
        values: The data; non-finite values are passed over, none at all gives [0, 1].
        count: At most about this many intervals between ticks.
        zero: Begin at zero.
        percent: Write ticks as per cent.
        bounds: Limits that the scale never exceeds, however round.
        integer: Ticks at whole numbers only (epochs, steps).
        tight: End at the data instead of at the next round number (time axes).
    """
    data = [0.0 if abs(v) < 1 / _HUGE else v for v in values if abs(v) <= _HUGE] or [0.0, 1.0]
    low, high = min(data), max(data)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        pad = 0.5 if integer else (abs(high) * 0.05 or 0.5)
        low, high = (low if zero and low == 0 else low - pad), high + pad
    step = nice_step(high - low, count)
    if integer:
        step = max(1.0, float(math.ceil(step)))
    start, end = (low, high) if tight else (math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step)
    start, end = max(start, bounds[0]), min(end, bounds[1])
    if end <= start:
        start, end = low, high
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if abs(step * 10.0**decimals - round(step * 10.0**decimals)) > 1e-6:
        decimals += 1

    def write(value: float) -> str:
        if percent:
            return f"{fixed(100 * value, max(0, decimals - 2))}\u202f%"
        return significant(value) if max(abs(start), abs(end)) >= 1e6 or decimals > 5 else fixed(value, decimals)

    first, last = math.ceil(start / step - 1e-6), math.floor(end / step + 1e-6)
    marks = tuple(Tick(k * step, write(k * step)) for k in range(first, last + 1))
    return Scale("linear", start, end, marks)


def logarithmic(values: Iterable[float], *, count: int = 6, at: Sequence[float] = ()) -> Scale:
    """Return a logarithmic scale around the positive values; zeros among them set ``zero_at_edge``.

    Args:
        values: The data; non-finite and negative values are passed over.
        count: At most about this many labelled ticks: plain numbers from 0.001 to 100 000, powers of ten outside.
        at: The ticks themselves, where round numbers would not do (batch sizes).
    """
    data = [v for v in values if abs(v) <= _HUGE]
    positive = [v for v in data if v > 1 / _HUGE] or [1.0]
    low, high = min(positive), max(positive)
    has_zero = any(v == 0 for v in data)
    if high / low < 1.5:
        low, high = low / 1.5, high * 1.5
    margin = 10.0 ** (0.04 * math.log10(high / low))
    low, high = low / (margin * (2.0 if has_zero else 1.0)), high * margin
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    marks = at or _round_marks("log", low, high, decades, count)
    return Scale("log", low, high, tuple(Tick(v, f"{v:g}" if at else log_label(v)) for v in marks), has_zero)


def _round_marks(kind: str, low: float, high: float, decades: Iterable[int], count: int) -> list[float]:
    """Return values, or errors, of one digit in these decades: as many as have room, so that no labels touch."""
    warp, marks = _WARPS[kind], [low]
    least = 0.085 * (warp(high) - warp(low))
    several = ((1, 2, 5),) if kind == "log" else ((1, 2, 3, 5), (1, 2, 5))
    for mantissas in (tuple(range(1, 10)), *several, (1, 3), (1,)):
        digits = [m * 10.0**e for e in decades for m in mantissas]
        marks = digits if kind == "log" else sorted({round(1.0 - v, 12) for v in digits})
        marks = [v for v in marks if low <= v <= high]
        if len(marks) <= count and all(warp(b) - warp(a) >= least for a, b in itertools.pairwise(marks)):
            break
    return marks[:: math.ceil(len(marks) / count) or 1]


def log_label(value: float) -> str:
    """Return the label of a logarithmic tick: ``0.02``, ``500``, ``10⁻⁵``, ``2×10⁶``."""
    exponent = math.floor(math.log10(value) + 1e-9)
    mantissa = round(value / 10.0**exponent)
    if -3 <= exponent <= 5:
        return fixed(value, max(0, -exponent))
    return power_of_ten(exponent) if mantissa == 1 else f"{mantissa}×{power_of_ten(exponent)}"


def log_or_linear(values: Iterable[float], *, ratio: float = 12.0, count: int = 5) -> Scale:
    """Return a logarithmic scale where the positive values span more than a ratio, else a linear one from zero.

    Args:
        values: The data.
        ratio: The ratio.
        count: At most about this many ticks.
    """
    data = [v for v in values if abs(v) <= _HUGE]
    positive = [v for v in data if v > 1 / _HUGE]
    if positive and min(data) >= 0 and max(positive) / min(positive) > ratio:
        return logarithmic(data, count=count)
    return linear(data, zero=True, count=count)


def accuracy(values: Iterable[float], *, count: int = 5) -> Scale:
    """Return a scale for fractions correct: logarithmic in the error where any reaches 90 %, else linear.

    Args:
        values: The fractions; those of exactly 1 are drawn at the upper edge, half of the smallest error seen.
        count: At most about this many intervals between ticks.
    """
    # An error below one in a billion is none: so many images nobody has tested.
    data = [1.0 if v > 1.0 - 1e-9 else max(v, 0.0) for v in values if math.isfinite(v)]
    errors = [1.0 - v for v in data if v < 1.0]
    if not errors or max(data) < 0.9 or max(errors) / min(errors) < 3:
        return linear(data, count=count, percent=True, bounds=(0.0, 1.0))
    low = max(0.0, 1.0 - 1.15 * max(errors))
    high = 1.0 - min(errors) / (2.0 if max(data) == 1.0 else 1.15)
    decades = range(math.floor(math.log10(1.0 - high)), 1)
    marks = _round_marks("accuracy", low, high, decades, count + 1)
    return Scale("accuracy", low, high, tuple(Tick(v, f"{100 * round(v, 12):.10g}\u202f%") for v in marks))


def rows(names: Sequence[tuple[str, int]], *, height: float = 34.0, gap: float = 0.0) -> Scale:
    """Return the vertical scale of a chart of rows, in pixels from the top.

    Args:
        names: Name and colour of every row, from the top.
        height: Of a row.
        gap: Additional space where the colour changes from one row to the next.
    """
    ticks, y = [], 0.0
    for index, (name, hue) in enumerate(names):
        y += gap if index and names[index - 1][1] != hue else 0.0
        ticks.append(Tick(y + height / 2, name, hue))
        y += height
    return Scale("rows", max(y, 1.0), 0.0, tuple(ticks))
