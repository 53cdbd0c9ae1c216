"""Numbers as people read them: significant digits, a true minus sign, units, and a dash for what is not known."""

from __future__ import annotations

import math
from collections.abc import Iterable

MISSING = "–"
"""What stands for a number that does not exist (NaN or None)."""

MINUS = "\u2212"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def fixed(value: float, decimals: int) -> str:
    """Return a number with a fixed count of decimals: ``−0.50``; NaN gives a dash, infinity its sign."""
    if math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    text = f"{value:,.{decimals}f}".replace(",", "\u202f")
    # Rounding may leave a minus sign in front of nothing but zeros.
    if text.startswith("-") and not any(c in "123456789" for c in text):
        text = text[1:]
    return text.replace("-", MINUS)


def signed(value: float, decimals: int) -> str:
    """Return a number with its sign, plus included; a value that rounds to zero has none."""
    text = fixed(value, decimals)
    return f"+{text}" if value > 0 and any(c in "123456789∞" for c in text) else text


def significant(value: float, digits: int = 3) -> str:
    """Return a number to ``digits`` significant digits, in powers of ten below 0.0001 and from a million on.

    Examples:
        >>> significant(0.012345), significant(12.345), significant(0.0000123)
        ('0.0123', '12.3', '1.23×10⁻⁵')
    """
    if math.isnan(value) or math.isinf(value) or value == 0:
        return "0" if value == 0 else fixed(value, 0)
    # By way of the decimal text, because it has rounded already: 0.09996 is 0.100, not 0.1000.
    mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
    exponent = int(power)
    if not -4 <= exponent < 6:
        return f"{fixed(float(mantissa), digits - 1)}×{power_of_ten(exponent)}"
    return fixed(value, max(0, digits - 1 - exponent))


def power_of_ten(exponent: int) -> str:
    """Return ``10⁻³`` for -3."""
    return f"10{str(exponent).translate(_SUPERSCRIPT)}"


def decimals_for(spreads: Iterable[float], *, least: int, most: int, default: int) -> int:
    """Return how many decimals a column deserves: two significant digits of its typical (median) standard deviation.

    Args:
        spreads: The standard deviations of the column, in the unit shown; zeros and non-finite ones do not count.
        least: Fewest decimals.
        most: Most decimals.
        default: The answer where there is none (one seed).
    """
    known = sorted(s for s in spreads if math.isfinite(s) and s > 0)
    if not known:
        return default
    exponent = math.floor(math.log10(known[len(known) // 2]))
    return min(most, max(least, 1 - exponent))


def percent(fraction: float, decimals: int = 1) -> str:
    """Return a fraction as per cent, with a thin space before the sign: ``percent(0.985) == "98.5 %"``."""
    text = fixed(100.0 * fraction, decimals)
    return text if text == MISSING else f"{text}\u202f%"


def duration(seconds: float) -> str:
    """Return a duration in the unit that fits: ``0.42 s``, ``73 s``, ``12 min 5 s``, ``3 h 2 min``."""
    if not math.isfinite(seconds) or seconds < 0:
        return MISSING
    if seconds < 10:
        return f"{significant(seconds, 2)}\u202fs"
    whole = round(seconds)
    if whole < 120:
        return f"{whole}\u202fs"
    if whole < 7200:
        return f"{whole // 60}\u202fmin {whole % 60}\u202fs"
    return f"{whole // 3600}\u202fh {whole % 3600 // 60}\u202fmin"


def plural(count: int, noun: str) -> str:
    """Return ``1 run``, ``2 runs``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def listing(names: Iterable[str]) -> str:
    """Return names as prose: ``a``, ``a and b``, ``a, b and c``."""
    items = list(names)
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""
