import itertools
import json
import math
import os
import pickle
import signal
import threading

import pytest
import torch

from flexnorm.lab import files, records
from flexnorm.lab.run import BusyError, WriteError, folder, randomness
from flexnorm.lab.run.environment import Interrupted, StopRequest, stop_on_signals
from flexnorm.lab.run.folder import load_checkpoint, save_checkpoint, truncate
from flexnorm.lab.run.randomness import augment
from flexnorm.lab.run.settings import SCHEDULES, filled, schedule_factor

METRICS, SHIFT = records.METRICS_HEADER, records.SHIFT_HEADER


class TestSchedule:
    def curve(self, name, epochs=10, per_epoch=10, **args):
        complete = filled("schedule", name, SCHEDULES[name], args)
        return [schedule_factor(name, complete, step, per_epoch, epochs) for step in range(epochs * per_epoch)]

    def test_constant(self):
        assert set(self.curve("constant")) == {1.0}

    def test_cosine_is_torch_cosine(self):
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100, eta_min=0.1)
        for value in self.curve("cosine", final=0.1):
            assert value == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
            optimizer.step()
            reference.step()

    def test_onecycle_rises_to_one_and_falls(self):
        values = self.curve("onecycle")
        assert values[0] == pytest.approx(0.04)
        assert values[30] == pytest.approx(1.0)
        assert values[:31] == sorted(values[:31])
        assert values[30:] == sorted(values[30:], reverse=True)
        assert values[-1] < 0.01
        assert self.curve("onecycle", peak=1.0)[-1] == pytest.approx(1, abs=0.01)

    def test_step_drops_and_every(self):
        values = self.curve("step", drops=[3, 6], factor=0.2)
        assert [values[i] for i in (0, 29, 30, 59, 60, 99)] == pytest.approx([1, 1, 0.2, 0.2, 0.04, 0.04])
        assert self.curve("step", every=4, factor=0.5)[::10] == pytest.approx([1] * 4 + [0.5] * 4 + [0.25] * 2)

    def test_warmup_is_linear_and_never_zero(self):
        values = self.curve("constant", warmup=0.2)
        assert values[0] > 0
        assert all(b - a == pytest.approx(values[0]) for a, b in itertools.pairwise(values[:20]))
        assert values[20:] == [1.0] * 80
        assert self.curve("cosine", warmup=0.5)[50] == pytest.approx(1.0)


class TestSeeding:
    def test_orders_are_permutations_that_depend_on_seed_and_epoch_alone(self):
        torch.manual_seed(1)
        first = randomness.order(50, seed=3, epoch=2)
        torch.manual_seed(2)
        assert torch.equal(first, randomness.order(50, seed=3, epoch=2))
        assert torch.equal(first.sort().values, torch.arange(50))
        assert not torch.equal(first, randomness.order(50, seed=3, epoch=3))
        assert not torch.equal(first, randomness.order(50, seed=4, epoch=2))

    def test_the_global_generator_is_left_alone(self):
        before = torch.get_rng_state()
        randomness.order(9, 0, 0)
        assert torch.equal(before, torch.get_rng_state())

    def test_purposes_are_unrelated(self):
        assert len({randomness.mixed(s, e, p) for s in range(9) for e in range(9) for p in "ab"}) == 162


class TestAugment:
    x = torch.arange(2 * 3 * 5 * 4, dtype=torch.float32).reshape(2, 3, 5, 4)

    def generator(self):
        return torch.Generator().manual_seed(0)

    def test_nothing_is_the_same_tensor(self):
        assert augment(self.x, (), 4, self.generator()) is self.x

    def test_flip_gives_each_image_or_its_mirror_image(self):
        x = torch.randn(64, 2, 3, 4)
        out = augment(x, ("flip",), 4, self.generator())
        mirrored = [bool(torch.equal(a, b.flip(-1))) for a, b in zip(out, x, strict=True)]
        kept = [bool(torch.equal(a, b)) for a, b in zip(out, x, strict=True)]
        assert [a != b for a, b in zip(mirrored, kept, strict=True)] == [True] * 64
        assert 20 < sum(mirrored) < 44

    @pytest.mark.parametrize(("kind", "mode"), [("shift", "constant"), ("crop", "reflect")])
    def test_displacements_are_crops_of_the_padded_image(self, kind, mode):
        x = torch.randn(200, 1, 4, 5)
        out = augment(x, (kind,), 2, self.generator())
        padded = torch.nn.functional.pad(x, (2, 2, 2, 2), mode=mode)
        seen = set()
        for image, big in zip(out, padded, strict=True):
            places = [(i, j) for i in range(5) for j in range(5) if torch.equal(big[:, i : i + 4, j : j + 5], image)]
            assert places
            seen.update(places)
        assert len(seen) == 25  # every displacement occurs

    def test_too_wide_a_border_is_refused(self):
        with pytest.raises(ValueError, match="border of 4 pixels, too wide for images of 5x4"):
            augment(self.x, ("crop",), 4, self.generator())


