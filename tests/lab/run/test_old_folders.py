"""Folders, checkpoints and results made before the package had its name still resume, and are read.

``data/evenkeel_run`` was made by the package when it was called evenkeel, and ended by SIGTERM after two of the three
epochs of its last run; ``data/evenkeel_results.json`` is what the same comparison wrote when it was left alone.
"""

import dataclasses
import hashlib
import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F

from flexnorm.lab.files import plain, read_json, read_rows
from flexnorm.lab.models import build
from flexnorm.lab.profile.load import load_weights
from flexnorm.lab.records import Study
from flexnorm.lab.report import write_report
from flexnorm.lab.run import Config, compare, environment

ROOT = Path(__file__).resolve().parents[3]
DATA = Path(__file__).with_name("data")
LAST = "runs/unitized/sgdg/seed0"
PROCESSOR = "6d9bc5674d5972fc32f849c92b2a8b2318dd8f79cd5f2cc26fde63673e13c2b2"


def processor():
    """A digest of what this processor and this torch make of convolution, sums, roots and exponentials."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        x, w = torch.randn(16, 4, 8, 8), torch.randn(4, 4, 3, 3, requires_grad=True)
        y = F.batch_norm(F.conv2d(x, w, padding=1), None, None, training=True)
        loss = F.cross_entropy(y.relu().mean((2, 3)) @ torch.randn(4, 10), torch.arange(16) % 10)
        loss.backward()
        torch.set_num_threads(threads)
        values = [y.detach(), w.grad, loss.detach(), torch.linspace(-3, 3, 999).exp().add(1).log().sqrt().sin()]
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in values)).hexdigest()


@pytest.fixture
def old(tmp_path):
    shutil.copytree(DATA / "evenkeel_run", tmp_path / "old")
    return tmp_path / "old"


@pytest.fixture
def config(old):
    return Config.from_dict(read_json(old / "experiment.json")["config"])


def outcome(folder):
    """All that does not depend on the clock or the name."""
    found = {}
    for path in sorted(folder.glob("runs/*/*/*")):
        summary = read_json(path / "summary.json")
        kept = {key: summary[key] for key in ("status", "notes", "epochs", "steps", "parameters", "run", "result")}
        rows = [
            {k: v for k, v in row.items() if k not in ("step_ms", "seconds")} for row in read_rows(path / "metrics.csv")
        ]
        weights = {name: value.tolist() for name, value in load_file(path / "model.safetensors").items()}
        found[path.relative_to(folder).as_posix()] = kept, rows, read_rows(path / "shift.csv"), weights
    return found


def alike(old, new):
    """Assert that two outcomes are the same but for the rounding of their numbers."""
    if isinstance(old, dict):
        assert old.keys() == new.keys()
        old, new = list(old.values()), [new[key] for key in old]
    if isinstance(old, (list, tuple)):
        assert len(old) == len(new)
        for a, b in zip(old, new, strict=True):
            alike(a, b)
        return
    try:
        assert float(old) == pytest.approx(float(new), rel=2e-3, abs=1e-4)
    except (TypeError, ValueError):  # no numbers
        assert old == new


def test_an_interrupted_comparison_goes_on_where_it_was(old, config, tmp_path):
    events = []
    results = compare(config, old, notify=lambda event: events.append((event.kind, event.index)))
    assert events == [("data", 0), ("skip", 1), ("skip", 2), ("skip", 3), ("start", 4), ("epoch", 4), ("end", 4)]
    assert all(run.complete and run.epochs_done == 3 for run in results.runs)
    stored = read_json(old / "results.json")
    assert stored["command"] == "flexnorm compare --limit 96 --out evenkeel_run"
    for run in stored["runs"]:
        assert run["environment"]["flexnorm"] == "0.1.0.dev0"
        assert "evenkeel" not in run["environment"]
    before = read_json(DATA / "evenkeel_run/runs/batch/sgd/seed0/summary.json")["environment"]
    now = environment.describe(torch.device("cpu")) | {"threads": 1}
    same_torch = all(before[key] == now[key] for key in ("torch", "kernels", "platform"))
    # What ran elsewhere says so, by the new name; what ran here is as if it had never been interrupted.
    assert all("evenkeel" not in note for note in results.runs[-1].notes)
    if same_torch and processor() == PROCESSOR:
        compare(config, tmp_path / "new")
        # Kernels have changed since, and with them the last digits.
        alike(outcome(old), outcome(tmp_path / "new"))


def test_its_report_can_be_made_before_and_after(old, config):
    page = write_report(old).read_text(encoding="utf-8")
    assert "stopped after epoch 2" in page
    compare(config, old)
    page = write_report(old).read_text(encoding="utf-8")
    assert "flexnorm compare --limit 96" in page  # the command that made it, by its present name
    assert "stopped after epoch" not in page


def test_its_weights_are_read(old):
    path = old / "runs/unitized/sgd/seed0/model.safetensors"
    with safe_open(path, "pt") as file:
        assert set(file.metadata()) == {"evenkeel"}
    model = build("convnet", norm="unitized", in_channels=1, widths=[4, 4])
    load_weights(model, path)
    assert float(model.layer1.norm.alpha.detach().abs().max()) > 0


def test_its_results_are_read_and_give_the_same_table():
    stored = read_json(DATA / "evenkeel_results.json")
    study = Study.read(stored)
    assert study.environment["flexnorm"] == stored["environment"]["evenkeel"]
    assert len(study.complete) == 4
    again = plain(study.asdict())
    assert again["command"] == stored["command"].replace("evenkeel compare", "flexnorm compare")
    for key in ("data", "config", "baseline", "total_seconds", "table"):
        assert again[key] == stored[key], key
    for run, old_run in zip(again["runs"], stored["runs"], strict=True):
        assert run | {"environment": old_run["environment"]} == old_run


def test_committed_results_are_read(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    results = importlib.import_module("benchmarks.results")
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "results").glob("*.json"))]
    recipes = [result for result in found if "recipe" in result]
    assert len(recipes) >= 9
    assert any("evenkeel" in result["environment"] for result in recipes)
    for result in recipes:
        table = results.markdown(result)
        assert table.count("\n") >= 2
        assert "nan" not in table
    demo = next(result for result in recipes if result["recipe"] == "demo")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert results.markdown(demo) in readme


def test_the_hint_for_another_experiment_names_the_present_command(old, config):
    with pytest.raises(ValueError, match=r"there, 4 here(.|\n)*\n  flexnorm compare --limit 96"):
        compare(dataclasses.replace(config, epochs=4), old)


def test_adam_g_of_a_folder_from_before_adamw_goes_on_with_sgd(tmp_path):
    """Then SGD was the only choice, and no file says so."""
    old = Config(
        optims={"adamg": {"off_manifold": "sgd"}}, norms=("batch",), model_args={"widths": [4]}, seeds=(0,), limit=96
    )
    small = dataclasses.replace(old, epochs=2, probe=16, shift_samples=16, device="cpu")

    def stop(event):
        if event.kind == "epoch":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(small, tmp_path / "old", notify=stop)
    marker = tmp_path / "old/experiment.json"
    experiment = read_json(marker)
    del experiment["config"]["optims"]["adamg"]["off_manifold"]
    assert "off_manifold" not in json.dumps(experiment)
    marker.write_text(json.dumps(experiment))
    today = dataclasses.replace(small, optims={"adamg": {}})
    compare(today, tmp_path / "old")
    compare(small, tmp_path / "new")
    assert outcome(tmp_path / "old") == outcome(tmp_path / "new")
    assert Study.read(read_json(tmp_path / "old/results.json")).complete
    with pytest.raises(ValueError, match=r"off_manifold: absent there, adamw here"):
        compare(dataclasses.replace(small, optims={"adamg": {"off_manifold": "adamw"}}), tmp_path / "old")
    with pytest.raises(ValueError, match=r"off_manifold: absent there, adamw here"):
        compare(today, tmp_path / "new")  # this one says that it was made with SGD


def test_adam_g_with_sgd_is_the_experiment_it_was():
    config = Config(optims={"adamg": {"off_manifold": "sgd"}, "sgd": {}}, batch_size=16)
    # As computed before there was a choice, for optims={"adamg": {}, "sgd": {}}.
    assert config.fingerprint("x") == "39e5c2cd012184ba586da040ac8ff269ed3edd237dddca482a13ba628523c928"
    assert dataclasses.replace(config, optims={"adamg": {}, "sgd": {}}).fingerprint("x") != config.fingerprint("x")
