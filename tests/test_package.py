"""The package as a whole: what importing it costs, and that it works where only the wheel is installed."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import flexnorm
from flexnorm._messages import optional, unknown_name

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("scipy", "ot", "sklearn", "rich", "typer", "lightning", "lightning_fabric", "matplotlib", "datasets", "yaml")


def _run(code: str, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "rooms", ["flexnorm", "flexnorm.nn, flexnorm.optim, flexnorm.shift, flexnorm.surgery, flexnorm.lab.models"]
)
def test_importing_pulls_in_torch_and_nothing_heavy(rooms: str) -> None:
    code = f"import {rooms}, sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert _run(code).strip() == "[]"


def test_importing_runs_little_code_of_its_own() -> None:
    """Counted, not timed: modules that `import flexnorm` adds to what `import torch` loads."""
    code = (
        "import sys, torch; before = set(sys.modules); import flexnorm; "
        "print(sorted(m for m in set(sys.modules) - before))"
    )
    added = _run(code)
    assert added.count("'flexnorm") <= 12
    assert added.count("'") // 2 <= 30


def test_the_wheel_holds_what_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for needed in (
        "flexnorm/py.typed",
        "flexnorm/kernels/normalization.c",
        "flexnorm/lab/recipes/demo.yaml",
        "flexnorm/lab/report/style.css",
        "flexnorm/lab/report/page.js",
    ):
        assert needed in names, needed
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r}); import flexnorm; from flexnorm.lab.cli import app; "
        "from typer.testing import CliRunner; r = CliRunner().invoke(app, ['recipe', 'list']); "
        "print(flexnorm.__file__, r.exit_code, r.output)"
    )
    out = _run(code, cwd=tmp_path)
    assert str(target) in out
    assert " 0 " in out
    assert "demo" in out


def test_version() -> None:
    assert flexnorm.__version__.split(".")[0].isdigit()
    command = [sys.executable, "-m", "flexnorm", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == f"flexnorm {flexnorm.__version__}"


def test_unknown_names() -> None:
    assert unknown_name("norm", "zzz", ["batch"]) == "unknown norm 'zzz'. Valid: batch"


def test_what_is_not_installed_is_named() -> None:
    assert optional("json.decoder", "this", "lab").JSONDecoder
    with pytest.raises(ImportError, match=r"^this needs no_such_module: pip install 'flexnorm\[plot\]'$"):
        optional("no_such_module.part", "this", "plot")
