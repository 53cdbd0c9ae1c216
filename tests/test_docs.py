"""The documentation is true: its code runs, its rules are the package's, every public name is explained."""

from __future__ import annotations

import difflib
import doctest
import importlib
import inspect
import pkgutil
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from norm_options import declared_for_now
from torch import nn

import flexnorm
from flexnorm import flex_norm
from flexnorm.lab.models import build
from flexnorm.nn import reference

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "engine",
    "kernels",
    "lab.charts",
    "lab.data",
    "lab.models",
    "lab.profile",
    "lab.report",
    "lab.run",
    "lab.simulations",
    "nn",
    "nn.normprop",
    "optim",
    "probe",
    "shift",
    "statistics",
    "surgery",
    "theory",
    "transport",
)


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def run(path: Path) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for block in blocks(path.read_text(encoding="utf-8")):
        exec(compile(block, str(path), "exec"), names)
    return names


def test_rules_of_the_guide_are_those_of_the_package() -> None:
    with declared_for_now():
        names = run(ROOT / "docs" / "rules.md")
    x = torch.randn(8, 6, 5, 5)
    w, b, a = (torch.rand(6) + 0.5 for _ in range(3))
    quadratic = x / (x.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
    pairs = {
        "batch": ((w, b), reference.batch(x, w, b)),
        "layer": ((w, b), reference.layer(x, w, b)),
        "group": ((w, b), reference.group(x, w, b, groups=3)),
        "instance": ((w, b), reference.instance(x, w, b)),
        "rms": ((w,), reference.rms(x, w)),
        "filter_response": ((w, b), reference.filter_response(x, w, b, eps=1e-5)),
        "population": ((b, a, w, b), reference.population(x, b, a, w, b)),
        "renormalization": ((b, a, w, b), reference.renorm(x, b, a, w, b, r_max=3.0, d_max=5.0)),
        "switchable": ((torch.arange(3.0), w, b), reference.switchable(x, torch.arange(3.0), torch.arange(3.0), w, b)),
        "unitized": ((w, b, a), reference.unitized(x, w, b, a)),
        "mean_only": ((w, b), reference.mean_only(x, w, b)),
        "variance_only": ((w, b), reference.variance_only(x, w, b)),
        "quadratic": ((w, b), quadratic * w[:, None, None] + b[:, None, None]),
        "gated": ((a, w, b), reference.batch_instance(x, a, w, b)),
    }
    for name, (params, expected) in pairs.items():
        torch.testing.assert_close(flex_norm(x, names[name], *params), expected, rtol=1e-4, atol=1e-4, msg=name)
    code = max(blocks((ROOT / "docs" / "rules.md").read_text(encoding="utf-8")), key=len)
    bodies = re.split(r"^def ", code, flags=re.MULTILINE)[1:]
    assert len(bodies) == len(pairs) + 1
    assert all(len(body.strip().splitlines()) < 10 for body in bodies)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/index.md", "docs/surgery.md"])
@pytest.mark.filterwarnings("ignore:.*(could not be|not) folded")
def test_code_of_the_pages_runs(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    names: dict[str, Any] = {"FlexNorm": flexnorm.FlexNorm}
    with declared_for_now():
        for block in blocks(text):
            exec(compile(block, page, "exec"), names)
    assert blocks(text)


class _Schedule:
    """Stands in for a scheduler of timm: it is told the number of the epoch."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.optimizer = optimizer

    def step(self, epoch: int) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate / (1 + epoch)


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the guide for the sphere takes from timm, for where timm is not installed."""

    def model(name: str, num_classes: int) -> nn.Module:
        assert name == "resnet18"
        return build("resnet8", num_classes=num_classes, width=4)

    def optimizer(model: nn.Module, opt: str, **settings: float) -> torch.optim.Optimizer:
        assert opt == "sgd"
        return torch.optim.SGD(model.parameters(), **settings)

    def scheduler(optimizer: torch.optim.Optimizer, sched: str, num_epochs: int) -> tuple[_Schedule, int]:
        assert sched == "cosine"
        return _Schedule(optimizer), num_epochs

    parts = {"timm": {"create_model": model}, "timm.optim": {"create_optimizer_v2": optimizer}}
    parts["timm.scheduler"] = {"create_scheduler_v2": scheduler}
    for name, content in parts.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("timm")
def test_three_lines_put_a_script_on_the_sphere(capsys: pytest.CaptureFixture[str]) -> None:
    before, after = blocks((ROOT / "docs" / "optim.md").read_text(encoding="utf-8"))[:2]
    changes = list(difflib.ndiff(before.splitlines(), after.splitlines()))
    assert sum(line.startswith("+") for line in changes) == 3
    assert sum(line.startswith("-") for line in changes) == 2
    for script in (before, after):
        exec(compile(script, "docs/optim.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.count("epoch 1: loss") == 2
    assert "scale invariant" in printed


def test_tutorial_for_batches_of_one_image(capsys: pytest.CaptureFixture[str]) -> None:
    pages = blocks((ROOT / "docs" / "normprop.md").read_text(encoding="utf-8"))
    (script,) = (block for block in pages if "accuracy_after_one_epoch" in block)
    short = script.replace("range(3)", "range(2)").replace("torch.randperm(len(data.x_train))", "torch.arange(40)")
    assert short.count("range(2)") == short.count("torch.arange(40)") == 1
    threads = torch.get_num_threads()
    try:
        exec(compile(short, "docs/normprop.md", "exec"), {})
    finally:
        torch.set_num_threads(threads)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["normprop", "group", "batch"]


def test_links_of_the_pages_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def public() -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for room in ("", *PACKAGES):
        module = importlib.import_module(f"flexnorm.{room}".rstrip("."))
        found += [(f"{module.__name__}.{name}", getattr(module, name)) for name in module.__all__]
    return found


def test_every_public_name_is_documented() -> None:
    missing = []
    for name, value in public():
        if not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        if not inspect.getdoc(value) or (inspect.isclass(value) and not value.__dict__.get("__doc__")):
            missing.append(name)
        if inspect.isclass(value) and value.__module__.startswith("flexnorm"):
            for key, member in vars(value).items():
                if not key.startswith("_") and inspect.isfunction(member) and not inspect.getdoc(member):
                    missing.append(f"{name}.{key}")
    assert missing == []


def test_every_argument_of_a_public_function_is_explained() -> None:
    missing = []
    for name, value in public():
        if not inspect.isfunction(value) or not value.__module__.startswith("flexnorm"):
            continue
        text = inspect.getdoc(value) or ""
        parameters = inspect.signature(value).parameters
        missing += [f"{name}({p})" for p in parameters if not re.search(rf"\b{p}\b", text)]
    assert missing == []


MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(flexnorm.__path__, "flexnorm.")
    if not info.name.endswith(("__main__", ".cli", ".triton_kernels")) and ".integrations" not in info.name
)


def test_examples_in_docstrings() -> None:
    attempted = 0
    for name in MODULES:
        module = importlib.import_module(name)
        torch.manual_seed(0)
        result = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.ELLIPSIS)
        assert result.failed == 0, name
        attempted += result.attempted
    assert attempted > 50
