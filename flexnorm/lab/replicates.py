"""One quantity, measured once per seed: mean, standard deviation, confidence interval, and how they are written."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class Replicates:
    """Some numbers, one per seed, and what they amount to.

    Attributes:
        values: The numbers; NaN is left out beforehand.
    """

    values: tuple[float, ...] = ()

    @classmethod
    def of(cls, values: Iterable[float]) -> Replicates:
        """Return the replicates of the values that are not NaN."""
        return cls(tuple(v for v in values if not math.isnan(v)))

    def __bool__(self) -> bool:
        return bool(self.values)

    @property
    def n(self) -> int:
        """How many numbers there are."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Their mean, correctly rounded whatever the order; NaN where there are none."""
        return (math.fsum if self._finite else sum)(self.values) / self.n if self.n else math.nan

    @property
    def std(self) -> float:
        """Their sample standard deviation (n - 1), zero where only rounding sets them apart; NaN for fewer than two."""
        if self.n < 2 or not self._finite:
            return math.nan
        std = statistics.stdev(self.values)
        return std if std > 1e-12 * max(abs(self.low), abs(self.high)) else 0.0

    @property
    def standard_error(self) -> float:
        """Standard error of the mean; NaN for fewer than two."""
        return self.std / math.sqrt(self.n) if self.n else math.nan

    @property
    def median(self) -> float:
        """Their median, which one disturbed run does not move far; NaN where there are none."""
        return statistics.median(self.values) if self.values else math.nan

    @property
    def low(self) -> float:
        """The smallest; NaN where there are none."""
        return min(self.values, default=math.nan)

    @property
    def high(self) -> float:
        """The largest; NaN where there are none."""
        return max(self.values, default=math.nan)

    @property
    def margin(self) -> float:
        """Half the width of the 95 % confidence interval of the mean, by Student's t.

        NaN for fewer than two numbers, and for numbers that are all the same (accuracies are multiples of one image):
        a few equal results do not show that the standard deviation is zero.
        """
        if not self.n > 1 or not self.std > 0:
            return math.nan
        quantile = _T95[self.n - 2] if self.n - 2 < len(_T95) else 1.96 + 2.6 / (self.n - 1)
        return quantile * self.standard_error

    @property
    def separated(self) -> bool:
        """Whether zero lies outside the 95 % confidence interval of the mean; never where there is no such interval."""
        return abs(self.mean) > self.margin

    @property
    def _finite(self) -> bool:
        return all(map(math.isfinite, self.values))

    def asdict(self) -> dict[str, Any]:
        """Return mean, standard deviation (None where there is none) and the values, as results.json has them."""
        return {"mean": _known(self.mean), "std": _known(self.std), "values": list(self.values)}

    def text(self, form: str, scale: float = 1.0, missing: str = "") -> str:
        """Return ``mean ± std``, see :func:`plus_minus`."""
        return plus_minus(self.mean, self.std, form, scale, missing)


def paired_difference(values: Mapping[int, float], base: Mapping[int, float]) -> Replicates:
    """Return value minus base, seed by seed, over the seeds that both have."""
    return Replicates.of(value - base[seed] for seed, value in values.items() if seed in base)


def mean(values: Sequence[float]) -> float:
    """Return the mean, correctly rounded whatever the order; NaN for no values."""
    return math.fsum(values) / len(values) if values else math.nan


def plus_minus(centre: float | None, std: float | None, form: str, scale: float = 1.0, missing: str = "") -> str:
    """Return ``mean ± std`` in words; the mean alone without a standard deviation.

    Args:
        centre: The mean; None or NaN if there is none.
        std: The standard deviation, likewise.
        form: Format of both, for example ``".2f"``; a ``+`` in front is for the mean only.
        scale: Factor for both, for example 100 for per cent.
        missing: What stands for no mean.

    Examples:
        >>> plus_minus(0.0123, 0.004, "+.2f", 100), plus_minus(0.5, None, ".1f")
        ('+1.23 ± 0.40', '0.5')
    """
    if centre is None or math.isnan(centre):
        return missing
    text = format(scale * centre, form)
    return text if std is None or math.isnan(std) else f"{text} ± {format(scale * std, form.lstrip('+'))}"


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
