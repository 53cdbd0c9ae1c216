"""The trainings behind Fig. 2: their settings build at both scales; figures come out, and are not trained twice."""

import json
import statistics
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from flexnorm.lab import models
from flexnorm.lab.run import Config
from flexnorm.lab.run.optimizers import StepHooks

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import luo_figures

    return luo_figures


@pytest.mark.parametrize("scale", ["small", "full"])
@pytest.mark.parametrize("group", ["resnet", "parts", "single", "dropout"])
def test_settings_build_networks_and_regularizers(figures, group, scale):
    found = figures.configs(group, scale, "cifar10.npz")
    for config in found.values():
        (norm,) = config.norms
        torch.manual_seed(0)
        small = {"width": 4} if scale == "full" else {}
        model = models.build(config.model, norm=norm, **config.model_args, **small, **config.norm_args.get(norm, {}))
        hooks = StepHooks(config, model, torch.zeros(8, 3, 16, 16), 0)
        assert bool(config.gamma_decay) == (hooks._decay is not None)
        assert ("estimated" in str(config.norm_args)) == (hooks._estimator is not None)
    folders = {figures.slug(label, config) for label, config in found.items()}
    assert len(folders) == len(found)


def test_figures_share_trainings(figures):
    dropout, plain = (figures.configs(group, "small", "x") for group in ("dropout", "resnet"))
    label = "BN, M=1024"
    assert dropout[label] == plain[label]
    assert figures.slug(label, dropout[label]) == figures.slug(label, plain[label])
    parts = figures.configs("parts", "small", "x")
    assert dropout["WN (conv4fc2)"] == parts["WN"]
    assert figures.slug("WN (conv4fc2)", parts["WN"]) == figures.slug("WN", parts["WN"])


def test_a_figure_comes_out_and_is_not_trained_twice(figures, monkeypatch, tmp_path):
    base = {"data": "digits", "limit": 80, "model": "conv4fc2", "norms": ["batch"], "epochs": 2}
    made = {
        f"layer 5, M={size}": Config.from_dict(
            {
                **base,
                "optims": ["sgd"],
                "seeds": 2,
                "model_args": {"width": 2, "only": 5},
                "batch_size": size,
                "shift_every": 0,
            }
        )
        for size in (16, 40)
    }
    monkeypatch.setattr(figures, "configs", lambda *_: made)
    out, picture = tmp_path / "2e.json", tmp_path / "2e.svg"
    arguments = ["luo", "2e", "--data", "digits", "--scale", "full", "--runs", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(out), "--plot", str(picture)])
    figures.main()
    result = json.loads(out.read_text())
    gamma, loss = result["panels"]
    assert [curve["label"] for curve in gamma["curves"]] == ["layer 5"]
    assert gamma["curves"][0]["x"] == [16.0, 40.0]
    for index, (label, config) in enumerate(made.items()):
        folder = tmp_path / "runs" / "full" / figures.slug(label, config)
        weights = [figures.load_file(path) for path in sorted(folder.rglob("model.safetensors"))]
        squares = [float(values["layer5.norm.weight"].square().mean()) for values in weights]
        assert len(squares) == 2
        assert gamma["curves"][0]["y"][index] == pytest.approx(statistics.fmean(squares))
        assert gamma["curves"][0]["error"][index] == pytest.approx(statistics.stdev(squares) / 2**0.5, rel=1e-4)
        row = result["table"][index]
        assert row["test_loss"] == loss["curves"][0]["y"][index]
        assert row["lowest_test_loss"] <= row["test_loss"]
    assert "layer 5" in "".join(ElementTree.parse(picture).getroot().itertext())

    def refuse(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(figures, "compare", refuse)
    figures.main()
    again = json.loads(out.read_text())
    assert again == result


@pytest.mark.parametrize("name", ["optimizers", "batch_sizes", "claims", "trained"])
def test_the_pictures_of_the_documentation_are_those_of_the_results(monkeypatch, tmp_path, name):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import pictures

    for folder in ("optim", "normprop", "shift", "theory"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(pictures, "DOCS", tmp_path)
    made = getattr(pictures, name)()
    for path in made if isinstance(made, list) else [made]:
        drawn = (ROOT / "docs" / path.relative_to(tmp_path)).read_text()
        assert path.read_text() == drawn, f"{path.name} is old: python -m benchmarks.pictures"


def test_smaller_images_are_averages(figures):
    data = figures.images("digits", "small", 100)
    whole = figures.images("digits", "full", 100)
    assert data.x_train.shape[2:] == (4, 4)
    assert data.digest != whole.digest
    mean = whole.x_train.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
    torch.testing.assert_close(data.x_train, (mean - mean.mean()) / mean.std())