class TestFiles:
    def test_atomic_write_leaves_the_old_file_if_the_disk_is_full(self, tmp_path, monkeypatch):
        path = tmp_path / "a"
        files.atomic_write(path, b"old")

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(WriteError, match=r"cannot write .*a: No space left on device"):
            files.atomic_write(path, b"new")
        assert path.read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir()] == ["a"]

    def test_rows_come_back_bit_for_bit_and_sizes_are_right(self, tmp_path):
        path = tmp_path / "a.csv"
        values = [0.1, 1 / 3, 1e-320, math.pi * 1e300, math.nan, -math.inf]
        assert files.read_rows(path) == []
        size = files.append_rows(path, "n,x", [])
        assert size == path.stat().st_size == 4
        assert files.append_rows(path, "n,x", [[i, v] for i, v in enumerate(values)]) == path.stat().st_size
        back = [float(row["x"]) for row in files.read_rows(path)]
        assert [v.hex() for v in back] == [v.hex() for v in values]

    def test_json_has_no_nan(self, tmp_path):
        files.dump_json(tmp_path / "a.json", {"x": [math.nan, 1.5, (2, math.inf)], "y": {"z": "t"}})
        assert json.loads((tmp_path / "a.json").read_text()) == {"x": [None, 1.5, [2, None]], "y": {"z": "t"}}

    @pytest.mark.parametrize("content", ["{", "[1]", ""])
    def test_damaged_json_is_named(self, tmp_path, content):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(ValueError, match=r"a\.json is damaged"):
            files.read_json(tmp_path / "a.json")

    def test_a_folder_is_held_by_one_process(self, tmp_path):
        message = f"in use by another flexnorm process .id {os.getpid()}"
        with files.exclusive(tmp_path), pytest.raises(BusyError, match=message), files.exclusive(tmp_path):
            pass
        with files.exclusive(tmp_path):
            pass


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


class TestCheckpoint:
    def test_round_trip(self, tmp_path):
        state = {"run": "a", "x": torch.randn(3), "n": 4, "nested": {"f": [0.5, None, "s"]}}
        save_checkpoint(tmp_path / "c.pt", state)
        back = load_checkpoint(tmp_path / "c.pt", "a")
        assert torch.equal(back["x"], state["x"])
        assert back["nested"] == state["nested"]

    def test_another_run_or_version_is_refused(self, tmp_path):
        save_checkpoint(tmp_path / "c.pt", {"run": "a"})
        with pytest.raises(ValueError, match="belongs to a run with other settings"):
            load_checkpoint(tmp_path / "c.pt", "b")
        torch.save([1], tmp_path / "c.pt")
        with pytest.raises(ValueError, match="is no checkpoint of this version"):
            load_checkpoint(tmp_path / "c.pt", "b")

    @pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
    def test_truncated_files_are_refused(self, tmp_path, keep):
        path = tmp_path / "c.pt"
        save_checkpoint(path, {"run": "a", "x": torch.randn(300)})
        raw = path.read_bytes()
        path.write_bytes(raw[: int(keep * len(raw)) if keep < 1 else keep])
        with pytest.raises(ValueError, match=r"is damaged or holds more than plain data.*delete"):
            load_checkpoint(path, "a")

    def test_a_malicious_pickle_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        torch.save({"format": 1, "run": "a", "evil": Evil()}, tmp_path / "c.pt")
        with pytest.raises(ValueError, match="holds more than plain data"):
            load_checkpoint(tmp_path / "c.pt", "a")
        (tmp_path / "c.pt").write_bytes(pickle.dumps(Evil()))
        with pytest.raises(ValueError, match="holds more than plain data"):
            load_checkpoint(tmp_path / "c.pt", "a")
        assert not (tmp_path / "pwned").exists()

    def test_truncate(self, tmp_path):
        path = tmp_path / "a.csv"
        path.write_bytes(b"123456")
        truncate(path, 4)
        truncate(path, 4)
        assert path.read_bytes() == b"1234"
        with pytest.raises(ValueError, match="has 4 bytes, fewer than the 9 at the last checkpoint"):
            truncate(path, 9)
        with pytest.raises(ValueError, match="has 0 bytes"):
            truncate(tmp_path / "none.csv", 9)


