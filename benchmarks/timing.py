"""Interleaved timing: every contender once per round, in turn; ratios per round, medians over rounds.

On a machine that others use too, times wander together, so only ratios within a round mean something.
"""

from __future__ import annotations

import json
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleave(contenders: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Return the seconds of every call, by contender, in rounds that each run all of them in a new order.

    A contender that needs much memory leaves the next one to fault its pages in again; in a fixed order the same one
    would always pay for it.
    """
    for _ in range(warmup):
        for call in contenders.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = random.Random(0)
    for _ in range(rounds):
        for name, call in order.sample(list(contenders.items()), len(contenders)):
            _synchronize()
            start = time.perf_counter()
            call()
            _synchronize()
            times[name].append(time.perf_counter() - start)
    return times


def ratios(times: Mapping[str, list[float]], baseline: str) -> dict[str, float]:
    """Return the median over rounds of each contender's time over the baseline's in the same round."""
    return {
        name: statistics.median(a / b for a, b in zip(own, times[baseline], strict=True)) for name, own in times.items()
    }


def device() -> str:
    """Return the name of the processor or accelerator that the numbers are of."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def save(path: Path, benchmark: str, rows: list[dict[str, Any]], **extra: Any) -> None:
    """Write rows with what they were measured on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    record = {
        "benchmark": benchmark,
        "device": device(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or None,
        **extra,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
