"""When to measure: a schedule maps the number of optimizer steps done so far to yes or no."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

Schedule = Callable[[int], bool]
"""Anything that maps a step count to whether to measure there; a plain function will do."""


@dataclass(frozen=True)
class EverySteps:
    """Measure at ``start``, ``start + interval``, ``start + 2 interval``, ...

    Attributes:
        interval: Steps between two measurements, at least 1.
        start: First step to measure at.
    """

    interval: int
    start: int = 0

    def __post_init__(self) -> None:
        if self.interval < 1 or self.start < 0:
            raise ValueError(f"interval must be at least 1 and start at least 0, got {self.interval} and {self.start}")

    def __call__(self, step: int, /) -> bool:
        """Whether ``step`` lies on the grid."""
        return step >= self.start and (step - self.start) % self.interval == 0


@dataclass(frozen=True)
class Logarithmic:
    """Measure often at first, then ever more rarely: at 0 and at the rounded powers ``base ** (k / per_base)``.

    Attributes:
        base: Ratio of steps within which ``per_base`` measurements are made, above 1.
        per_base: Measurements per factor of ``base``, at least 1.
    """

    base: float = 10.0
    per_base: int = 10

    def __post_init__(self) -> None:
        if self.base <= 1 or self.per_base < 1:
            raise ValueError(f"base must exceed 1 and per_base be at least 1, got {self.base} and {self.per_base}")

    def __call__(self, step: int, /) -> bool:
        """Whether a rounded power equals ``step``."""
        if step < 1:
            return step == 0
        # The powers that round to `step` lie within half a step of it.
        low, high = (self.per_base * math.log(bound, self.base) for bound in (max(step - 0.5, 1), step + 0.5))
        return any(round(self.base ** (k / self.per_base)) == step for k in range(math.floor(low), math.ceil(high) + 1))


@dataclass(frozen=True)
class AtSteps:
    """Measure at the listed steps.

    Attributes:
        steps: The step counts.
    """

    steps: frozenset[int]

    def __init__(self, steps: Iterable[int]) -> None:
        object.__setattr__(self, "steps", frozenset(int(step) for step in steps))
        if not self.steps or min(self.steps) < 0:
            raise ValueError(f"steps must be a non-empty list of counts from 0 on, got {sorted(self.steps)}")

    def __call__(self, step: int, /) -> bool:
        """Whether ``step`` is listed."""
        return step in self.steps


@dataclass
class EverySeconds:
    """Measure when at least ``interval`` seconds have passed since the last measurement; the first call measures.

    What it does depends on the clock, so a resumed run need not measure at the steps of an uninterrupted one.

    Attributes:
        interval: Seconds between two measurements, above 0.
        clock: Returns the time in seconds.
    """

    interval: float
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    _last: float | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.interval > 0:
            raise ValueError(f"interval must be a positive number of seconds, got {self.interval}")

    def __call__(self, step: int, /) -> bool:  # noqa: ARG002
        """Whether the interval has passed; if so it starts anew."""
        now = self.clock()
        if self._last is not None and now - self._last < self.interval:
            return False
        self._last = now
        return True


def as_schedule(every: int | Schedule | Iterable[int]) -> Schedule:
    """A schedule from a number of steps, a list of steps, or a schedule or function as it is; TypeError for others."""
    if isinstance(every, int) and not isinstance(every, bool):
        return EverySteps(every)
    if callable(every):
        return every
    if isinstance(every, (list, tuple, set, frozenset, range)):
        return AtSteps(every)
    raise TypeError(f"every must be a number of steps, a list of steps or a schedule, got {every!r}")
