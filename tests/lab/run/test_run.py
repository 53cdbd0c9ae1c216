import dataclasses
import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file

from flexnorm.lab import files
from flexnorm.lab.models import build
from flexnorm.lab.records import SHIFT_NUMBERS, Run
from flexnorm.lab.run import Config, loop, train_run
from flexnorm.lab.run.optimizers import make_optimizer
from flexnorm.nn import NormPropLayer
from flexnorm.optim import SGDG, SGDP, AdamG, AdamP


def test_a_run_leaves_a_complete_folder(one, images, tmp_path):
    epochs = []
    before = torch.get_rng_state(), torch.get_num_threads()
    summary = train_run(one, images, tmp_path / "run", on_epoch=epochs.append)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == torch.get_num_threads()
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "config.yaml",
        "metrics.csv",
        "shift.csv",
        "model.safetensors",
        "checkpoint.pt",
        "summary.json",
    }
    stored = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary == Run.read(stored)
    assert summary.summary() == stored
    assert (stored["status"], stored["reason"], stored["epochs"], stored["steps"]) == ("complete", None, 2, 8)
    assert Config.from_dict(yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())) == one
    rows = files.read_rows(tmp_path / "run" / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert [float(row["test_accuracy"]) for row in rows] == [e.test_accuracy for e in epochs]
    assert summary.train_loss == float(rows[-1]["train_loss"])
    assert summary.step_ms > 0
    assert summary.environment["device"] == "cpu"

    # The weights are those of the network that the summary speaks of.
    model = build("convnet", norm="batch", in_channels=1, num_classes=2, widths=[4, 8])
    model.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))
    scores = model.eval()(images.x_test)
    assert float((scores.argmax(1) == images.y_test).float().mean()) == pytest.approx(summary.test_accuracy)
    loss = torch.nn.functional.cross_entropy(scores, images.y_test)
    assert float(loss.detach()) == pytest.approx(summary.test_loss, rel=1e-5)
    assert summary.parameters == sum(p.numel() for p in model.parameters())


def test_the_shift_is_measured_on_every_layer_and_its_interval_holds(one, images, tmp_path):
    summary = train_run(one, images, tmp_path / "run")
    rows = files.read_rows(tmp_path / "run" / "shift.csv")
    # Every 3 of 8 updates from the start, one update later: after 1, 4 and 7; the last two lie in epochs 1 and 2.
    assert [(row["epoch"], row["step"]) for row in rows[::2]] == [("1", "1"), ("1", "4"), ("2", "7")]
    assert len({row["layer"] for row in rows}) == 2
    for row in rows:
        values = {column: float(row[column]) for column in SHIFT_NUMBERS}
        assert 0 <= values["lower"] <= values["w1"] * (1 + 1e-9)
        assert values["w1"] <= values["upper"] * (1 + 1e-9)
        assert values["w1"] > 0
        assert values["relative"] == pytest.approx(values["w1"] / values["spread"])
    assert summary.shift_holds is True
    assert summary.shift_w1 > 0


def test_by_default_a_short_run_is_measured_twenty_times_and_a_long_one_every_epoch(one, images, tmp_path):
    for epochs, expected in ((20, 20), (30, 30)):
        config = dataclasses.replace(one, epochs=epochs, shift_every=None, batch_size=32)
        train_run(config, images, tmp_path / str(epochs))
        steps = {row["step"] for row in files.read_rows(tmp_path / str(epochs) / "shift.csv")}
        assert len(steps) == expected if epochs == 30 else len(steps) >= expected


@pytest.mark.parametrize("norm", ["none", "batch", "population", "unitized", "normprop"])
@pytest.mark.parametrize("optim", ["sgd", "sgdg"])
def test_measuring_does_not_change_the_training_by_one_bit(small, images, tmp_path, norm, optim):
    config = dataclasses.replace(small.single(norm, optim, 0), shift_every=1)
    with_it = train_run(config, images, tmp_path / "with")
    without = train_run(config, images, tmp_path / "without", monitor=False)
    assert with_it.shift
    assert not without.shift
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1]
    for key in ("train_loss", "test_loss", "test_accuracy"):
        assert getattr(with_it, key) == getattr(without, key)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(one, images, tmp_path):
    runs = [train_run(dataclasses.replace(one, seeds=(s,)), images, tmp_path / str(i)) for i, s in enumerate((0, 0, 1))]
    weights = [(tmp_path / str(i) / "model.safetensors").read_bytes() for i in range(3)]
    assert weights[0] == weights[1] != weights[2]
    results = [run.summary()["result"] for run in runs]
    assert results[0] == results[1] != results[2]


