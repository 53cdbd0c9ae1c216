import dataclasses
import errno
import json
import os

import numpy as np
import pytest

from flexnorm.lab import files
from flexnorm.lab.data.images import from_arrays
from flexnorm.lab.records import Study
from flexnorm.lab.run import BusyError, Config, WriteError, compare
from flexnorm.lab.run.compare import runs_of
from flexnorm.lab.run.terminal import console, display, print_table


def test_runs_that_are_compared_are_near_in_time():
    config = Config(norms=("batch", "none"), optims={"sgd": {}, "sgdg": {}}, seeds=(4, 7))
    assert list(runs_of(config))[:5] == [
        ("batch", "sgd", 4),
        ("none", "sgd", 4),
        ("batch", "sgdg", 4),
        ("none", "sgdg", 4),
        ("batch", "sgd", 7),
    ]


def test_results(small, images, tmp_path, capsys):
    config = dataclasses.replace(
        small, norms=("batch", "group", "none"), seeds=(0, 1), overrides={"none": {"lr": 1e30}}
    )
    with display(console()) as show:
        results = compare(config, tmp_path / "out", data=images, notify=show, command="flexnorm compare ...")
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored == files.plain(results.asdict())
    assert Study.read(stored, "out") == dataclasses.replace(results, norms=config.norms, optims=tuple(config.optims))
    assert stored["baseline"] == "batch"
    assert stored["command"] == "flexnorm compare ..."
    assert Config.from_dict(stored["config"]) == config
    assert stored["environment"]["threads"] == 1
    assert len(stored["runs"]) == 12
    for run in stored["runs"]:
        summary = json.loads((tmp_path / "out" / run["path"] / "summary.json").read_text())
        assert {k: run[k] for k in summary} == summary
    assert stored["total_seconds"] >= sum(run["timing"]["wall_s"] for run in stored["runs"]) * 0.99
    rows = {(row["norm"], row["optim"]): row for row in stored["table"]}
    assert list(rows) == [(n, o) for o in ("sgd", "sgdg") for n in ("batch", "group", "none")]
    assert rows["batch", "sgd"]["step_ratio"] == 1.0
    assert rows["batch", "sgd"]["complete"] == 2
    assert rows["group", "sgd"]["difference"]["n"] == 2
    # The un-normalized network at an absurd step diverges; the others are there all the same.
    assert rows["none", "sgd"]["diverged"] == 2
    assert "the training loss became" in rows["none", "sgd"]["reason"]

    with console().capture():
        print_table(results, console())
    print_table(results, console())
    shown = capsys.readouterr().out
    assert "bars: 64 train + 32 test images" in shown
    assert "12 runs" in shown
    assert "diverged" in shown
    assert "none sgd diverged" in shown
    assert "vs batch" in shown


def test_the_same_call_again_skips_what_is_complete(small, images, tmp_path, capsys):
    first = compare(small, tmp_path, data=images)
    events = []
    with display(console()) as show:
        second = compare(small, tmp_path, data=images, notify=lambda e: (events.append(e.kind), show(e)))
    assert events == ["data"] + ["skip"] * 4
    assert second == dataclasses.replace(first, total_seconds=second.total_seconds)
    assert capsys.readouterr().out.count("(was complete)") == 4


def test_another_experiment_is_refused_and_nothing_overwritten(small, images, tmp_path):
    compare(small, tmp_path, data=images, command="flexnorm compare --epochs 2")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"}
    other = dataclasses.replace(small, epochs=3, optims={"sgd": {"lr": 0.05}, "sgdg": {}})
    with pytest.raises(ValueError, match="holds another experiment; nothing was written") as caught:
        compare(other, tmp_path, data=images)
    text = str(caught.value)
    assert "epochs: 2 there, 3 here" in text
    assert "settings.batch/sgd.lr: 0.025 there, 0.05 here" in text
    assert "flexnorm compare --epochs 2" in text
    assert "--out" in text
    other_data = dataclasses.replace(images, digest="other")
    with pytest.raises(ValueError, match="data_digest"):
        compare(small, tmp_path, data=other_data)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"}


def test_foreign_folders_and_files_are_refused(small, images, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"is not empty and holds no experiment .found thesis\.tex"):
        compare(small, tmp_path, data=images)
    with pytest.raises(ValueError, match=r"thesis\.tex is a file; --out needs a folder"):
        compare(small, tmp_path / "thesis.tex", data=images)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_damaged_folders_are_named(small, images, tmp_path):
    compare(small, tmp_path, data=images)
    summary = tmp_path / "runs/batch/sgd/seed0/summary.json"
    summary.write_text("{")
    with pytest.raises(ValueError, match=r"seed0/summary\.json is damaged"):
        compare(small, tmp_path, data=images)


def test_two_processes_do_not_share_a_folder(small, images, tmp_path):
    def second(event):
        if event.kind == "start":
            with pytest.raises(BusyError, match="in use by another flexnorm process"):
                compare(small, tmp_path, data=images)

    assert len(compare(small, tmp_path, data=images, notify=second).runs) == 4


def test_refused_runs_are_in_the_table_and_the_others_train(small, images, tmp_path, capsys):
    config = dataclasses.replace(small, batch_size=1, epochs=1, optims={"sgd": {"lr": 1e-3}}, shift_every=20)
    results = compare(config, tmp_path, data=images)
    batch, normprop = results.cells
    assert (batch.count("refused"), len(batch.complete), len(normprop.complete)) == (1, 0, 1)
    print_table(results, console())
    shown = " ".join(capsys.readouterr().out.split())
    assert "batch sgd refused: batch normalizes by the statistics of the training batch" in shown


def test_what_cannot_work_is_said_before_the_first_run(small, images, tmp_path):
    tiny = from_arrays("tiny", *[np.random.default_rng(0).random((4, 2, 2)), np.arange(4) % 2] * 2)
    config = dataclasses.replace(small, model="vgg_small", model_args={}, batch_size=4)
    with pytest.raises(ValueError, match="model vgg_small with norm batch cannot process images of 1 x 2 x 2"):
        compare(config, tmp_path / "out", data=tiny)
    with pytest.raises(ValueError, match="too wide for images of 6 x 6"):
        compare(dataclasses.replace(small, augment=("crop",), augment_pixels=6), tmp_path / "out", data=images)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", range(0, 40, 3))
def test_a_full_disk_at_any_write_is_one_clear_error_and_the_rest_is_intact(
    one, images, tmp_path, summaries, number, monkeypatch
):
    fsync, calls = os.fsync, [0]

    def full(descriptor):
        calls[0] += 1
        if calls[0] > number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    config = dataclasses.replace(one, epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        if number < 12:
            with pytest.raises(WriteError, match=r"cannot write .*: No space left on device"):
                compare(config, tmp_path / "parts", data=images)
        else:
            compare(config, tmp_path / "parts", data=images)
    compare(config, tmp_path / "parts", data=images)
    compare(config, tmp_path / "whole", data=images)
    assert summaries(tmp_path / "parts") == summaries(tmp_path / "whole")
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_read_only_disk_is_one_clear_error(one, images, tmp_path, monkeypatch):
    from pathlib import Path

    def refuse(self, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(WriteError, match=r"cannot write .*out: Read-only file system"):
        compare(one, tmp_path / "out", data=images)
    assert files.read_rows(tmp_path / "nothing.csv") == []
