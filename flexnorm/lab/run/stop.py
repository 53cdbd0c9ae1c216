"""Ctrl-C and SIGTERM as a request: the run ends at the next safe moment, nothing is half written."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Interrupted(Exception):  # noqa: N818  (like KeyboardInterrupt: a request, not an error)
    """The user asked to stop; everything finished so far is on the disk.

    Attributes:
        exit_code: What a command ends with: 128 plus the number of the signal (130 for Ctrl-C).
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__("stopped on request")
        self.exit_code = exit_code


class StopRequest:
    """Remembers that a signal has arrived.

    Attributes:
        signal: Number of the first signal, 0 as long as none has arrived.
    """

    def __init__(self) -> None:
        self.signal = 0

    def check(self) -> None:
        """Raise :class:`Interrupted` if a signal has arrived. Called where stopping is safe."""
        if self.signal:
            raise Interrupted(128 + self.signal)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Collect SIGINT and SIGTERM as requests; a second Ctrl-C interrupts at once. Only the main thread can."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def remember(number: int, _frame: FrameType | None) -> None:
        if request.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = request.signal or number

    previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