def first_filter(folder):
    return next(value for value in load_file(folder / "model.safetensors").values() if value.ndim == 4)


def test_norms_start_from_the_same_convolutions(small, images, tmp_path):
    starts = {}
    for norm in ("batch", "group", "unitized", "population"):
        config = dataclasses.replace(small.single(norm, "sgd", 0), epochs=1, optims={"sgd": {"lr": 1e-12}})
        train_run(config, images, tmp_path / norm)
        starts[norm] = first_filter(tmp_path / norm)
    for norm, weight in starts.items():
        torch.testing.assert_close(weight, starts["batch"], rtol=0, atol=1e-8, msg=norm)


def test_a_limit_of_the_test_images_is_that_and_nothing_else(one, images, tmp_path):
    few = dataclasses.replace(one, test_limit=10)
    a, b = (train_run(config, images, tmp_path / name) for name, config in (("a", one), ("b", few)))
    assert a.train_loss == b.train_loss
    assert a.test_loss != b.test_loss
    assert 10 * b.test_accuracy == pytest.approx(round(10 * b.test_accuracy))
    weights = [load_file(tmp_path / name / "model.safetensors") for name in "ab"]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_it_learns(one, images, tmp_path):
    config = dataclasses.replace(one, epochs=12, augment=("shift",), augment_pixels=1, label_smoothing=0.1)
    assert train_run(config, images, tmp_path / "run").test_accuracy > 0.9


def test_a_loss_that_is_not_finite_ends_the_run_as_diverged(small, images, tmp_path):
    config = dataclasses.replace(small.single("none", "sgd", 0), optims={"sgd": {"lr": 1e30}}, schedule="constant")
    summary = train_run(config, images, tmp_path / "run")
    assert summary.status == "diverged"
    assert summary.reason.startswith("the training loss became nan at step ") or "inf" in summary.reason
    assert summary.steps < 8
    assert math.isnan(summary.test_accuracy)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["result"]["test_accuracy"] is None
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert train_run(config, images, tmp_path / "run") == summary


def test_a_test_loss_that_is_not_finite_counts_too(one, images, tmp_path, monkeypatch):
    monkeypatch.setattr(loop._Run, "_evaluate", lambda self: (math.inf, 0.5))
    summary = train_run(one, images, tmp_path / "run")
    assert (summary.status, summary.reason) == ("diverged", "the test loss became inf after epoch 1")


@pytest.mark.parametrize("norm", ["batch", "unitized"])
def test_batch_norms_are_refused_at_batch_size_one(small, images, tmp_path, norm):
    config = dataclasses.replace(small.single(norm, "sgd", 0), batch_size=1)
    summary = train_run(config, images, tmp_path / "run")
    assert summary.status == "refused"
    assert "a batch of 1 image" in summary.reason
    assert ", ".join(loop.single_image_norms()) in summary.reason
    assert summary.steps == 0


def test_the_refusal_names_norms_of_every_kind_but_those_of_the_batch():
    named = set(loop.single_image_norms())
    assert {"none", "group", "instance", "layer", "population", "normprop"} <= named
    assert not {"batch", "unitized"} & named


@pytest.mark.parametrize("norm", loop.single_image_norms())
def test_the_norms_that_the_refusal_names_do_train_at_batch_size_one(small, images, tmp_path, norm):
    config = dataclasses.replace(small.single(norm, "sgd", 0), batch_size=1, epochs=1, lr=None)
    config = dataclasses.replace(config, optims={"sgd": {"lr": 1e-3}}, shift_every=30)
    summary = train_run(config, images, tmp_path / "run")
    assert (summary.status, summary.steps) == ("complete", 64)


