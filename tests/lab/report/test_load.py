"""The folder of a comparison at every stage of its life becomes a study."""

import json
import math
import shutil

import pytest

from flexnorm.lab.report.load import load


def test_a_whole_folder(study):
    runs = study.make(("none", "batch"), ("sgd", "sgdg"), 2)
    got = load(study.out)
    assert got.norms == ("batch", "none")  # the baseline first
    assert got.optims == ("sgd", "sgdg")
    assert len(got.runs) == len(runs) == 8
    assert all(run.complete for run in got.runs)
    assert got.total_seconds == 123.4
    assert got.notes == ()
    one = next(r for r in runs if (r["norm"], r["optim"], r["seed"]) == ("none", "sgdg", 1))
    mine = next(r for r in got.runs if (r.norm, r.optim, r.seed) == ("none", "sgdg", 1))
    assert mine.test_accuracy == one["result"]["test_accuracy"]
    assert mine.step_ratio == one["step_ratio"]
    lows = [layer["lower"] for layer in one["result"]["shift"].values()]
    assert mine.shift_lower == pytest.approx(sum(lows) / len(lows))
    assert mine.layers == ("0.1", "1.1", "2.1")
    assert [row.epoch for row in mine.epochs] == [1, 2, 3, 4]


def test_summaries_are_enough(study):
    study.make(results=False)
    got = load(study.out)
    assert len(got.complete) == 18
    assert got.command.startswith("flexnorm compare")
    assert got.environment["torch"] == "2.13.0"
    assert math.isnan(got.total_seconds)
    assert math.isnan(got.runs[0].step_ratio)


def test_results_alone_are_enough(study):
    study.make()
    shutil.rmtree(study.out / "runs")
    got = load(study.out)
    assert len(got.complete) == 18
    assert got.runs[0].epochs == ()


def test_bare_runs_without_any_configuration(study):
    study.run("group", "sgd", 3)
    got = load(study.out)
    assert [(r.norm, r.seed, r.status) for r in got.runs] == [("group", 3, "complete")]
    assert got.baseline == "batch"
    assert not got.has_baseline


def test_missing_and_unfinished_runs_are_known(study):
    study.make(("none", "batch"), ("sgd",), 2, results=False)
    shutil.rmtree(study.out / "runs/none/sgd/seed1")
    (study.out / "runs/batch/sgd/seed0/summary.json").unlink()
    status = {(r.norm, r.seed): (r.status, r.reason) for r in load(study.out).runs}
    assert status["none", 1][0] == "missing"
    assert status["batch", 0] == ("unfinished", "stopped after epoch 4; the same command resumes it")
    assert status["none", 0][0] == "complete"


@pytest.mark.parametrize("broken", ["{", "[1, 2]", "\udcff"])
def test_a_broken_summary_costs_only_itself(study, broken):
    study.make(("batch",), ("sgd",), 2, results=False)
    path = study.out / "runs/batch/sgd/seed1/summary.json"
    path.write_bytes(broken.encode("utf-8", "surrogateescape"))
    got = load(study.out)
    assert [r.status for r in got.runs] == ["complete", "unfinished"]
    assert len(got.notes) == 1
    assert "runs/batch/sgd/seed1/summary.json" in got.notes[0]


def test_broken_tables_cost_only_themselves(study):
    study.make(("batch",), ("sgd",), 1)
    folder = study.out / "runs/batch/sgd/seed0"
    text = (folder / "metrics.csv").read_text()
    (folder / "metrics.csv").write_text(text[:-15] + "\n5,oops,nan,,inf")  # half a line, a word, NaN, nothing, infinity
    (folder / "shift.csv").write_bytes(b"\xff\xfe\x00")
    got = load(study.out)
    rows = got.runs[0].epochs
    assert len(rows) == 5
    assert math.isnan(rows[4].step)
    assert math.isnan(rows[4].train_loss)
    assert math.isnan(rows[4].test_loss)
    assert rows[4].test_accuracy == math.inf
    assert got.runs[0].shifts == ()
    assert "shift.csv" in got.notes[0]


def test_null_stands_for_no_number(study):
    study.make(("batch",), ("sgd",), 1, test_accuracy=None, shift_relative=None, results=False)
    run = load(study.out).runs[0]
    assert math.isnan(run.test_accuracy)
    assert math.isnan(run.shift_relative)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [("seeds", 3, 3), ("seeds", [4, 9], 2 + 1), ("seeds", True, 1), ("seeds", "many", 1)],
)
def test_seeds_by_count_or_by_name(study, key, value, expected):
    study.make(("batch",), ("sgd",), 1, results=False)
    marker = json.loads((study.out / "experiment.json").read_text())
    marker["config"][key] = value
    (study.out / "experiment.json").write_text(json.dumps(marker))
    assert len(load(study.out).runs) == expected


def test_names_separated_by_commas(study):
    study.run("batch", "sgd", 0)
    (study.out / "experiment.json").write_text(
        json.dumps({"config": {"norm": "group, batch", "optim": "sgd", "seeds": 1, "baseline": "group"}})
    )
    got = load(study.out)
    assert got.norms == ("group", "batch")
    assert got.baseline == "group"
    assert [r.status for r in got.runs] == ["missing", "complete"]


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds neither"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        load(tmp_path / "absent")


def test_a_run_without_name_or_outside_of_the_folder_is_left_out(study):
    study.make(("batch",), ("sgd",), 1)
    results = json.loads((study.out / "results.json").read_text())
    results["runs"] += [{"path": "x"}, {"path": "../elsewhere/seed0", "norm": "n", "optim": "o", "seed": 0}, 7]
    (study.out / "results.json").write_text(json.dumps(results))
    assert len(load(study.out).runs) == 1
