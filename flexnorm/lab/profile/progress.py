"""What a profile is busy with, and how long that will take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where a profile is.

    Attributes:
        phase: What it does now, in words.
        done: How much of the phase is done.
        total: How much there is; 0 where that is not counted.
        seconds: Since the phase began.
    """

    phase: str
    done: int = 0
    total: int = 0
    seconds: float = 0.0

    @property
    def left(self) -> float | None:
        """Seconds until the end of the phase, if it goes on as so far; ``None`` where that is not known."""
        return self.seconds / self.done * (self.total - self.done) if self.done and self.total else None


Notify = Callable[[Progress], None]
"""What is told about the progress of a profile."""


class Phases:
    """Tells ``notify`` when a phase begins, and how far it has come."""

    def __init__(self, notify: Notify) -> None:
        self._notify, self._phase, self._total, self._began = notify, "", 0, 0.0

    def begin(self, phase: str, total: int = 0) -> None:
        """Begin a phase of ``total`` parts."""
        self._phase, self._total, self._began = phase, total, time.perf_counter()
        self._notify(Progress(phase, 0, total))

    def done(self, count: int) -> None:
        """Say that so many parts of the phase are done."""
        self._notify(Progress(self._phase, count, self._total, time.perf_counter() - self._began))