def test_wrong_uses_are_refused(small, one, images, tmp_path):
    with pytest.raises(ValueError, match="one norm, one optimizer and one seed"):
        train_run(small, images, tmp_path / "run")
    train_run(one, images, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(ValueError, match="belongs to a run with other settings"):
        train_run(dataclasses.replace(one, lr=0.5), images, tmp_path / "run")
    (tmp_path / "run" / "shift.csv").write_text("")
    with pytest.raises(ValueError, match=r"shift\.csv has 0 bytes, fewer than"):
        train_run(one, images, tmp_path / "run")
    with pytest.raises(ValueError, match="device 'nonsense' with precision 32-true"):
        train_run(dataclasses.replace(one, device="nonsense"), images, tmp_path / "other")
    with pytest.raises(ValueError, match=r"model convnet with norm batch.*grups"):
        train_run(dataclasses.replace(one, norm_args={"batch": {"grups": 1}}), images, tmp_path / "third")


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions(one, images, tmp_path, precision):
    summary = train_run(dataclasses.replace(one, precision=precision), images, tmp_path / "run")
    assert summary.status == "complete"
    kind = {"bf16-mixed": torch.float32, "64-true": torch.float64}[precision]
    assert first_filter(tmp_path / "run").dtype == kind


class TestOptimizers:
    def make(self, optim, norm="batch", **change):
        torch.manual_seed(0)
        model = build("convnet", norm=norm, in_channels=1, num_classes=2, widths=(4, 8))
        settings = {**Config(optims={optim: {}}).optim_settings(norm, optim), **change}
        return model, *make_optimizer(model, optim, settings, torch.randn(2, 1, 6, 6))

    def test_sgd(self):
        _, optimizer, notes = self.make("sgd")
        group = optimizer.param_groups[0]
        assert type(optimizer) is torch.optim.SGD
        assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.1, 0.9, True, 5e-4)
        assert notes == []
        assert self.make("sgd", momentum=0.0)[1].param_groups[0]["nesterov"] is False

    def test_adamw(self):
        _, optimizer, _ = self.make("adamw")
        assert type(optimizer) is torch.optim.AdamW
        assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)

    def test_relatives_project_with_the_settings_given(self):
        _, sgdp, notes = self.make("sgdp", delta=0.2, wd_ratio=0.3)
        _, adamp, _ = self.make("adamp", beta1=0.8)
        group = sgdp.param_groups[0]
        assert type(sgdp) is SGDP
        assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.1, 0.9, True, 5e-4)
        assert (group["delta"], group["wd_ratio"]) == (0.2, 0.3)
        assert type(adamp) is AdamP
        assert adamp.param_groups[0]["betas"] == (0.8, 0.999)
        assert adamp.param_groups[0]["weight_decay"] == 0.05
        assert notes == []

    @pytest.mark.parametrize(("optim", "kind", "rate"), [("sgdg", SGDG, 0.2), ("adamg", AdamG, 0.05)])
    def test_convolutions_before_a_norm_go_on_the_sphere(self, optim, kind, rate):
        model, optimizer, notes = self.make(optim, ortho=0.3, grad_clip=0.7, ortho_every=3)
        assert type(optimizer) is kind
        assert {group["ortho_every"] for group in optimizer.param_groups} == {3}
        assert {group["ortho_every"] for group in self.make(optim)[1].param_groups} == {1}
        on = [group for group in optimizer.param_groups if group["manifold"]]
        weights = {id(p) for group in on for p in group["params"]}
        assert weights == {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Conv2d)}
        assert all(group["lr"] == rate and group["ortho"] == 0.3 and group["grad_clip"] == 0.7 for group in on)
        off = [group for group in optimizer.param_groups if not group["manifold"]]
        assert {group["lr"] for group in off} == {0.1 if optim == "sgdg" else 3e-3}
        if optim == "adamg":
            assert {(group["off_manifold"], group["betas"]) for group in off} == {("adamw", (0.9, 0.999))}
            assert {group["betas"] for group in on} == {(0.9, 0.99)}
        assert notes == []

    @pytest.mark.parametrize(
        ("plain", "optim", "change", "words"),
        [
            ("sgd", "sgdg", {}, "SGD with momentum"),
            ("sgd", "adamg", {"off_manifold": "sgd", "lr": 0.1, "nesterov": True}, "SGD with momentum"),
            ("adamw", "adamg", {}, "AdamW"),
        ],
    )
    def test_without_scale_invariant_weights_it_is_the_plain_one_and_says_so(self, plain, optim, change, words):
        steps = {}
        for name, settings in ((plain, {}), (optim, change)):
            model, optimizer, notes = self.make(name, norm="none", weight_decay=0.0, **settings)
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.ones(2, 1, 6, 6)).square().sum().backward()
                optimizer.step()
            steps[name] = [p.detach() for p in model.parameters()]
        assert notes == [f"no weight of this network is scale-invariant: all are updated by {words}"]
        for a, b in zip(steps[plain], steps[optim], strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("optim", ["sgd", "adamw", "sgdg", "adamg", "sgdp", "adamp"])
    def test_normprop_weights_have_unit_norm_after_every_step(self, optim):
        model, optimizer, _ = self.make(optim, norm="normprop")
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 1, 6, 6)).square().sum().backward()
            optimizer.step()
            layers = [m for m in model.modules() if isinstance(m, NormPropLayer) and m.weight.ndim == 4]
            assert len(layers) == 2
            for layer in layers:
                norms = layer.weight.detach().flatten(1).norm(dim=1)
                torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-5)
