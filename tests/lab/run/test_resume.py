"""A run may be ended anywhere; begun again it gives the same bits."""

import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
import time

import pytest

from flexnorm.lab import files as files_module
from flexnorm.lab.run import Interrupted, compare, train_run


class Crash(BaseException):
    """Power failure."""


def crash_at(monkeypatch, number, half):
    """Let the write number `number` fail: before it, or after half of its bytes."""
    calls = [0]

    def failing(original):
        def write(path, *args):
            calls[0] += 1
            if calls[0] != number:
                return original(path, *args)
            if half:
                size = path.stat().st_size if path.exists() else 0
                original(path, *args)
                if path.suffix == ".csv":
                    os.truncate(path, (size + path.stat().st_size) // 2)
            raise Crash

        return write

    for module, name in (
        ("flexnorm.lab.run.loop", "atomic_write"),
        ("flexnorm.lab.run.loop", "append_rows"),
        ("flexnorm.lab.run.folder", "atomic_write"),
        ("flexnorm.lab.files", "atomic_write"),
    ):
        monkeypatch.setattr(f"{module}.{name}", failing(getattr(files_module, name)))


@pytest.mark.parametrize("half", [False, True])
def test_a_crash_at_any_write_leaves_a_run_that_resumes_bit_for_bit(one, images, tmp_path, summaries, half):
    whole = tmp_path / "whole"
    train_run(one, images, whole / "runs/batch/sgd/seed0")
    expected = summaries(whole)
    crashes = 0
    for number in range(1, 50):
        out = tmp_path / str(number)
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, number, half)
            try:
                train_run(one, images, out / "runs/batch/sgd/seed0")
                break
            except Crash:
                crashes += 1
        train_run(one, images, out / "runs/batch/sgd/seed0")
        assert summaries(out) == expected, f"crash at write {number}"
        shutil.rmtree(out)
    assert crashes >= 11  # config, two headers, three files per epoch, weights, summary


@pytest.mark.quick(6)
@pytest.mark.parametrize("norm", ["batch", "population", "normprop"])
@pytest.mark.parametrize("optim", ["sgd", "sgdg", "adamg", "adamw", "sgdp", "adamp"])
def test_interrupted_after_an_epoch_every_optimizer_resumes_bit_for_bit(
    small, images, tmp_path, summaries, norm, optim
):
    # A lag of two makes the measurement begun at update 3 end in the next epoch.
    config = dataclasses.replace(small, optims={optim: {}}, norms=(norm,), shift_lag=2, augment=("flip", "shift"))
    train_run(config, images, tmp_path / "whole/runs/a/b/c")

    def stop(_):
        raise Crash

    with pytest.raises(Crash):
        train_run(config, images, tmp_path / "parts/runs/a/b/c", on_epoch=stop)
    train_run(config, images, tmp_path / "parts/runs/a/b/c")
    assert summaries(tmp_path / "whole") == summaries(tmp_path / "parts")


def test_rare_checkpoints_resume_too(one, images, tmp_path, summaries):
    config = dataclasses.replace(one, epochs=5, checkpoint_every=2)
    train_run(config, images, tmp_path / "whole/runs/a/b/c")

    def stop(epoch):
        if epoch.epoch == 3:
            raise Crash

    with pytest.raises(Crash):
        train_run(config, images, tmp_path / "parts/runs/a/b/c", on_epoch=stop)
    seen = []
    train_run(config, images, tmp_path / "parts/runs/a/b/c", on_epoch=seen.append)
    assert [epoch.epoch for epoch in seen] == [3, 4, 5]
    assert summaries(tmp_path / "whole") == summaries(tmp_path / "parts")


def test_a_wrong_order_would_be_noticed(one, images, tmp_path, summaries, monkeypatch):
    """The negative control: a resumed run that replays the order of the first epoch gives other bits."""
    train_run(one, images, tmp_path / "whole/runs/a/b/c")

    def stop(_):
        raise Crash

    with pytest.raises(Crash):
        train_run(one, images, tmp_path / "parts/runs/a/b/c", on_epoch=stop)
    from flexnorm.lab.run import randomness

    order = randomness.order
    monkeypatch.setattr(randomness, "order", lambda count, seed, _epoch: order(count, seed, 0))
    train_run(one, images, tmp_path / "parts/runs/a/b/c")
    assert summaries(tmp_path / "whole") != summaries(tmp_path / "parts")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_at_a_safe_moment_and_the_same_call_goes_on(small, images, tmp_path, summaries, number, code):
    compare(small, tmp_path / "whole", data=images)

    def interrupt(event):
        if event.kind == "epoch" and event.index == 2 and event.epoch.epoch == 1:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted) as caught:
        compare(small, tmp_path / "parts", data=images, notify=interrupt)
    assert caught.value.exit_code == code
    assert len(list((tmp_path / "parts").glob("runs/*/*/*/summary.json"))) == 1
    kinds = []
    results = compare(small, tmp_path / "parts", data=images, notify=lambda event: kinds.append(event.kind))
    assert kinds.count("skip") == 1
    assert kinds.count("epoch") == 2 * 2 + 1  # the second run had done one of its two epochs
    assert summaries(tmp_path / "whole") == summaries(tmp_path / "parts")
    assert [run.status for run in results.runs] == ["complete"] * 4


def work(config, images, out):
    compare(config, out, data=images)


@pytest.mark.slow
def test_killed_at_random_moments_the_summaries_are_those_of_an_uninterrupted_run(small, images, tmp_path, summaries):
    # A fork server imports torch once; each comparison is then a fresh process of its own.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flexnorm.lab.run", "lightning_fabric"])
    config = dataclasses.replace(small, epochs=6)

    def start(out):
        process = context.Process(target=work, args=(config, images, out))
        process.start()
        return process

    process = start(tmp_path / "warm")  # the server's imports are not to count as the time of a run
    process.join()
    begin = time.monotonic()
    process = start(tmp_path / "whole")
    process.join()
    assert process.exitcode == 0
    duration = time.monotonic() - begin

    rng = random.Random(0)
    killed = 0
    for _ in range(6):
        process = start(tmp_path / "parts")
        process.join(rng.uniform(0.05, 0.3) * duration)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed >= 3
    process = start(tmp_path / "parts")
    process.join()
    assert process.exitcode == 0
    assert summaries(tmp_path / "whole") == summaries(tmp_path / "parts")
    results = json.loads((tmp_path / "parts" / "results.json").read_text())
    assert len(results["runs"]) == 4


def test_a_resume_in_another_environment_says_so(one, images, tmp_path, monkeypatch):
    """Other kernels or thread counts round differently: such a run must not look like an uninterrupted one."""

    def stop(_):
        raise Crash

    folder = tmp_path / "runs/batch/sgd/seed0"
    monkeypatch.setattr("flexnorm.lab.run.environment.status", lambda: "compiled kernels at /some/where")
    with pytest.raises(Crash):
        train_run(one, images, folder, on_epoch=stop)
    monkeypatch.setattr("flexnorm.lab.run.environment.status", lambda: "torch's own kernels")
    summary = train_run(one, images, folder)
    assert summary.status == "complete"
    assert any("kernels 'compiled' became 'torch'" in note for note in summary.notes)
