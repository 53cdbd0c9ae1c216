"""Interleaved timing: every contender once per round, in turn; ratios per round, medians over rounds.

On a machine that others use too, times wander together, so only ratios within a round mean something.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
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


def interleave(
    contenders: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 3, least: float = 0.0
) -> dict[str, list[float]]:
    """Return the seconds of every call, by contender, in rounds that each run all of them in a new order.

    A contender that needs much memory leaves the next one to fault its pages in again; in a fixed order the same one
    would always pay for it. Where a call takes less than ``least`` seconds it is made several times in a row, all alike
    for one contender, and the mean counts: a clock cannot tell microseconds, and a GPU is waited for only at the ends.
    """
    repeats = dict.fromkeys(contenders, 1)
    for name, call in contenders.items():
        for _ in range(warmup - 1):
            call()
        once = _seconds(call, 1)
        repeats[name] = max(1, math.ceil(least / once))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = random.Random(0)
    for _ in range(rounds):
        for name, call in order.sample(list(contenders.items()), len(contenders)):
            times[name].append(_seconds(call, repeats[name]))
    return times


def _seconds(call: Callable[[], object], repeats: int) -> float:
    """The mean seconds of a call of several in a row, until the device is done with all."""
    _synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _synchronize()
    return (time.perf_counter() - start) / repeats


def allocations(call: Callable[[], object], device: str = "cpu") -> tuple[int, int]:
    """Return the bytes that a call takes at its peak, and those that its result keeps alive, above all before it.

    On the CPU they are added up from what torch's profiler records of every allocation and release, exactly.
    """
    gc.collect()  # graphs of earlier calls, which would be released in this one
    if torch.device(device).type == "cuda":
        _synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        _synchronize()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        result = call()
    recorded = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    alive = list(itertools.accumulate(e.nbytes() for e in sorted(recorded, key=lambda e: e.start_ns())))
    del result  # alive until here, so that what it holds counts as kept
    return max(alive, default=0), alive[-1] if alive else 0


def ratios(times: Mapping[str, list[float]], baseline: str) -> dict[str, float]:
    """Return the median over rounds of each contender's time over the baseline's in the same round."""
    return {
        name: statistics.median(a / b for a, b in zip(own, times[baseline], strict=True)) for name, own in times.items()
    }


def device(kind: str | None = None) -> str:
    """Return the name of the processor or accelerator that the numbers are of: "cpu", or by default what there is."""
    if kind != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def provenance(kind: str | None = None) -> dict[str, Any]:
    """Return what numbers were measured on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {"device": device(kind), "torch": torch.__version__, "commit": commit.stdout.strip() or None}


def save(path: Path, benchmark: str, rows: list[dict[str, Any]], **extra: Any) -> None:
    """Write rows with what they were measured on."""
    _write(path, {"benchmark": benchmark, **provenance(), **extra, "rows": rows})


def save_part(
    path: Path, benchmark: str, part: str, rows: list[dict[str, Any]], kind: str | None = None, **extra: Any
) -> None:
    """Write the rows of one part with what they were measured on; the other parts of the file stay as they are."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    parts = {**before.get("parts", {}), part: {**provenance(kind), **extra, "rows": rows}}
    _write(path, {"benchmark": benchmark, "parts": parts})


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
