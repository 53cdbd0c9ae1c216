"""What a number was computed with, and the settings of torch that a run needs for its time only."""

from __future__ import annotations

import contextlib
import math
import os
import platform
from collections.abc import Iterator
from typing import Any

import torch

from flexnorm._version import __version__
from flexnorm.kernels import status
from flexnorm.lab.run.config import Config

SMALL = 1024


def describe(device: torch.device) -> dict[str, Any]:
    """Return versions and hardware as plain values."""
    on = str(device)
    if device.type == "cuda":
        on = f"{device} ({torch.cuda.get_device_name(device)})"
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
            if config.threads or math.prod(shape) <= SMALL:
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
