"""The package as a whole: what importing it costs, and that it works where only the wheel is installed."""

from __future__ import annotations

import re
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import flexnorm
from flexnorm._messages import optional, unknown_name

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("scipy", "ot", "sklearn", "rich", "typer", "lightning_fabric", "vl_convert", "yaml", "safetensors", "pydantic")


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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_what_runs(wheel: Path, tmp_path: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for needed in (
        "flexnorm/py.typed",
        "flexnorm/kernels/normalization.c",
        "flexnorm/lab/recipes/demo.yaml",
        "flexnorm/lab/report/style.css",
        "flexnorm/lab/report/page.html",
        "flexnorm/lab/report/page.js",
        "flexnorm/lab/charts/chart.css",
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


def _closure(*roots: str) -> list[metadata.Distribution]:
    """The distributions named and all that they require, as installed here."""
    found: dict[str, metadata.Distribution] = {}
    wanted = list(roots)
    while wanted:
        name = re.split(r"[^\w.-]", wanted.pop())[0].lower().replace("_", "-")
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # for another platform
            continue
        wanted += [needed for needed in found[name].requires or () if "extra ==" not in needed]
    return list(found.values())


@pytest.fixture
def bare(wheel: Path, tmp_path: Path) -> Path:
    """The interpreter of an environment with torch, numpy, what they require, and the wheel; nothing else."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    for distribution in _closure("torch", "numpy"):
        for top in {Path(file).parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            link, kept = site / top, Path(str(distribution.locate_file(top)))
            if kept.exists() and not link.exists():
                link.symlink_to(kept, target_is_directory=kept.is_dir())
    zipfile.ZipFile(wheel).extractall(site)
    return tmp_path / "env" / "bin" / "python"


BARE = """
import importlib.util, sys
import torch
from torch import nn
import flexnorm
from flexnorm import nn as norms, optim, shift, theory, transport

assert not any(importlib.util.find_spec(name) for name in {heavy!r}), "not a bare environment"
x = torch.randn(32, 3, 8, 8)
y = flexnorm.flex_norm(x.requires_grad_(), norms.rules.batch)
y.square().sum().backward()
for name in norms.NORMS:
    norms.make_norm(name, 3)(x)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
unitized = flexnorm.convert(model, "unitized")
flexnorm.recalibrate(unitized, [x])
flexnorm.fold(model.eval())
model.train()
groups = optim.param_groups(unitized, lr=0.1, lr_manifold=0.2, example_input=x, verbose=False)
for cls in (optim.SGDG, optim.AdamG):
    optimizer = cls(groups)
    unitized(x).square().mean().backward()
    optimizer.step()
with shift.ShiftMonitor(unitized, x[:8].detach(), every=1) as monitor:
    unitized(x).square().mean().backward()
    optimizer.step()
    monitor.step()
assert monitor.records
points = torch.randn(2, 16, 3)
shift.shift_bounds(*points)
flexnorm.freeze(unitized)
norms.NormPropLinear(3, 4)(torch.randn(5, 3))
try:
    transport.wasserstein(points[0], points[1, 1:], method="exact")
except ImportError as error:
    assert str(error).endswith("pip install 'flexnorm[lab]'"), error
else:
    raise AssertionError("exact distances came from nowhere")
print(sorted(name for name in sys.modules if name.startswith("flexnorm.lab")))
"""


def test_the_library_runs_on_torch_and_numpy_alone(bare: Path, tmp_path: Path) -> None:
    code = BARE.format(heavy=HEAVY)
    done = subprocess.run([bare, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    command = subprocess.run([bare, "-m", "flexnorm", "--help"], capture_output=True, text=True, check=False)
    assert command.returncode == 1
    assert command.stderr.strip() == "the flexnorm command needs typer: pip install 'flexnorm[lab]'"


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


def test_what_is_private_to_a_package_is_found_elsewhere(tmp_path: Path) -> None:
    """The check of `make imports` that import-linter does not have."""
    files = {
        "nn/batch.py": "from flexnorm._messages import unknown_name\nfrom flexnorm.nn._base import _Base\n",
        "shift/a.py": "from flexnorm.nn._base import Base\nfrom flexnorm.nn import _hidden\n",
        "shift/b.py": "from flexnorm.nn import batch\nbatch._Batch\nbatch.Batch.__name__\n",
        "lab/run/c.py": "from flexnorm.lab.report._page import page\n",
        "shift/d.py": "import flexnorm.nn._base\nimport flexnorm.nn.batch as bn\nbn._Batch\nimport flexnorm.shift._c\n",
    }
    for name, text in files.items():
        path = tmp_path / "flexnorm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    command = [sys.executable, str(ROOT / ".ci" / "private_imports.py"), str(tmp_path / "flexnorm")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    lines = sorted(line.removeprefix(f"{tmp_path}/flexnorm/") for line in done.stdout.splitlines())
    assert lines == [
        "lab/run/c.py:1: _page of flexnorm.lab.report._page is private",
        "shift/a.py:1: _base of flexnorm.nn._base is private",
        "shift/a.py:2: _hidden of flexnorm.nn is private",
        "shift/b.py:2: _Batch of flexnorm.nn.batch is private",
        "shift/d.py:1: _base of flexnorm.nn._base is private",
        "shift/d.py:3: _Batch of flexnorm.nn.batch is private",
    ]
