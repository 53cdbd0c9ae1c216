"""flexnorm theory: what it prints are the numbers of the theory; what it writes can be read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flexnorm.lab.cli import app
from flexnorm.theory import dynamics, generalization

SMALL = ["--inputs", "40", "--runs", "2"]


def run(*args: object) -> str:
    result = CliRunner().invoke(app, ["theory", *map(str, args)])
    assert result.exit_code == 0, result.output
    return result.output


def test_dynamics_prints_fixed_points_and_writes_the_figure(tmp_path: Path) -> None:
    out = run(
        "dynamics", *SMALL, "--times", 2, "--zeta", 0.125, "--plot", tmp_path / "d.png", "--json", tmp_path / "d.json"
    )
    assert "0.8" in out  # gamma0 = 1 / (2 zeta + 1)
    assert "2.5" in out  # eta_max = 2 + 4 zeta
    assert (tmp_path / "d.png").stat().st_size > 5000
    figure = json.loads((tmp_path / "d.json").read_text())
    curves = {curve["label"]: curve for curve in figure["curves"]}
    assert set(curves) == {"BN", "WN", "SGD", "BN, simulated", "WN, simulated", "SGD, simulated"}
    path = dynamics.solve(dynamics.Student("wn", "relu", 0.5), times=2.0)
    assert curves["WN"]["y"][-1] == pytest.approx(float(path.error[-1]))


@pytest.mark.slow
def test_generalization_and_regularization(tmp_path: Path) -> None:
    out = run("generalization", *SMALL, "--noise", 0.3, "--batch-size", 4, "--json", tmp_path / "g.json")
    assert "samples" in out
    labels = [curve["label"] for curve in json.loads((tmp_path / "g.json").read_text())["curves"]]
    assert len(labels) >= 4
    assert generalization.sgd_linear(2.0, 0.3) == pytest.approx(0.3)
    out = run("regularization", "--samples", 20000)
    assert "simulated, own statistics" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generalization", "--activation", "rleu"], "did you mean 'relu'"),
        (["dynamics", "--quantity", "gama"], "did you mean 'gamma'"),
        (["regularization", "--samples", "0"], "samples must be at least 512"),
    ],
)
def test_errors(args: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["theory", *args, *(SMALL if args[0] != "regularization" else ())])
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize("command", ["dynamics", "generalization", "regularization"])
def test_what_cannot_be_written_is_refused_before_the_simulation(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for maker in ("dynamics_figure", "figure_1a", "regularization_figure"):
        monkeypatch.delattr(f"flexnorm.lab.figures.{maker}")
    for option, path, message in (
        ("--plot", "x.jpg", "unknown format of a picture '.jpg'"),
        ("--plot", "/nowhere/x.svg", "there is no folder /nowhere to write x.svg to"),
        ("--json", "/nowhere/x.json", "there is no folder /nowhere to write x.json to"),
    ):
        result = CliRunner().invoke(app, ["theory", command, option, path])
        assert result.exit_code == 2
        assert message in result.output
