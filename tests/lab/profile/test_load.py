"""Models by what a person writes, and weights that fit, are safe to read, or are refused in words."""

from __future__ import annotations

import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flexnorm.lab.profile import load_model
from flexnorm.nn import UnitizedBatchNorm2d

SOURCE = """
from torch import nn

def plain():
    return nn.Linear(2, 2)

def sized(in_chans, num_classes):
    return nn.Conv2d(in_chans, num_classes, 1)

def normed(norm, in_channels=3):
    net = nn.Conv2d(in_channels, 4, 1)
    net.norm_name = norm
    return net

class Holder:
    made = nn.Linear(1, 1)

def wrong():
    return 3

number = 5
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "my_nets.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    path = list(sys.path)
    yield
    assert sys.path == path
    sys.modules.pop("my_nets", None)


def test_networks_of_this_package() -> None:
    model = load_model("resnet8", norm="unitized", in_channels=1, num_classes=4)
    assert any(isinstance(module, UnitizedBatchNorm2d) for module in model.modules())
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 4)
    with pytest.raises(ValueError, match=r"unknown model 'resnt8'; did you mean 'resnet8'.*or give timm:NAME"):
        load_model("resnt8")


@pytest.mark.usefixtures("factories")
def test_factories() -> None:
    assert isinstance(load_model("my_nets:plain"), nn.Linear)
    assert load_model("my_nets:sized", in_channels=5, num_classes=7).weight.shape == (7, 5, 1, 1)
    model: Any = load_model("my_nets:normed", norm="group", in_channels=2)
    assert (model.norm_name, model.in_channels) == ("group", 2)
    assert isinstance(load_model("my_nets:Holder.made"), nn.Linear)
    assert isinstance(load_model("torch.nn:Identity"), nn.Identity)


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("spec", "message", "options"),
    [
        ("my_nets:plan", "my_nets: unknown factory 'plan'; did you mean 'plain'", {}),
        ("my_nets:wrong", "returned int, not a torch module", {}),
        ("my_nets:number", "is int, neither a module nor a function", {}),
        ("my_nets:plain", "takes no argument named norm", {"norm": "batch"}),
        ("my_nets:", "must be a name, timm:NAME or package.module:factory", {}),
        ("timm:x", "a timm model has its own", {"norm": "batch"}),
    ],
)
def test_errors(spec: str, message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(spec, **options)


def test_what_foreign_code_raises_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_nets.py").write_text("1 / 0\n")
    (tmp_path / "picky_nets.py").write_text("def net(num_classes):\n    raise KeyError('depth')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImportError, match="importing broken_nets raises ZeroDivisionError: division by zero"):
        load_model("broken_nets:net")
    with pytest.raises(ValueError, match="picky_nets:net called with num_classes=3 raises KeyError: 'depth'"):
        load_model("picky_nets:net", num_classes=3)


def test_modules_that_are_not_there() -> None:
    with pytest.raises(ImportError, match=r"cannot import no_such_place.*looked for in"):
        load_model("no_such_place:net")


def test_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def create_model(name: str, **options: Any) -> nn.Module:
        seen.update(options, name=name)
        return nn.Linear(1, 1)

    names = ["resnet18", "resnet50", "vit_tiny"]
    fake = types.SimpleNamespace(create_model=create_model, is_model=names.__contains__, list_models=lambda: names)
    monkeypatch.setitem(sys.modules, "timm", fake)
    load_model("timm:resnet18", in_channels=1, num_classes=6)
    assert seen == {"name": "resnet18", "pretrained": False, "in_chans": 1, "num_classes": 6}
    with pytest.raises(ValueError, match="unknown timm model 'resnet19'; did you mean 'resnet18'"):
        load_model("timm:resnet19")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"timm:resnet18 needs timm: pip install 'flexnorm\[timm\]'"):
        load_model("timm:resnet18")


@pytest.mark.parametrize("wrap", [None, "state_dict", "model_state_dict", "model", "weights"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_checkpoints_in_their_wrappers(wrap: str | None, prefix: str, tmp_path: Path) -> None:
    source = load_model("convnet")
    state: dict[str, Any] = {prefix + name: value + 1 for name, value in source.state_dict().items()}
    torch.save(state if wrap is None else {wrap: state, "epoch": 3}, tmp_path / "c.pt")
    loaded = load_model("convnet", checkpoint=tmp_path / "c.pt")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, source.state_dict()[name] + 1)


def test_safetensors(tmp_path: Path) -> None:
    source = load_model("convnet")
    save_file(source.state_dict(), tmp_path / "c.safetensors")
    loaded = load_model("convnet", checkpoint=str(tmp_path / "c.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), loaded.parameters(), strict=True))
    (tmp_path / "d.safetensors").write_bytes(b"not one")
    with pytest.raises(ValueError, match="damaged, or no safetensors file"):
        load_model("convnet", checkpoint=tmp_path / "d.safetensors")


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("touched"),))


def test_checkpoints_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.pt"

    def refused(content: Any, message: str, kind: type[Exception] = ValueError) -> None:
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(kind, match=message):
            load_model("convnet", checkpoint=path)

    refused(None, "no checkpoint at", FileNotFoundError)
    refused({"model": Evil()}, "could run code of its author")
    refused(pickle.dumps(Evil()), "could run code of its author")
    assert not (tmp_path / "touched").exists()
    refused({"layer": torch.ones(2)}, r"lacks head\.bias, .* and \d+ more; has layer too much")
    refused({"a": 1}, "no state dictionary")
    refused([1], "no state dictionary")
    torch.save(load_model("convnet").state_dict(), path)
    path.write_bytes(path.read_bytes()[:2000])
    refused(None, "damaged")
    state = load_model("convnet", num_classes=3).state_dict()
    refused(state, r"head\.weight is \(3, 64\) there and \(10, 64\) here")
