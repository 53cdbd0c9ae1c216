"""Rank correlation of two quantities over the runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Spearman's rank correlation of two sequences of finite numbers; NaN if one is constant or below three."""
    a, b = _ranks(x), _ranks(y)
    if len(a) < 3 or len(set(a)) == 1 or len(set(b)) == 1:
        return math.nan
    return statistics.correlation(a, b)


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    first = {v: i for i, v in reversed(list(enumerate(ordered)))}
    last = {v: i for i, v in enumerate(ordered)}
    return [(first[v] + last[v]) / 2 for v in values]
