"""flexnorm profile on the command line."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from flexnorm.lab.cli import app

SMALL = ["--limit", "200", "--steps", "6", "--batch-size", "16"]


def test_profile_prints_and_writes(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    result = CliRunner().invoke(app, ["profile", "convnet", *SMALL, "--json", str(path)])
    assert result.exit_code == 0, result.output
    assert "layer1.norm" in result.output
    assert "written:" in result.output
    assert len(json.loads(path.read_text())["layers"]) == 3


def test_errors_are_sentences() -> None:
    result = CliRunner().invoke(app, ["profile", "convnett", *SMALL])
    assert result.exit_code == 2
    assert "convnet" in result.output
    assert "Traceback" not in result.output
