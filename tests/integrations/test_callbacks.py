"""The callbacks under small stand-ins for the trainers, which call them as the real ones do.

They were also run under Lightning 2.6.6 and Transformers 5.23.0 (Accelerate 1.15.0): the same assertions hold there.
"""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flexnorm.integrations as integrations
from flexnorm import NothingDone
from flexnorm.integrations import LightningShiftCallback, TransformersShiftCallback
from flexnorm.integrations._watch import base_class, to_device
from flexnorm.shift import MemorySink

X = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
Y = torch.arange(32) % 3


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


class Precision:
    """Counts how often the autocast of the trainer is entered."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype, self.entered = dtype, 0

    @contextlib.contextmanager
    def forward_context(self) -> Iterator[None]:
        self.entered += 1
        with torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype is not None):
            yield


class Logger:
    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.lines.append((step, metrics))


class LightningTrainer:
    """Calls the hooks of a callback in the order of Lightning's fit loop."""

    def __init__(self, callback: Any, accumulate: int = 1, rank: int = 0, dtype: torch.dtype | None = None) -> None:
        self.callback, self.accumulate = callback, accumulate
        self.is_global_zero, self.global_step = rank == 0, 0
        self.precision_plugin, self.loggers = Precision(dtype), [Logger()]

    def fit(self, model: nn.Module, batches: int, form: Any = lambda x, y: (x, y), state: Any = None) -> list[Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if state is not None:
            model.load_state_dict(state["model"])
            self.global_step = state["step"]
            self.callback.load_state_dict(state["callback"])
        if self.callback is not None:
            self.callback.on_train_start(self, model)
        begun = self.global_step
        for index in range(batches):
            x, y = X.roll(index + begun, 0)[:16], Y.roll(index + begun)[:16]
            batch = form(x, y)
            if self.callback is not None:
                self.callback.on_train_batch_start(self, model, batch, index)
            with self.precision_plugin.forward_context():
                loss = nn.functional.cross_entropy(model(x).float(), y)
            (loss / self.accumulate).backward()
            if (index + 1) % self.accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                self.global_step += 1
            if self.callback is not None:
                self.callback.on_train_batch_end(self, model, {"loss": loss}, batch, index)
        if self.callback is not None:
            self.callback.on_train_end(self, model)
        return [value.clone() for value in (*model.state_dict().values(), torch.get_rng_state())]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(u, v) for u, v in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_lightning_trains_bit_identically_and_logs(dtype: torch.dtype | None) -> None:
    alone = LightningTrainer(None, dtype=dtype).fit(net(), 6)
    callback = LightningShiftCallback(every=2, sinks=[sink := MemorySink()])
    assert callback.records == []
    assert callback.monitor is None
    trainer = LightningTrainer(callback, dtype=dtype)
    assert same(trainer.fit(net(), 6), alone)
    assert [(r.step, r.layer) for r in callback.records] == [(1, "1"), (3, "1"), (5, "1")]
    assert sink.records == callback.records
    assert all(0 < r.lower <= r.w1 <= r.upper for r in callback.records)
    (logger,) = trainer.loggers
    assert [step for step, _ in logger.lines] == [1, 3, 5]
    assert logger.lines[0][1]["shift/1/w1"] == callback.records[0].w1
    assert trainer.precision_plugin.entered == 6 + 1 + 6
    probe = callback.monitor._probe
    assert torch.equal(probe, X[:16])


def test_lightning_counts_updates_not_batches_and_watches_on_one_process() -> None:
    callback = LightningShiftCallback(probe=X, every=1, log=False)
    trainer = LightningTrainer(callback, accumulate=2)
    trainer.fit(net(), 6)
    assert callback.monitor.steps == 3
    assert trainer.loggers[0].lines == []
    other = LightningShiftCallback(every=1)
    LightningTrainer(other, rank=1).fit(net(), 2)
    assert other.monitor is None
    assert other.state_dict() == {}
    other.load_state_dict({})


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: x,
        lambda x, y: [x, y],
        lambda x, y: {"input": x, "labels": y},
    ],
)
def test_lightning_takes_the_inputs_out_of_a_batch(form: Any) -> None:
    callback = LightningShiftCallback(every=1)
    LightningTrainer(callback).fit(net(), 2, form)
    assert [r.step for r in callback.records] == [1, 2]


