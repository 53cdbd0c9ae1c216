"""From the summaries of single runs to the table: mean and spread over seeds, paired differences to the baseline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

__all__ = ["add_step_ratios", "spread", "table"]

Summary = Mapping[str, Any]


def spread(values: Iterable[float | None]) -> dict[str, Any]:
    """Return mean, standard deviation (n - 1; None for fewer than two values) and the values themselves."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    return {
        "mean": statistics.fmean(known) if known else None,
        "std": statistics.stdev(known) if len(known) > 1 else None,
        "values": known,
    }


def add_step_ratios(runs: Sequence[dict[str, Any]], baseline: str) -> None:
    """Set ``step_ratio`` of every run: its step time over that of the baseline with the same optimizer and seed."""
    times = {(run["optim"], run["seed"]): run["timing"]["step_ms"] for run in runs if run["norm"] == baseline}
    for run in runs:
        reference, own = times.get((run["optim"], run["seed"])), run["timing"]["step_ms"]
        run["step_ratio"] = own / reference if own and reference else None


def table(runs: Sequence[Summary], baseline: str) -> list[dict[str, Any]]:
    """Return one row per (norm, optimizer), in the order of the runs.

    Means are over the complete runs; ``difference`` is the test accuracy minus the baseline's at the same optimizer and
    seed, over the seeds that both completed (None for the baseline itself and where there is no such pair).

    Args:
        runs: Summaries with ``step_ratio``.
        baseline: The norm that differences refer to.
    """
    cells: dict[tuple[str, str], list[Summary]] = {}
    for run in runs:
        cells.setdefault((run["norm"], run["optim"]), []).append(run)
    reference = {
        (run["optim"], run["seed"]): run["result"]["test_accuracy"]
        for run in runs
        if run["norm"] == baseline and run["status"] == "complete"
    }
    return [_row(norm, optim, cell, None if norm == baseline else reference) for (norm, optim), cell in cells.items()]


def _row(
    norm: str, optim: str, cell: Sequence[Summary], reference: Mapping[tuple[str, int], float] | None
) -> dict[str, Any]:
    done = [run for run in cell if run["status"] == "complete"]

    def over(value: Callable[[Summary], float | None]) -> dict[str, Any]:
        return spread(value(run) for run in done)

    difference = None
    if reference is not None:
        pairs = spread(
            run["result"]["test_accuracy"] - reference[optim, run["seed"]]
            for run in done
            if (optim, run["seed"]) in reference
        )
        if pairs["values"]:
            difference = {"mean": pairs["mean"], "std": pairs["std"], "n": len(pairs["values"])}
    holds = [run["result"]["shift_holds"] for run in done if run["result"]["shift_holds"] is not None]
    ratios = over(lambda run: run["step_ratio"])
    return {
        "norm": norm,
        "optim": optim,
        "seeds": len(cell),
        "complete": len(done),
        "diverged": sum(run["status"] == "diverged" for run in cell),
        "refused": sum(run["status"] == "refused" for run in cell),
        "reason": next((run["reason"] for run in cell if run["reason"]), None),
        "notes": sorted({note for run in cell for note in run["notes"]}),
        "test_accuracy": over(lambda run: run["result"]["test_accuracy"]),
        "train_loss": over(lambda run: run["result"]["train_loss"]),
        "difference": difference,
        "shift_w1": over(lambda run: run["result"]["shift_w1"]),
        "shift_relative": over(lambda run: run["result"]["shift_relative"]),
        "shift_interval_holds": all(holds) if holds else None,
        "step_ms": over(lambda run: run["timing"]["step_ms"]),
        "step_ratio": statistics.median(ratios["values"]) if ratios["values"] else None,
    }
