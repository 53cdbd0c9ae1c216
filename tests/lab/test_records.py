"""The records of runs and studies: what is computed over seeds, and that files give back what was written."""

import dataclasses
import math
import statistics

import pytest

from flexnorm.lab.files import plain
from flexnorm.lab.records import Run, Study, with_step_ratios
from flexnorm.lab.replicates import plus_minus


def run(norm, optim, seed, accuracy, status="complete", ms=2.0, holds=True):
    return {
        "norm": norm,
        "optim": optim,
        "seed": seed,
        "status": status,
        "reason": None if status == "complete" else f"{status} because",
        "notes": ["n"] if norm == "none" else [],
        "result": {
            "test_accuracy": accuracy,
            "train_loss": 0.1,
            "shift_w1": 0.5,
            "shift_relative": None,
            "shift_holds": holds,
        },
        "timing": {"step_ms": ms},
    }


def test_means_spreads_and_paired_differences():
    runs = [
        run("batch", "sgd", 0, 0.90, ms=2.0),
        run("group", "sgd", 0, 0.95, ms=3.0),
        run("batch", "sgd", 1, 0.80, ms=4.0),
        run("group", "sgd", 1, 0.82, ms=4.0),
        run("group", "sgd", 2, 0.99, holds=False),
        run("batch", "sgd", 2, None, status="diverged"),
        run("none", "sgd", 0, None, status="refused", ms=None, holds=None),
    ]
    study = results(runs)
    assert [plain(r.step_ratio) for r in study.runs] == [1.0, 1.5, 1.0, 1.0, 1.0, 1.0, None]
    batch, group, none = plain(study.asdict())["table"]
    assert (batch["complete"], batch["diverged"], batch["seeds"]) == (2, 1, 3)
    assert batch["reason"] == "diverged because"
    assert batch["difference"] is None
    assert batch["test_accuracy"]["mean"] == pytest.approx(0.85)
    assert group["test_accuracy"]["std"] == pytest.approx(statistics.stdev([0.95, 0.82, 0.99]))
    # Paired over the seeds that both completed: +5 and +2 points.
    assert group["difference"] == pytest.approx({"mean": 0.035, "std": statistics.stdev([0.05, 0.02]), "n": 2})
    assert group["shift_interval_holds"] is False
    assert batch["shift_interval_holds"] is True
    assert group["step_ratio"] == 1.0
    assert group["shift_relative"] == {"mean": None, "std": None, "values": []}
    assert none["refused"] == 1
    assert none["test_accuracy"]["mean"] is None
    assert none["shift_interval_holds"] is None
    assert none["difference"] is None
    assert none["step_ratio"] is None
    assert none["notes"] == ["n"]


def test_no_baseline_in_the_experiment():
    runs = [run("group", "sgd", 0, 0.9)]
    study = results(runs)
    assert math.isnan(study.runs[0].step_ratio)
    assert study.asdict()["table"][0]["difference"] is None


def results(runs):
    """A study of these summaries."""
    study = Study.read({"runs": runs, "baseline": "batch"})
    return dataclasses.replace(study, runs=with_step_ratios(study.runs, "batch"))


def test_words():
    assert plus_minus(0.5, 0.25, "+.1f") == "+0.5 ± 0.2"
    assert plus_minus(0.5, math.nan, ".1f") == plus_minus(0.5, None, ".1f") == "0.5"
    assert plus_minus(None, None, ".1f", missing="–") == plus_minus(math.nan, 1.0, ".1f", missing="–") == "–"


@pytest.mark.parametrize("value", [None, "x", True, [], "", 10**400])
def test_what_is_no_number_is_not_known(value):
    run = Run.read({"norm": "batch", "result": {"test_accuracy": value, "shift": 3}, "notes": value, "status": value})
    assert math.isnan(run.test_accuracy)
    assert (run.shift, run.status, run.seed, run.interval_holds) == ({}, "unfinished", 0, None)
