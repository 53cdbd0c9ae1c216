"""What a number was computed with, settings of torch for the time of a run, and signals that ask it to stop."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch

from flexnorm._version import __version__
from flexnorm.kernels import status
from flexnorm.lab.run.config import Config


def describe(device: torch.device) -> dict[str, Any]:
    """Return versions and hardware as plain values."""
    on = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    return {
        "flexnorm": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": on,
        "threads": torch.get_num_threads(),
        "kernels": "compiled" if status().startswith("compiled") else "torch",
    }


@contextlib.contextmanager
def settings(config: Config, device: torch.device, shape: tuple[int, int, int]) -> Iterator[None]:
    """Set threads and determinism for one run; afterwards these and torch's global generator are as they were.

    The ``shape`` (C, H, W) of an image decides the number of threads if the config leaves it open.
    """
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    benchmark = torch.backends.cudnn.benchmark
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            if config.threads or math.prod(shape) <= 1024:
                torch.set_num_threads(config.threads or 1)
            if config.deterministic and device.type != "cpu":
                # CPU kernels are deterministic for a given number of threads; asking there would only cost time.
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
                torch.use_deterministic_algorithms(True, warn_only=True)
                torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
                torch.backends.cudnn.benchmark = False
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
            torch.backends.cudnn.benchmark = benchmark


class Interrupted(Exception):  # noqa: N818  (like KeyboardInterrupt: a request, not an error)
    """The user asked to stop; everything finished so far is on the disk.

    A command ends with ``exit_code``: 128 plus the number of the signal (130 for Ctrl-C).
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__("stopped on request")
        self.exit_code = exit_code


class StopRequest:
    """Remembers the number of the first ``signal`` that has arrived, 0 as long as none has."""

    signal = 0

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
