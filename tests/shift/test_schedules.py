"""When each schedule says yes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexnorm.shift import AtSteps, EverySeconds, EverySteps, Logarithmic, Schedule
from flexnorm.shift.base import as_schedule


def steps(schedule: Schedule, stop: int) -> list[int]:
    return [step for step in range(stop) if schedule(step)]


def test_every_steps() -> None:
    assert steps(EverySteps(3), 10) == [0, 3, 6, 9]
    assert steps(EverySteps(3, start=4), 12) == [4, 7, 10]
    assert steps(as_schedule(5), 11) == [0, 5, 10]


def test_listed_steps() -> None:
    assert steps(as_schedule([7, 2, 2]), 10) == [2, 7]
    assert AtSteps([1, 2]) == AtSteps((2, 1))


@given(st.floats(1.5, 20), st.integers(1, 12))
def test_logarithmic_is_the_rounded_powers(base: float, per_base: int) -> None:
    expected = {0} | {round(base ** (k / per_base)) for k in range(200) if base ** (k / per_base) < 3000}
    assert steps(Logarithmic(base, per_base), 2000) == sorted(step for step in expected if step < 2000)


def test_every_seconds() -> None:
    now = [0.0]
    schedule = EverySeconds(10, clock=lambda: now[0])
    asked = []
    for now[0] in (0.0, 5.0, 9.9, 10.0, 19.0, 31.0, 32.0):
        asked.append(schedule(0))
    assert asked == [True, False, False, True, False, True, False]
    assert EverySeconds(1000)(0)


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (ValueError, lambda: EverySteps(0)),
        (ValueError, lambda: EverySteps(1, -1)),
        (ValueError, lambda: Logarithmic(1.0)),
        (ValueError, lambda: Logarithmic(2.0, 0)),
        (ValueError, lambda: AtSteps([])),
        (ValueError, lambda: AtSteps([-1])),
        (ValueError, lambda: EverySeconds(0)),
        (TypeError, lambda: as_schedule("10")),  # type: ignore[arg-type]
        (TypeError, lambda: as_schedule(1.5)),  # type: ignore[arg-type]
    ],
)
def test_errors(error: type[Exception], call: Any) -> None:
    with pytest.raises(error):
        call()
