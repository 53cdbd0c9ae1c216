"""Norms recognized by what they do: look-alikes of other libraries' classes, and their own where installed."""

from __future__ import annotations

import contextlib
import importlib.util
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from norm_lookalikes import (
    CentredByStd,
    ChannelsFirst,
    ColumnNorm,
    FrozenStatistics,
    GainNorm,
    GraphMeanNorm,
    HandBatchNorm,
    LastAxisNorm,
    MeanOnly,
    NormThenAct,
    Pinned,
    PlainRMS,
    WholeGraphNorm,
    Wrapped,
)
from torch import Tensor, nn
from torch.nn import functional as F

from flexnorm.probe import NormBehavior, recognize, unread_norm
from flexnorm.probe.recognition import _known

LAST, FIRST = ((2, 1), (3, -1), (4, -1)), ((3, 1), (4, 1), (5, 1))

CASES: list[tuple[Callable[[], nn.Module], dict[str, Any]]] = [
    (
        lambda: PlainRMS(8, 1e-6),  # T5, Llama, Qwen: float32 inside, no mean, no bias
        {"norm_name": "rms", "over": "position", "axes": LAST, "eps": 1e-6, "weight": "weight", "bias": None},
    ),
    (lambda: GainNorm(8), {"norm_name": "rms", "eps": 1e-6, "weight": "weight", "weight_offset": 1.0}),  # Gemma
    (lambda: LastAxisNorm(8, bias=False), {"norm_name": "layer", "axes": LAST, "bias": None, "eps": 1e-5}),  # nanoGPT
    (lambda: LastAxisNorm(8, bias=True), {"norm_name": "layer", "centers": True, "bias": "bias"}),
    (
        lambda: ChannelsFirst(8, 1e-6),  # ConvNeXt
        {"norm_name": "layer", "over": "position", "axes": ((4, 1),), "channel_axis": 1, "channels": 8, "eps": 1e-6},
    ),
    (
        lambda: FrozenStatistics(8),  # DETR, torchvision: all in buffers
        {"norm_name": "batch", "over": "running", "axes": ((4, 1),), "running": ("running_mean", "running_var")},
    ),
    (
        lambda: HandBatchNorm(8, momentum=0.3),
        {"norm_name": "batch", "over": "batch", "momentum": 0.3, "eps": 1e-3, "weight": "gamma", "bias": "beta"},
    ),
    (lambda: GraphMeanNorm(8), {"norm_name": "", "over": "batch", "axes": ((2, 1),), "mean_weight": "mean_scale"}),
    (lambda: WholeGraphNorm(8), {"norm_name": "", "over": "all", "eps_outside": True, "eps": 1e-5}),
    (lambda: MeanOnly(8), {"norm_name": "", "over": "batch", "scales": False, "centers": True}),
    (lambda: NormThenAct(8), {"norm_name": "layer", "then": ("drop", "act"), "axes": ((4, 1),)}),
    (lambda: Pinned(8), {"norm_name": "layer", "axes": LAST, "eps": 1e-5}),
    (lambda: ColumnNorm(), {"norm_name": "rms", "channels": None, "weight": None, "axes": LAST, "eps": 1e-8}),
    (lambda: nn.GroupNorm(4, 8), {"norm_name": "group", "groups": 4, "axes": ((2, 1), *FIRST)}),
    (lambda: nn.GroupNorm(1, 8), {"norm_name": "layer", "over": "sample", "channel_axis": 1}),
    (lambda: nn.InstanceNorm2d(8, affine=True), {"norm_name": "instance", "over": "channel", "axes": ((4, 1),)}),
    (lambda: nn.BatchNorm1d(8, momentum=0.2), {"over": "batch", "momentum": 0.2, "axes": ((2, 1), (3, 1))}),
    (lambda: nn.SyncBatchNorm(8), {"over": "batch", "axes": ((2, 1), *FIRST)}),
    (lambda: nn.RMSNorm(8), {"norm_name": "rms", "eps": None}),
    (lambda: nn.LayerNorm(8, eps=1e-12, elementwise_affine=False), {"norm_name": "layer", "eps": 1e-12}),
]