def test_lightning_resumes_exactly(tmp_path: Path) -> None:
    whole = LightningShiftCallback(every=3, lag=2, anchor="both")
    LightningTrainer(whole).fit(net(), 8)
    first, model = LightningShiftCallback(every=3, lag=2, anchor="both"), net()
    trainer = LightningTrainer(first)
    trainer.fit(model, 4)
    state = {"model": model.state_dict(), "step": trainer.global_step, "callback": first.state_dict()}
    torch.save(state, tmp_path / "c.pt")
    second = LightningShiftCallback(every=3, lag=2, anchor="both")
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    # A checkpoint written again before the training has begun loses nothing.
    second.load_state_dict(state["callback"])
    assert second.state_dict()["monitor"]["steps"] == 4
    LightningTrainer(second).fit(net(), 4, state=state)
    assert second.records == whole.records


def test_lightning_closes_its_sinks_when_a_training_fails() -> None:
    class Closing(MemorySink):
        closed = 0

        def close(self) -> None:
            Closing.closed += 1

    callback = LightningShiftCallback(every=1, sinks=[Closing()])
    LightningTrainer(callback).fit(net(), 1)
    callback.on_exception(None, None, KeyboardInterrupt())
    assert Closing.closed == 2
    LightningShiftCallback().on_exception(None, None, KeyboardInterrupt())


# Transformers.


class Classifier(nn.Module):
    """Takes its inputs and labels as keyword arguments, as the models of Transformers do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 6)
        self.norm = nn.LayerNorm(6)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        logits = self.head(self.dropout(self.norm(self.embed(input_ids))).mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


class Items:
    """A data set that draws random numbers, as augmentation does."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": (torch.arange(5) * (index + 1) + torch.randint(2, (5,))) % 10, "labels": index % 3}


def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {
        "input_ids": torch.stack([item["input_ids"] for item in items]),
        "labels": torch.tensor([item["labels"] for item in items]),
    }


class TransformersTrainer:
    """Calls the events of a callback in the order of Transformers' inner training loop."""

    def __init__(self, callback: Any, folder: Path, rank: int = 0) -> None:
        self.callback = callback
        self.args = types.SimpleNamespace(output_dir=str(folder))
        self.state = types.SimpleNamespace(global_step=0, is_world_process_zero=rank == 0)
        self.model = Classifier()
        self.loader: Any = types.SimpleNamespace(dataset=Items(), collate_fn=collate)

    def call(self, event: str) -> None:
        if self.callback is not None:
            getattr(self.callback, event)(
                self.args, self.state, "control", model=self.model, train_dataloader=self.loader, optimizer=None
            )

    def train(self, steps: int, resume: int | None = None, save: int = 4) -> list[Tensor]:
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        torch.manual_seed(5)
        folder = Path(self.args.output_dir)
        if resume is not None:
            kept = torch.load(folder / f"checkpoint-{resume}" / "model.pt", weights_only=True)
            self.model.load_state_dict(kept["model"])
            torch.set_rng_state(kept["rng"])
            self.state.global_step = resume
        self.call("on_train_begin")
        while self.state.global_step < steps:
            index = self.state.global_step
            batch = collate([self.loader.dataset[i % 24] for i in range(8 * index, 8 * index + 8)])
            optimizer.zero_grad()
            self.model(**batch)["loss"].backward()
            optimizer.step()
            self.state.global_step += 1
            self.call("on_step_end")
            if self.state.global_step % save == 0:
                target = folder / f"checkpoint-{self.state.global_step}"
                target.mkdir(exist_ok=True)
                torch.save({"model": self.model.state_dict(), "rng": torch.get_rng_state()}, target / "model.pt")
                self.call("on_save")
        self.call("on_train_end")
        return [*self.model.state_dict().values(), torch.get_rng_state()]


def test_transformers_trains_bit_identically(tmp_path: Path) -> None:
    alone = TransformersTrainer(None, tmp_path).train(6)
    callback = TransformersShiftCallback(every=2, probe_size=8)
    assert callback.monitor is None
    assert same(TransformersTrainer(callback, tmp_path).train(6), alone)
    assert [(r.step, r.layer) for r in callback.records] == [(1, "norm"), (3, "norm"), (5, "norm")]
    assert callback.monitor._probe["input_ids"].shape == (8, 5)
    assert all(r.w1 > 0 for r in callback.records)


