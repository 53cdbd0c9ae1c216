"""The sentences at the head say what the numbers say, and no more."""

import dataclasses

import pytest

from flexnorm.lab.records import Run, Study
from flexnorm.lab.report.headline import headline
from flexnorm.lab.report.load import load


def of(values, baseline="batch", **changes):
    """The headline of runs given as {norm: accuracies per seed}."""
    runs = tuple(
        dataclasses.replace(Run(norm, "sgd", seed, "complete", test_accuracy=value), **changes)
        for norm, accuracies in values.items()
        for seed, value in enumerate(accuracies)
    )
    study = Study("s", runs, tuple(values), ("sgd",), baseline)
    return headline(study, study.cells)


def test_a_clear_winner():
    got = of({"batch": (0.90, 0.91, 0.92), "group": (0.95, 0.961, 0.97), "none": (0.5, 0.5, 0.5)})
    assert got.claim == "group with sgd comes out ahead of batch by 5.03 ± 0.06 points"
    assert "leaves zero out" in got.details[1]
    assert "lies above that of all 2 other rows" in got.details[2]
    assert got.tiles[0] == ("96.03\u202f%", "highest mean accuracy", "group with sgd")


def test_a_winner_within_the_noise():
    got = of({"batch": (0.95, 0.93, 0.96), "group": (0.96, 0.96, 0.95), "none": (0.94, 0.9, 0.9)})
    assert got.claim == "group with sgd comes out ahead, but the seeds do not tell it from batch"
    assert "contains zero, so these 3 seeds do not tell the two apart" in got.details[1]
    assert "overlaps with that of 1 of the 2 other rows" in got.details[2]


def test_the_baseline_may_win():
    got = of({"batch": (0.97, 0.98, 0.97), "group": (0.9, 0.91, 0.9), "none": (0.1, 0.1, 0.2)})
    assert got.claim == "batch with sgd stays ahead of group by 7.00 points, on each of 3 seeds"
    assert "above group with sgd" in got.details[1]


@pytest.mark.parametrize(
    ("values", "claim"),
    [
        ({"batch": (0.9,)}, "batch with sgd reached 90.00\u202f% test accuracy"),
        ({"batch": (0.9,), "none": (0.95,)}, "none with sgd comes out ahead of batch by 5.00 points, on a single seed"),
        ({"batch": (0.9, 0.9), "none": (0.9, 0.9)}, "batch with sgd and none are level"),
        (
            {"batch": (0.9, 0.8), "none": (0.9, 0.81)},
            "none with sgd comes out ahead, but the seeds do not tell it from batch",
        ),
    ],
)
def test_claims(values, claim):
    assert of(values).claim == claim


def test_without_a_baseline_the_best_two_are_compared():
    got = of({"group": (0.9, 0.91, 0.9), "layer": (0.95, 0.96, 0.97)})
    assert "ahead of group by" in got.claim


def test_equal_differences_have_no_interval():
    got = of({"batch": (0.5, 0.5), "none": (0.75, 0.75)})
    assert "the same on every seed" in got.details[1]
    assert "on each of 2 seeds" in got.details[0]
    level = of({"batch": (0.5, 0.5), "none": (0.5, 0.5)})
    assert "exactly what none with sgd has" in level.details[1]


def test_one_row_alone():
    assert "nothing to compare with" in of({"batch": (0.9,)}).details[0]
    assert "90.00" in of({"batch": (0.9, 0.92)}).details[0]


def test_nothing_to_tell(study):
    empty = Study("s", (), (), ())
    assert headline(empty, ()).claim == "There is no run yet"
    study.make(("batch",), ("sgd",), 1, results=False)
    (study.out / "runs/batch/sgd/seed0/summary.json").unlink()
    loaded = load(study.out)
    assert headline(loaded, loaded.cells).claim == "No run is complete yet"


def test_the_least_shift_is_named():
    runs = tuple(
        Run(norm, "sgd", 0, "complete", test_accuracy=0.9, shift_relative=shift)
        for norm, shift in (("batch", 0.04), ("none", 0.01))
    )
    study = Study("s", runs, ("batch", "none"), ("sgd",))
    text = " ".join(headline(study, study.cells).details)
    assert "shift least under none with sgd: by 0.0100 of their spread per step, 4.0 times less than batch" in text