@pytest.mark.quick(4)
@pytest.mark.parametrize(("make", "expected"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_what_a_layer_does_is_found(make: Callable[[], nn.Module], expected: dict[str, Any]) -> None:
    layer = make()
    found = recognize(layer)
    assert found is not None, unread_norm(layer)
    assert {name: getattr(found, name) for name in expected} == expected
    for ndim, axis in found.axes:
        shape = [3, 4, 5, 2, 6][:ndim]
        shape[axis or 1] = 8
        x = torch.randn(shape) * 2 + 1
        torch.testing.assert_close(layer(x), computed(found, layer, x), rtol=1e-4, atol=1e-5)


def computed(found: NormBehavior, layer: nn.Module, x: Tensor) -> Tensor:
    """The formula that was found, with the layer's own tensors, in training."""
    axis = found.axis(x.ndim) or 1
    channel = axis % x.ndim
    others = [k for k in range(x.ndim) if k != channel]
    own = {**layer._parameters, **layer._buffers}

    def table(name: str | None, default: float) -> Tensor:
        value = torch.full((x.shape[axis],), default) if name is None else own[name]
        assert value is not None
        return value.detach().flatten().view([-1 if k == channel else 1 for k in range(x.ndim)])

    if found.over == "running":
        assert found.running is not None
        mean, var = (table(name, 0.0) for name in found.running)
        part = x - mean
    else:
        dims = {
            "position": [channel],
            "sample": list(range(1, x.ndim)),
            "channel": [k for k in others if k],
            "batch": others,
            "all": list(range(x.ndim)),
        }
        if found.over == "groups":
            return F.group_norm(
                x, found.groups, table("weight", 1).flatten(), table("bias", 0).flatten(), found.eps or 0
            )
        mean = x.mean(dims[found.over], keepdim=True) if found.centers else torch.zeros(1)
        part = x - mean * table(found.mean_weight, 1.0)
        var = part.square().mean(dims[found.over], keepdim=True)
    eps = torch.finfo(x.dtype).eps if found.eps is None else found.eps
    deviation = var.sqrt() + eps if found.eps_outside else (var + eps).sqrt()
    y = part / deviation if found.scales else part
    y = y * (table(found.weight, 1.0) + found.weight_offset) + table(found.bias, 0.0)
    for name in found.then:
        y = layer.get_submodule(name)(y)
    return y


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class TwiceNorm(nn.Module):
    """Normalizes, and adds the input: no formula fits."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.layer_norm(x, (8,), self.weight)


class Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("odd")


class RaisesNorm(Raises):
    pass


class PairNorm(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class WithMap(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.map = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(self.norm(x))


@pytest.mark.parametrize(
    "layer", [Scale(), WithMap(), Wrapped(8), Raises(), nn.Linear(8, 8), nn.ReLU(), nn.PReLU(8), nn.Module()]
)
def test_what_is_no_norm_is_none(layer: nn.Module) -> None:
    assert recognize(layer) is None
    assert unread_norm(layer) is None


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (TwiceNorm(), "none of the normalizations"),
        (CentredByStd(8), "takes no notice of the scale"),  # the unbiased deviation
        (RaisesNorm(), "no input of 2 to 5 axes"),
        (PairNorm(), "no input of 2 to 5 axes"),
        (nn.LayerNorm((8, 4)), "no vector of channels"),
        (nn.LazyBatchNorm2d(), "lazy"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_norm_that_cannot_be_read_says_why(layer: nn.Module, why: str) -> None:
    assert recognize(layer) is None
    assert why in (unread_norm(layer) or "")


def test_a_layer_that_was_changed_is_not_trusted() -> None:
    replaced, outside = ColumnNorm(), PlainRMS(8)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    outside.__dict__["weight"] = outside._parameters.pop("weight")
    assert (recognize(replaced), recognize(outside)) == (None, None)
    assert unread_norm(replaced) == "its forward was replaced on the instance"


def test_nothing_waits_for_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = type("TheirSyncBatchNorm", (HandBatchNorm,), {})(8)
    assert recognize(layer) is not None
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert recognize(layer) is None
    assert unread_norm(layer) == "trying it might wait for other processes"
    assert recognize(HandBatchNorm(8)) is not None


def test_an_attribute_that_decides_is_part_of_what_is_remembered() -> None:
    first, second = recognize(PlainRMS(8, 1e-6)), recognize(PlainRMS(8, 1e-3))
    assert first is not None
    assert second is not None
    assert (first.eps, second.eps) == (1e-6, 1e-3)
    layer = LastAxisNorm(8, bias=True)
    assert recognize(layer) is recognize(LastAxisNorm(8, bias=True))
    layer.eps = 1e-2
    assert getattr(recognize(layer), "eps", None) == 1e-2


def test_it_leaves_no_trace() -> None:
    _known.clear()
    layer = HandBatchNorm(8).train()
    layer(torch.randn(4, 8, 3)).square().sum().backward()
    called: list[nn.Module] = []
    layer.register_forward_hook(lambda module, *_: called.append(module))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    versions = [t._version for t in (*layer.parameters(), *layer.buffers())]
    gradients = [p.grad for p in layer.parameters()]
    attributes = dict(layer.__dict__)
    states = torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()  # noqa: NPY002
    assert recognize(layer) is not None
    assert (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()) == states  # noqa: NPY002
    assert not called
    assert layer.training
    assert layer.__dict__ == attributes
    assert [t._version for t in (*layer.parameters(), *layer.buffers())] == versions
    assert all(p.grad is g for p, g in zip(layer.parameters(), gradients, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("place", ["meta", "half"])
def test_values_and_places_of_the_tensors_do_not_matter(place: str) -> None:
    layer = PlainRMS(8).to("meta") if place == "meta" else PlainRMS(8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert recognize(layer) == recognize(PlainRMS(8))


@pytest.fixture(scope="module")
def _torchvision() -> Any:
    """Schemas of torchvision's operators, where it is installed for another build of torch and would not import."""
    with contextlib.suppress(ImportError, RuntimeError):
        import torchvision  # noqa: F401

        return None
    found = importlib.util.find_spec("torchvision")
    if found is None or not found.submodule_search_locations:
        return None
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    text = (Path(found.submodule_search_locations[0]) / "_meta_registrations.py").read_text(encoding="utf-8")
    library = torch.library.Library("torchvision", "DEF")
    for name in sorted(set(re.findall(r'torchvision::(\w+)"|register_meta\("(\w+)"\)', text))):
        library.define(f"{''.join(name)}(Tensor x) -> Tensor")
    return library


REAL = [
    ("transformers.models.llama.modeling_llama", "LlamaRMSNorm", (16,), "rms", -1),
    ("transformers.models.qwen3.modeling_qwen3", "Qwen3RMSNorm", (16,), "rms", -1),
    ("transformers.models.gemma3.modeling_gemma3", "Gemma3RMSNorm", (16,), "rms", -1),
    ("transformers.models.t5.modeling_t5", "T5LayerNorm", (16,), "rms", -1),
    ("transformers.models.detr.modeling_detr", "DetrFrozenBatchNorm2d", (16,), "batch", 1),
    ("diffusers.models.normalization", "RMSNorm", (16, 1e-6), "rms", -1),
    ("diffusers.models.normalization", "FP32LayerNorm", (16,), "layer", -1),
    ("timm.layers", "LayerNorm2d", (16,), "layer", 1),
    ("timm.layers", "LayerNormAct2d", (16,), "layer", 1),
    ("timm.layers", "LayerNormAct", (16,), "layer", -1),
    ("timm.layers", "RmsNorm", (16,), "rms", -1),
    ("timm.layers", "RmsNorm2d", (16,), "rms", 1),
    ("timm.layers", "BatchNormAct2d", (16,), "batch", 1),
    ("timm.layers", "FrozenBatchNormAct2d", (16,), "batch", 1),
    ("timm.layers", "GroupNorm1", (16,), "layer", 1),
    ("torchvision.ops", "FrozenBatchNorm2d", (16,), "batch", 1),
    ("torchvision.models.convnext", "LayerNorm2d", (16,), "layer", 1),
    ("torch_geometric.nn", "LayerNorm", (16, 1e-5, True, "node"), "layer", -1),
]


@pytest.mark.usefixtures("_torchvision")
@pytest.mark.parametrize(("module", "name", "arguments", "norm", "axis"), REAL)
def test_classes_of_other_libraries(module: str, name: str, arguments: tuple[Any, ...], norm: str, axis: int) -> None:
    library = pytest.importorskip(module, exc_type=(ImportError, RuntimeError))
    found = recognize(getattr(library, name)(*arguments))
    assert found is not None
    assert (found.norm_name, found.channel_axis) == (norm, axis)