def test_transformers_resumes_exactly(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    options: dict[str, Any] = {"every": 3, "lag": 2, "anchor": "both"}
    whole = TransformersShiftCallback(**options)
    TransformersTrainer(whole, tmp_path / "a").train(10)
    TransformersTrainer(TransformersShiftCallback(**options), tmp_path / "b").train(7)
    assert sorted(p.name for p in (tmp_path / "b" / "checkpoint-4").iterdir()) == ["model.pt", "shift_monitor.pt"]
    resumed = TransformersShiftCallback(**options)
    TransformersTrainer(resumed, tmp_path / "b").train(10, resume=4)
    assert resumed.records == whole.records
    # Without the file of the monitor the watch begins anew.
    (tmp_path / "b" / "checkpoint-4" / "shift_monitor.pt").unlink()
    fresh = TransformersShiftCallback(**options)
    TransformersTrainer(fresh, tmp_path / "b").train(10, resume=4)
    assert fresh.monitor.steps == 6


def test_transformers_watches_on_one_process_and_says_when_it_needs_a_probe(tmp_path: Path) -> None:
    other = TransformersShiftCallback()
    TransformersTrainer(other, tmp_path, rank=1).train(2, save=1)
    assert other.monitor is None
    trainer = TransformersTrainer(TransformersShiftCallback(), tmp_path)
    trainer.loader = types.SimpleNamespace(dataset=iter([]), collate_fn=collate)
    with pytest.raises(ValueError, match="give the callback a probe"):
        trainer.train(1)
    given = TransformersShiftCallback({"input_ids": torch.arange(10).view(2, 5)}, every=1)
    trainer = TransformersTrainer(given, tmp_path)
    trainer.loader = None
    trainer.loader = types.SimpleNamespace(dataset=Items(), collate_fn=collate)
    trainer.train(2)
    assert [r.step for r in given.records] == [1, 2]


# Both.


def test_a_model_without_norms_is_trained_all_the_same() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    lightning, transformers = LightningShiftCallback(), TransformersShiftCallback()
    trainer = types.SimpleNamespace(global_step=0, is_global_zero=True)
    with pytest.warns(NothingDone, match=r"LightningShiftCallback measures nothing: .* no normalization layers"):
        lightning.on_train_batch_start(trainer, model, X, 0)
    lightning.on_train_batch_start(trainer, model, X, 1)  # says so once
    state = types.SimpleNamespace(is_world_process_zero=True, global_step=0)
    with pytest.warns(NothingDone, match="TransformersShiftCallback"):
        transformers.on_train_begin(types.SimpleNamespace(output_dir="."), state, None, model)
    for callback in (lightning, transformers):
        assert (callback.monitor, callback.records, callback.state_dict()) == (None, [], {})


def test_probes_go_to_the_device_whole() -> None:
    probe = {"a": X, "b": (Y, [X, 3]), "c": None}
    moved = to_device(probe, torch.device("meta"))
    assert moved["a"].device.type == moved["b"][0].device.type == moved["b"][1][0].device.type == "meta"
    assert moved["b"][1][1] == 3
    assert copy.deepcopy(moved["c"]) is None


def test_base_class_is_that_of_the_framework_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    class First:
        pass

    class Second:
        pass

    homes = (("first_frame.callbacks", "Callback"), ("second_frame.callbacks", "Callback"))
    assert base_class(homes) is object
    for name, kind in (("second_frame", Second), ("first_frame", First)):
        package, module = types.ModuleType(name), types.ModuleType(f"{name}.callbacks")
        package.__path__ = []  # type: ignore[attr-defined]
        module.Callback = kind  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, package)
        monkeypatch.setitem(sys.modules, f"{name}.callbacks", module)
        assert base_class(homes) is kind
    assert base_class(homes[1:]) is Second


def test_room_needs_no_framework() -> None:
    assert set(dir(integrations)) == {
        f"{frame}{what}Callback" for frame in ("Lightning", "Transformers") for what in ("Shift", "Population")
    }
    with pytest.raises(AttributeError, match="no attribute 'KerasShiftCallback'"):
        _ = integrations.KerasShiftCallback
    code = "import sys, flexnorm.integrations; print([n for n in ('lightning', 'transformers') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