class TestStop:
    def test_a_signal_becomes_a_request_and_handlers_come_back(self):
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            with stop_on_signals() as stop:
                stop.check()
                os.kill(os.getpid(), number)
                with pytest.raises(Interrupted) as caught:
                    stop.check()
                assert caught.value.exit_code == code
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before

    def test_a_second_ctrl_c_interrupts_at_once(self):
        with stop_on_signals():
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)

    def test_other_threads_are_left_alone(self):
        seen = []

        def work():
            with stop_on_signals() as stop:
                seen.append(stop)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert isinstance(seen[0], StopRequest)


class TestSummary:
    def test_the_result_is_recomputed_from_the_files(self, tmp_path):
        (tmp_path / "metrics.csv").write_text(
            f"{METRICS}\n1,5,0.5,0.6,0.91,0.1,2.0,1.0\n2,10,0.4,0.5,0.9,0.1,2.0,2.0\n"
        )
        rows = [
            "1,3,a,0.1,0.2,0.3,2.0,0.05,0.1,0.15",
            "2,7,a,0.3,0.4,0.5,2.0,0.15,0.2,0.25",
            "1,3,b,1,2,3,4,0.25,0.5,0.75",
        ]
        (tmp_path / "shift.csv").write_text("\n".join([SHIFT, *rows]) + "\n")
        result = folder.result(tmp_path)
        assert result["test_accuracy"] == 0.9
        assert result["best_test_accuracy"] == 0.91
        assert result["shift"]["a"] == pytest.approx(
            {"lower": 0.2, "w1": 0.3, "upper": 0.4, "relative_lower": 0.1, "relative": 0.15, "relative_upper": 0.2}
        )
        assert result["shift_w1"] == pytest.approx((0.3 + 2) / 2)
        assert result["shift_relative"] == pytest.approx((0.15 + 0.5) / 2)
        assert result["shift_measurements"] == 3
        assert result["shift_holds"] is True

    @pytest.mark.parametrize("values", ["0.3,0.2,0.4", "0.1,0.5,0.4"])
    def test_an_interval_that_does_not_hold_is_seen(self, tmp_path, values):
        (tmp_path / "shift.csv").write_text(f"{SHIFT}\n1,3,a,{values},1,1,1,1\n")
        assert folder.result(tmp_path)["shift_holds"] is False

    def test_measurements_of_a_network_that_has_diverged_do_not_count(self, tmp_path):
        rows = "1,3,a,0.1,0.2,0.3,1,0.1,0.2,0.3\n1,4,a,nan,nan,nan,nan,nan,nan,nan\n1,4,b,nan,nan,nan,nan,nan,nan,nan\n"
        (tmp_path / "shift.csv").write_text(f"{SHIFT}\n{rows}")
        result = folder.result(tmp_path)
        assert result["shift"]["a"]["w1"] == 0.2
        assert math.isnan(result["shift"]["b"]["w1"])
        assert (result["shift_measurements"], result["shift_holds"]) == (1, True)

    def test_a_run_without_an_epoch_has_no_numbers(self, tmp_path):
        result = folder.result(tmp_path)
        assert math.isnan(result["train_loss"])
        assert result["shift"] == {}
        assert result["shift_holds"] is None

    def test_the_median_step_leaves_out_the_warm_up(self):
        assert folder.step_ms([9.0] * 5 + [0.001, 0.002, 0.003, 0.002, 0.007]) == pytest.approx(2)
        assert folder.step_ms([5.0, 0.001]) == pytest.approx(1)
        assert folder.step_ms([0.001]) == pytest.approx(1)
        assert math.isnan(folder.step_ms([]))
