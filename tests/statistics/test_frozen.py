"""freeze() survives train(), changes nothing else, and unfreeze() restores everything."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from model_zoo import BatchNormAct2d, same_state, zoo
from torch import nn

import flexnorm.nn as fx
from flexnorm.statistics import freeze, is_frozen, unfreeze

LAYERS = {
    "torch 1d": (lambda: nn.BatchNorm1d(4, momentum=None), (5, 4)),
    "torch 2d": (lambda: nn.BatchNorm2d(4, momentum=0.3), (5, 4, 3, 3)),
    "torch 3d": (lambda: nn.BatchNorm3d(4), (5, 4, 2, 3, 3)),
    "torch sync": (lambda: nn.SyncBatchNorm(4), (5, 4, 3, 3)),
    "torch instance": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (5, 4, 3, 3)),
    "timm": (lambda: BatchNormAct2d(4), (5, 4, 3, 3)),
    "batch 1d": (lambda: fx.BatchNorm1d(4), (5, 4)),
    "unitized 2d": (lambda: fx.UnitizedBatchNorm2d(4), (5, 4, 3, 3)),
    "population 3d": (lambda: fx.PopulationNorm3d(4), (5, 4, 2, 3, 3)),
    "renorm 2d": (lambda: fx.BatchRenorm2d(4), (5, 4, 3, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_frozen_through_train_and_back(name: str) -> None:
    build, shape = LAYERS[name]
    model = nn.Sequential(build())
    layer = model[0]
    calls: list[int] = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
        layer.num_batches_tracked.fill_(9)
    x = torch.randn(shape) + 3
    expected = copy.deepcopy(model).eval()(x)
    state, attributes = copy.deepcopy(model.state_dict()), dict(vars(layer))
    kind = type(layer)

    assert freeze(model) is model
    for mode in (True, False, True):
        model.train(mode)
        torch.testing.assert_close(model(x.clone()), expected)
        assert is_frozen(layer)
        assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert isinstance(layer, kind)
    assert "frozen=True" in repr(model)
    assert freeze(model)[0] is layer, "freezing twice is freezing once"

    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(_without_hooks(model)))):
        other.train()
        assert is_frozen(other[0])
        torch.testing.assert_close(other(x.clone()), expected)
        unfreeze(other)
        assert type(other[0]) is kind

    calls.clear()
    unfreeze(model)
    assert type(layer) is kind
    assert not is_frozen(layer)
    assert layer.training, "what train() has set meanwhile is restored"
    assert {k: v for k, v in vars(layer).items() if k in attributes and k != "_values"} == {
        k: v for k, v in attributes.items() if k != "_values"
    }
    assert vars(layer).keys() == attributes.keys()
    if name != "torch sync":
        model(x)
        assert calls == [1]
        assert layer.num_batches_tracked == (9 if name == "torch instance" else 10)
        assert not torch.equal(state["0.running_mean"], layer.running_mean)


def _without_hooks(model: nn.Module) -> nn.Module:
    bare = copy.deepcopy(model)
    bare[0]._forward_hooks.clear()
    return bare


def test_training_flag_of_before_returns() -> None:
    layer = nn.BatchNorm2d(3).eval()
    unfreeze(freeze(layer))
    assert not layer.training
    unfreeze(freeze(layer).train())
    assert layer.training


def test_frozen_state_dicts_load_into_plain_models() -> None:
    frozen, plain = freeze(zoo()["resnet"]), zoo()["vgg"]
    assert same_state(frozen, zoo()["resnet"])
    buffer = io.BytesIO()
    torch.save(frozen.state_dict(), buffer)
    buffer.seek(0)
    fresh = zoo()["resnet"]
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert unfreeze(plain) is plain


def test_selection_and_layers_without_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.GroupNorm(1, 3), nn.BatchNorm2d(3, track_running_stats=False))
    freeze(model)
    assert [is_frozen(m) for m in model] == [True, False, False]
    net = freeze(zoo()["resnet"], include="2.*", exclude="2.bn1")
    assert {n for n, m in net.named_modules() if is_frozen(m)} == {"2.bn2", "2.downsample.1"}
    unfreeze(net, include="2.bn2")
    assert {n for n, m in net.named_modules() if is_frozen(m)} == {"2.downsample.1"}
    with pytest.raises(ValueError, match="include"):
        freeze(model, include="nothing")


def test_affine_parameters_can_be_frozen_too() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), fx.UnitizedBatchNorm2d(3))
    model[0].bias.requires_grad_(False)
    freeze(freeze(model, affine=True), affine=True)
    assert not any(p.requires_grad for p in model.parameters())
    unfreeze(model)
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True, True]


@pytest.mark.parametrize("name", ["torch 2d", "unitized 2d"])
def test_gradients_flow_and_the_model_compiles(name: str) -> None:
    build, shape = LAYERS[name]
    model = freeze(nn.Sequential(nn.Conv2d(4, 4, 1), build())).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(shape)
    before = copy.deepcopy(model.state_dict())
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert model[0].weight.grad is not None
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))
