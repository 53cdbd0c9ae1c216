"""convert(): everything is kept that is not the normalization, and nothing is changed silently."""

from __future__ import annotations

import copy
import pickle
import re
import warnings

import pytest
import torch
from model_zoo import (
    ZOO,
    BatchNormAct2d,
    FrozenBatchNorm2d,
    FrozenBatchNormAct2d,
    GroupNormAct,
    randomized,
    same_state,
    zoo,
)
from norm_options import BUILT_IN
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

import flexnorm.nn as fx
from flexnorm.engine import FlexNorm
from flexnorm.statistics import freeze, is_frozen
from flexnorm.surgery import conversion_plan, convert

IMAGE = (4, 3, 6, 6)
INPUTS = {1: (4, 6, 5), 2: (4, 6, 5, 3), 3: (3, 6, 2, 3, 4)}


def first(outputs: object) -> Tensor:
    return outputs["out"] if isinstance(outputs, dict) else outputs


# -- the function and the way back


@pytest.mark.parametrize("name", ZOO)
def test_unitized_computes_the_same_function_and_goes_back(name: str) -> None:
    model, x = zoo()[name].double(), torch.randn(IMAGE, dtype=torch.float64)
    unitized = convert(model, "unitized")
    assert not [m for m in unitized.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len([m for m in unitized.modules() if isinstance(m, FlexNorm)]) == len(
        [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    )
    back = convert(unitized, "torch")
    assert same_state(back, model)
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
    for training in (False, True):
        nets = [copy.deepcopy(m).train(training) for m in (model, unitized, back)]
        wanted, got, again = (first(net(x)) for net in nets)
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)
        assert torch.equal(again, wanted)
        wanted.square().sum().backward()
        got.square().sum().backward()
        grads = dict(nets[1].named_parameters())
        for key, p in nets[0].named_parameters():
            torch.testing.assert_close(grads[key].grad, p.grad, rtol=1e-7, atol=1e-8)
        # The running statistics have moved alike.
        for key, b in nets[0].named_buffers():
            torch.testing.assert_close(nets[1].get_buffer(key), b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [n for n in fx.NORMS if n != "none"])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_every_family_and_back_from_batch_norm(name: str, ndim: int) -> None:
    source = randomized([nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][ndim - 1](6, eps=1e-3, momentum=0.3))
    model = nn.Sequential(source).double()
    x = torch.randn(INPUTS[ndim], dtype=torch.float64)
    plan = conversion_plan(model, name, example_input=x)
    new = convert(model, name)
    assert plan[0].target == type(new[0]).__name__ == type(fx.make_norm(name, 6, ndim)).__name__
    assert new[0].eps == 1e-3
    assert new[0].weight.dtype == torch.float64
    torch.testing.assert_close(new[0].weight, source.weight.double())
    if name in ("batch", "unitized", "population", "renorm", "switchable"):
        assert new[0].momentum == 0.3
    # What the plan says about the function is what is measured.
    kept_evaluation = plan[0].effect.startswith("kept")
    assert plan.evaluation.preserved == kept_evaluation
    if name in BUILT_IN:
        assert kept_evaluation == (name in ("batch", "unitized", "population", "renorm", "batch_instance"))
    if plan[0].effect == "kept":
        assert plan.training.preserved
        assert plan.preserved
    if new[0].running_mean is not None and name != "instance":
        assert same_state(convert(new, "torch.batch"), model)
        if name != "switchable":
            assert same_state(convert(new, "torch"), model)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm2d])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}])
def test_options_of_torch_survive_both_ways(norm: type[nn.Module], options: dict) -> None:
    model = randomized(nn.Sequential(norm(6, **options)))
    there = convert(model, "instance" if norm is nn.InstanceNorm2d else "batch")
    for name in ("eps", "momentum", "affine", "track_running_stats"):
        assert getattr(there[0], name) == getattr(model[0], name)
    assert same_state(convert(there, "torch"), model)


def test_bias_free_layers_stay_bias_free() -> None:
    layer = nn.BatchNorm2d(6)
    layer.register_parameter("bias", None)
    there = convert(nn.Sequential(layer), "unitized")
    assert there[0].bias is None
    back = convert(there, "torch")
    assert back[0].bias is None
    assert back[0].weight is there[0].weight or torch.equal(back[0].weight, there[0].weight)


def test_identity_conversions_leave_the_layer_alone() -> None:
    model = randomized(nn.Sequential(fx.UnitizedBatchNorm2d(6, norm="rms"), nn.BatchNorm2d(6)))
    for to, index in (("unitized", 0), (fx.UnitizedBatchNorm2d, 0), ("torch.batch", 1), (nn.BatchNorm2d, 1)):
        plan = conversion_plan(model, to, include=str(index))
        assert plan[0].status == "keep"
        module = model[index]
        assert convert(model, to, include=str(index), inplace=True)[index] is module
    # A layer that is already of torch is none of the business of the way back.
    assert conversion_plan(model, "torch")["1"].status == "keep"


def test_same_family_with_other_arguments_keeps_the_rest() -> None:
    layer = fx.PopulationNorm2d(4, momentum=0.2, statistics="estimated", max_ratio=None)
    new = convert(nn.Sequential(layer), "population", momentum=0.5)[0]
    assert (new.momentum, new.statistics, new.max_ratio) == (0.5, "estimated", None)
    frn = convert(nn.Sequential(fx.FilterResponseNorm2d(4, threshold=True, learn_eps=True)), "frn", eps=1e-3)[0]
    assert frn.tau is not None
    assert frn.learned_eps is not None
    renorm = convert(nn.Sequential(fx.BatchRenorm2d(4, warmup=3, r_max=2.0)), "renorm", d_max=1.0)[0]
    assert (renorm.warmup, renorm.r_max, renorm.d_max) == (3, 2.0, 1.0)


def test_conversion_is_idempotent() -> None:
    once = convert(zoo()["resnet"], "unitized")
    twice = convert(once, "unitized")
    assert same_state(once, twice)
    assert {row.status for row in conversion_plan(once, "unitized")} == {"keep"}
    with_arguments = convert(once, "unitized", norm="rms")
    assert same_state(convert(with_arguments, "unitized", norm="rms"), with_arguments)


# -- what is kept


def test_flags_types_and_parameter_objects() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6, momentum=0.25), nn.BatchNorm2d(6)).to(torch.bfloat16)
    model[1].eval()
    model[1].weight.requires_grad_(False)
    model[2].requires_grad_(False)
    parameters = list(model.parameters())
    convert(model, "unitized", inplace=True)
    assert [p for p in model.parameters() if any(p is q for q in parameters)] == [
        p for n, p in model.named_parameters() if not n.endswith("alpha")
    ]
    assert (model[1].training, model[2].training) == (False, True)
    assert (model[1].weight.requires_grad, model[1].bias.requires_grad, model[1].alpha.requires_grad) == (0, 1, 1)
    assert model[1].alpha.dtype == torch.bfloat16
    assert not model[2].alpha.requires_grad, "nothing in a frozen layer becomes trainable"
    assert model[1].running_mean.dtype == torch.float32
    convert(model, "torch", inplace=True)
    assert model[1].running_mean.dtype == torch.bfloat16
    assert (model[1].training, model[1].weight.requires_grad, model[1].momentum) == (False, False, 0.25)
    assert model[1].weight is parameters[2]


def test_meta_models_stay_on_meta() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False))
    new = convert(model, "unitized")
    assert {t.device.type for t in (*new.parameters(), *new.buffers())} == {"meta"}


def test_copy_by_default_and_in_place_on_request() -> None:
    model = zoo()["vgg"]
    state = copy.deepcopy(model.state_dict())
    other = convert(model, "unitized")
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert convert(model, "unitized", inplace=True) is model
    layer = nn.BatchNorm2d(3)
    assert isinstance(convert(layer, "unitized", inplace=True), fx.UnitizedBatchNorm2d)


def test_tied_layers_become_one_layer() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.BatchNorm2d(3)
            self.b = self.a
            self.list = nn.ModuleList([self.a, nn.BatchNorm2d(3)])
            self.list[1].weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.list[1](self.b(self.a(x)))

    model = Tied()
    plan = conversion_plan(model, "unitized", example_input=torch.randn(4, 3, 5, 5))
    assert plan.preserved
    assert [row.names for row in plan] == [("a", "b", "list.0"), ("list.1",)]
    assert "also b, list.0" in str(plan)
    new = convert(model, "unitized", include="list.0")
    assert new.a is new.b is new.list[0]
    assert isinstance(new.a, fx.UnitizedBatchNorm2d)
    assert isinstance(new.list[1], nn.BatchNorm2d)
    assert convert(model, "unitized").list[1].weight is not model.a.weight
    both = convert(model, "unitized")
    assert both.list[1].weight is both.a.weight


def test_hooks_of_every_kind_move_with_their_handles() -> None:
    layer = nn.BatchNorm2d(3)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), layer)
    seen: list[str] = []

    def note(name: str):
        return lambda *_, **__: seen.append(name)

    handles = [
        layer.register_forward_pre_hook(note("forward_pre")),
        layer.register_forward_pre_hook(note("forward_pre_kwargs"), with_kwargs=True),
        layer.register_forward_hook(note("forward")),
        layer.register_forward_hook(note("forward_kwargs"), with_kwargs=True, always_call=True),
        layer.register_full_backward_hook(note("backward")),
        layer.register_full_backward_pre_hook(note("backward_pre")),
        layer.register_state_dict_pre_hook(note("state_dict_pre")),
        layer.register_state_dict_post_hook(note("state_dict_post")),
        layer.register_load_state_dict_pre_hook(lambda module, *_: seen.append(f"load_pre {type(module).__name__}")),
        layer.register_load_state_dict_post_hook(note("load_post")),
    ]

    def exercise() -> list[str]:
        seen.clear()
        model(torch.randn(2, 3, 4, 4, requires_grad=True)).sum().backward()
        model.load_state_dict(model.state_dict())
        return sorted(seen)

    before = exercise()
    assert len(before) == len(handles)
    convert(model, "unitized", inplace=True)
    del layer
    assert isinstance(model[1], fx.UnitizedBatchNorm2d)
    assert exercise() == [s.replace("BatchNorm2d", "UnitizedBatchNorm2d") for s in before]
    for handle in handles:
        handle.remove()
    assert exercise() == []


def test_what_somebody_added_to_a_layer_comes_along() -> None:
    layer = nn.BatchNorm2d(3)
    layer.tag = "stem"
    layer.register_buffer("mask", torch.ones(3))
    layer.register_buffer("scratch", torch.ones(2), persistent=False)
    layer.register_parameter("extra", nn.Parameter(torch.zeros(1)))
    layer.add_module("probe", nn.Identity())
    model = nn.Sequential(layer)
    there = convert(model, "unitized")
    assert (there[0].tag, list(there[0]._modules)) == ("stem", ["probe"])
    assert {"0.mask", "0.extra"} <= set(there.state_dict())
    assert "0.scratch" not in there.state_dict()
    assert same_state(convert(there, "torch"), model)


def test_nested_containers_and_slices_of_sequentials() -> None:
    model = nn.ModuleDict({"list": nn.ModuleList([nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())])})
    new = convert(model, "unitized")
    assert isinstance(new["list"][0][1:][0], fx.UnitizedBatchNorm2d)
    assert [n for n, _ in new.named_modules()] == [n for n, _ in model.named_modules()]


# -- selection


def test_include_and_exclude_take_names_patterns_classes_modules_and_functions() -> None:
    model = zoo()["resnet"]
    names = {row.name for row in conversion_plan(model, "unitized")}
    assert names == {"1", "2.bn1", "2.bn2", "2.downsample.1", "3.3"}

    def chosen(**kwargs: object) -> set[str]:
        return {row.name for row in conversion_plan(model, "unitized", **kwargs)}

    assert chosen(include="2") == {"2.bn1", "2.bn2", "2.downsample.1"}
    assert chosen(include="2.bn?") == {"2.bn1", "2.bn2"}
    assert chosen(include=re.compile(r".*\.bn1")) == {"2.bn1"}
    assert chosen(include=nn.BatchNorm1d) == {"3.3"}
    assert chosen(exclude=nn.BatchNorm1d) == names - {"3.3"}
    assert chosen(include=model[1]) == {"1"}
    assert chosen(include=["1", nn.BatchNorm1d], exclude=lambda name, _: name == "1") == {"3.3"}
    converted = convert(model, "unitized", include=model[1])
    assert [type(m).__name__ for m in converted.modules()].count("UnitizedBatchNorm2d") == 1
    for wrong in ("bn1", re.compile("x"), nn.BatchNorm2d(3)):
        with pytest.raises(ValueError, match="include"):
            chosen(include=wrong)
    with pytest.raises(TypeError, match="exclude must be"):
        chosen(exclude=3)


# -- other packages


def test_layers_with_an_activation_inside() -> None:
    model = randomized(nn.Sequential(nn.Conv2d(3, 8, 1), BatchNormAct2d(8), GroupNormAct(8)))
    x = torch.randn(IMAGE)
    plan = conversion_plan(model, "unitized", include="1", example_input=x)
    assert plan.preserved
    assert plan[0].target == "UnitizedBatchNorm2dAct"
    there = convert(model, "unitized", include="1")
    assert isinstance(there[1], fx.UnitizedBatchNorm2d)
    assert list(there.state_dict()) == [*list(model.state_dict())[:4], "1.alpha", *list(model.state_dict())[4:]]
    assert isinstance(there[1].act, nn.ReLU)
    again = pickle.loads(pickle.dumps(copy.deepcopy(there)))
    assert type(again[1]) is type(there[1])
    assert torch.equal(again.eval()(x), there.eval()(x))
    back = convert(there, "torch")
    assert type(back[1]) is BatchNormAct2d
    assert same_state(back, model)
    group = convert(model, "group", include="2")
    torch.testing.assert_close(group(x), model(x))
    assert type(convert(group, "torch")[2]) is GroupNormAct
    torch.testing.assert_close(convert(group, "torch")(x), model(x))
    # Without the class to go back to, torch's layer gets the activation.
    plain = convert(there, "torch.sync", include="1")[1]
    assert isinstance(plain, nn.SyncBatchNorm)
    assert isinstance(plain.act, nn.ReLU)
    population = convert(there, "population", include="1")
    assert type(population[1]).__name__ == "PopulationNorm2dAct"
    assert type(convert(population, "torch")[1]) is BatchNormAct2d
    for net in (there, back):
        torch.testing.assert_close(freeze(copy.deepcopy(net)).train()(x), net.eval()(x))


@pytest.mark.parametrize("kind", [FrozenBatchNorm2d, FrozenBatchNormAct2d])
def test_frozen_layers_with_buffers_only(kind: type[nn.Module]) -> None:
    model, x = nn.Sequential(kind(6), nn.Conv2d(6, 2, 1)), torch.randn(INPUTS[2])
    plan = conversion_plan(model, "unitized", example_input=x)
    assert plan.preserved
    assert plan[0].effect == "kept"
    there = convert(model, "unitized").train()
    assert there[0].frozen
    assert not any(p.requires_grad for p in (there[0].weight, there[0].bias, there[0].alpha))
    torch.testing.assert_close(there(x), model(x))
    back = convert(there, "torch")
    assert type(back[0]) is kind
    assert same_state(back, model)
    assert not any(True for _ in back[0].parameters())
    thawed = convert(there, "torch.batch")
    assert isinstance(thawed[0], nn.BatchNorm2d)
    assert is_frozen(thawed[0])
    torch.testing.assert_close(thawed.train()(x), model(x))
    assert conversion_plan(model, "torch")[0].status == "keep"


# -- torch's other layers


def test_sync_batch_norm_keeps_its_group() -> None:
    model = randomized(nn.Sequential(nn.Conv2d(3, 6, 1), nn.SyncBatchNorm(6)))
    there = convert(model, "unitized")
    assert there[1].process_group == "world"
    assert isinstance(there[1], fx.UnitizedBatchNorm2d)
    assert isinstance(convert(there, "torch")[1], nn.SyncBatchNorm)
    assert same_state(convert(there, "torch"), model)
    assert isinstance(convert(there, "torch.batch")[1], nn.BatchNorm2d)
    assert isinstance(convert(there, nn.SyncBatchNorm)[1], nn.SyncBatchNorm)
    torch.testing.assert_close(there.eval()(torch.ones(IMAGE)), model.eval()(torch.ones(IMAGE)))


def test_group_and_instance_norm() -> None:
    x = torch.randn(4, 6, 5, 5)
    group = randomized(nn.Sequential(nn.GroupNorm(3, 6, eps=1e-4), nn.Conv2d(6, 6, 1)))
    there = convert(group, "group")
    assert (there[0].num_groups, there[0].eps) == (3, 1e-4)
    torch.testing.assert_close(there(x), group(x))
    assert same_state(convert(there, "torch"), group)
    assert convert(group, fx.GroupNorm, num_groups=2)[0].num_groups == 2
    one = nn.Sequential(nn.GroupNorm(1, 6))
    assert conversion_plan(one, "layer", example_input=x).preserved
    assert conversion_plan(one, "layer", example_input=x)[0].effect == "kept"
    each = nn.Sequential(nn.GroupNorm(6, 6))
    plan = conversion_plan(each, "instance", example_input=x)
    assert plan.preserved
    assert plan[0].effect == "kept"
    tracking = randomized(nn.Sequential(nn.InstanceNorm2d(6, affine=True, track_running_stats=True)))
    plan = conversion_plan(tracking, "instance", example_input=x)
    assert plan.preserved
    back = convert(convert(tracking, "instance"), "torch")
    assert same_state(back, tracking)
    torch.testing.assert_close(convert(there, "torch.layer")[0].num_groups, 1)


def test_layer_norm_only_where_its_axes_are_channels() -> None:
    image = nn.Sequential(nn.LayerNorm((6, 5, 3)))
    x = torch.randn(INPUTS[2])
    plan = conversion_plan(image, "layer", example_input=x)
    assert plan.preserved
    assert plan[0].notes == ("parameters (6, 5, 3) become (6,)",)
    with torch.no_grad():
        image[0].weight.copy_(torch.arange(1.0, 7).view(6, 1, 1).expand(6, 5, 3))
    assert conversion_plan(image, "layer", example_input=x).preserved
    assert torch.equal(convert(image, "layer")[0].weight, torch.arange(1.0, 7))
    assert "not channels and positions" in conversion_plan(image, "layer", example_input=x[None])[0].reason
    with torch.no_grad():
        image[0].weight[0, 0, 0] = 3
    assert "has one per channel" in conversion_plan(image, "batch")[0].reason
    kept = convert(image, "layer")
    assert kept[0].normalized_shape == (6, 5, 3)
    assert conversion_plan(image, "layer", example_input=x).preserved
    assert same_state(convert(kept, "torch"), image)
    five = nn.Sequential(nn.LayerNorm((1, 1, 1, 1, 2)))
    assert conversion_plan(five, "layer")[0].effect == "kept"
    assert "normalizes the last 5 axes" in conversion_plan(five, "batch")[0].reason


TOKENS = [nn.LayerNorm(6), nn.LayerNorm(6, bias=False), nn.LayerNorm(6, elementwise_affine=False), nn.RMSNorm(6)]
TOKENS += [nn.RMSNorm(6, eps=1e-3)]


@pytest.mark.parametrize("theirs", TOKENS, ids=repr)
def test_layers_of_the_last_axis_become_ours_and_come_back(theirs: nn.Module) -> None:
    model, x = randomized(nn.Sequential(nn.Linear(4, 6), theirs)), torch.randn(2, 5, 4)
    name = "layer" if isinstance(theirs, nn.LayerNorm) else "rms"
    plan = conversion_plan(model, name, example_input=x)
    assert plan.preserved
    assert plan["1"].effect == "kept"
    there = convert(model, name)
    assert type(there[1]) is getattr(fx, type(theirs).__name__)
    assert (there[1].eps, there[1].normalized_shape) == (theirs.eps, theirs.normalized_shape)
    assert type(convert(model, type(there[1]))[1]) is type(there[1])
    back = convert(there, "torch")
    assert type(back[1]) is type(theirs)
    assert back[1].eps == theirs.eps
    assert same_state(back, model)
    torch.testing.assert_close(back(x), model(x))
    assert type(convert(there, f"torch.{name}")[1]) is type(theirs)


@pytest.mark.parametrize("name", [n for n in fx.NORMS if n != "none"])
def test_layers_of_tokens_become_any_norm_of_tokens(name: str) -> None:
    model, x = randomized(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6))), torch.randn(3, 5, 7, 4)
    options = {"num_groups": 2} if name == "group" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        new = convert(model, name, **options)
        back = convert(new, "layer")
    layer = new[1]
    assert (layer.norm_name, layer.channel_axis) == (name, -1)
    assert layer.per_position is not layer.pools_positions
    assert layer.weight is not model[1].weight
    torch.testing.assert_close(layer.weight, model[1].weight)
    h = model[0](x)
    expected = copy.deepcopy(layer)
    if layer.per_position:
        expected.channel_axis, rows = 1, h.reshape(-1, 6)
        expected.ndims = (2,)
        torch.testing.assert_close(new(x), expected(rows).view(3, 5, 7, 6))
    else:
        expected.channel_axis, images = 1, h.movedim(-1, 1)
        expected.ndims = (4,)
        torch.testing.assert_close(new(x), expected(images).movedim(1, -1))
    assert type(back[1]) is fx.LayerNorm
    assert layer.eps in (model[1].eps, 1e-6)


def test_layers_at_each_position_of_images() -> None:
    conv = nn.Sequential(nn.Conv2d(3, 6, 1), randomized(fx.LayerNorm(6, channel_axis=1)))
    x = torch.randn(2, 3, 4, 5)
    rms = convert(conv, "rms")
    assert type(rms[1]) is fx.RMSNorm
    assert (rms[1].channel_axis, rms[1].weight.shape) == (1, (6,))
    with pytest.warns(UserWarning, match="no running statistics yet"):
        batch = convert(conv, "batch")
    assert type(batch[1]) is fx.BatchNorm2d
    assert type(convert(batch, "torch")[1]) is nn.BatchNorm2d
    assert conversion_plan(convert(batch, "torch"), "batch", per_position=True, example_input=x).preserved
    grouped = convert(conv, "group", num_groups=3)
    torch.testing.assert_close(
        grouped(x),
        nn.functional.group_norm(conv[0](x).movedim(1, -1).reshape(-1, 6), 3, conv[1].weight, conv[1].bias)
        .view(2, 4, 5, 6)
        .movedim(-1, 1),
    )
    assert "no form for each position" in conversion_plan(grouped, "torch")[0].reason
    flat = nn.Sequential(fx.BatchNorm1d(6, channel_axis=-1))
    assert "no form for the last axis" in conversion_plan(flat, "torch")[0].reason
    assert conversion_plan(flat, "torch", example_input=torch.randn(5, 6)).preserved
    assert type(convert(flat, "layer", channel_axis=1)[0]) is fx.LayerNorm1d
    assert conversion_plan(nn.Sequential(fx.LayerNorm2d(6)), "rms", per_position=True)[0].target == "RMSNorm"


def test_number_of_spatial_axes_is_seen_guessed_or_asked_for() -> None:
    lone = nn.Sequential(nn.GroupNorm(2, 6))
    assert "pass example_input" in conversion_plan(lone, "unitized")[0].reason
    assert conversion_plan(lone, "unitized", example_input=torch.ones(INPUTS[3]))[0].target == "UnitizedBatchNorm3d"
    assert conversion_plan(lone, "unitized", example_input=torch.ones(2, 6))[0].target == "UnitizedBatchNorm1d"
    assert conversion_plan(lone, "group")[0].target == "GroupNorm"
    assert conversion_plan(lone, "none")[0].target == "NoNorm"
    guessed = conversion_plan(nn.Sequential(nn.Conv3d(1, 6, 1), *lone), "unitized")
    assert guessed[0].target == "UnitizedBatchNorm3d"
    dense = conversion_plan(nn.Sequential(nn.Linear(1, 6), *lone), "unitized")
    assert dense[0].target == "UnitizedBatchNorm1d"
    mixed = nn.Sequential(nn.Conv3d(1, 6, 1), nn.Conv2d(1, 6, 1), *lone)
    assert conversion_plan(mixed, "unitized")[0].status == "refuse"

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(2, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.norm(x).flatten(2))

    plan = conversion_plan(Twice(), "unitized", example_input=torch.ones(INPUTS[2]))
    assert "different numbers of axes" in plan[0].reason
    assert conversion_plan(nn.Sequential(nn.BatchNorm1d(6)), fx.UnitizedBatchNorm2d)[0].status == "refuse"


def test_new_statistics_are_announced() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.GroupNorm(2, 6))
    with pytest.warns(UserWarning, match=r"1 converted layers have no running statistics yet \(1\)"):
        new = convert(model, "unitized")
    assert new[1].running_mean is not None
    assert "recalibrate() before evaluation" in str(conversion_plan(model, "unitized"))
    assert conversion_plan(nn.Sequential(nn.BatchNorm2d(3)), "group")[0].notes == ("drops running statistics",)
    with torch.no_grad():
        trained = fx.UnitizedBatchNorm2d(3)
        trained.alpha.fill_(0.5)
    row = conversion_plan(nn.Sequential(trained), "torch", example_input=torch.randn(2, 3, 4, 4))
    assert (row[0].effect, row[0].notes) == ("changes", ("drops alpha",))
    assert row.preserved is False
    assert "NOT preserved" in str(row)
    other = conversion_plan(nn.Sequential(trained), "unitized", norm="rms")
    assert other[0].effect == "changes"
    assert conversion_plan(nn.Sequential(nn.BatchNorm2d(3)), "unitized", eps=0.1)[0].effect == "changes"
    assert conversion_plan(nn.Sequential(nn.BatchNorm2d(3)), "batch", track_running_stats=False)[0].effect == "changes"


# -- refusals


class Louder(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Named(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3)


def refusals() -> dict[str, tuple[nn.Module, str]]:
    parametrized = nn.BatchNorm2d(3)
    nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Softplus())
    hooked = nn.GroupNorm(1, 3)
    hooked.weight = nn.Parameter(torch.ones(3, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight_norm(hooked)
    replaced = nn.BatchNorm2d(3)
    replaced.forward = lambda x: x
    switched = nn.BatchNorm2d(3)
    switched.track_running_stats = False
    return {
        "subclass": (Louder(3), "Louder is a subclass with its own forward"),
        "parametrized": (parametrized, "remove_parametrizations"),
        "weight_norm": (hooked, "weight is computed by a hook"),
        "instance": (replaced, "replaced on the instance"),
        "lazy": (nn.LazyBatchNorm2d(), "run one batch"),
        "switched": (switched, "track_running_stats was changed"),
        "lrn": (nn.LocalResponseNorm(3), "window"),
        "normprop": (fx.NormPropConv2d(3, 3, 1), "Normalization Propagation"),
        "rule": (type("Own", (FlexNorm,), {"rule": lambda self, m: (m.var, m.mean)})(3), "subclass with its own rule"),
    }


@pytest.mark.parametrize("name", refusals())
def test_refused_with_the_reason_and_left_alone(name: str) -> None:
    layer, reason = refusals()[name]
    model = nn.Sequential(nn.BatchNorm2d(3), layer)
    plan = conversion_plan(model, "unitized")
    assert [row.status for row in plan] == ["convert", "refuse"]
    assert reason in plan["1"].reason
    assert "(refused)" in str(plan)
    with pytest.warns(UserWarning, match=re.escape(reason)):
        new = convert(model, "unitized", inplace=True)
    assert new[1] is layer


def test_subclass_with_only_a_constructor_is_its_base() -> None:
    plan = conversion_plan(nn.Sequential(Named(3)), "unitized", example_input=torch.randn(2, 3, 4, 4))
    assert plan.preserved
    assert plan[0].notes == ("subclass Named of BatchNorm2d",)
    assert convert(nn.Sequential(Named(3)), "unitized")[0].eps == 1e-3


def test_frozen_torch_layers_are_converted_frozen() -> None:
    model = freeze(zoo()["vgg"])
    there = convert(model, "unitized").train()
    assert all(m.frozen for m in there.modules() if isinstance(m, FlexNorm))
    x = torch.randn(IMAGE)
    torch.testing.assert_close(there(x), model.eval()(x))
    back = convert(there, "torch").train()
    assert sum(is_frozen(m) for m in back.modules()) == 2
    assert torch.equal(back(x), model.eval()(x))
    assert same_state(back, model)
    assert conversion_plan(model, "population")[0].effect == "kept"


# -- what `to` may be


def test_functions_of_the_old_layer() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(4), nn.BatchNorm2d(5))
    seen: list[int] = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    model[0].eval()

    def shrink(layer: nn.Module) -> nn.Module | None:
        if layer.num_features == 3:
            return nn.GroupNorm(1, 3)
        if layer.num_features == 4:
            return nn.Sequential(layer, nn.Dropout(0.5))
        return None

    plan = conversion_plan(model, shrink)
    assert [row.status for row in plan] == ["convert", "convert", "keep"]
    assert [row.target for row in plan] == ["GroupNorm", "Sequential", ""]
    new = convert(model, shrink, inplace=True)
    assert isinstance(new[0], nn.GroupNorm)
    assert not new[0].training
    new[0](torch.ones(1, 3, 2))
    assert seen == [1]
    assert isinstance(new[1][0], nn.BatchNorm2d)
    assert isinstance(new[2], nn.BatchNorm2d)
    same = convert(model, lambda layer: layer, inplace=True, include="2")
    assert isinstance(same[2], nn.BatchNorm2d)
    with pytest.raises(TypeError, match="must return a module or None"):
        convert(model, lambda layer: 3)
    with pytest.raises(TypeError, match="unknown argument"):
        convert(model, lambda layer: layer, eps=1)


def test_classes_ours_torchs_and_foreign() -> None:
    model = randomized(nn.Sequential(nn.BatchNorm2d(6, eps=1e-3)))
    assert type(convert(model, fx.PopulationNorm2d)[0]) is fx.PopulationNorm2d
    assert convert(model, nn.GroupNorm, num_groups=3)[0].num_groups == 3
    assert convert(model, nn.GroupNorm)[0].num_groups == 1

    class Mine(FlexNorm):
        ndims = (4,)

        def rule(self, moments):
            return moments.var, moments.mean

    class Tanh(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(width))

    mine = convert(model, Mine)[0]
    assert type(mine) is Mine
    assert mine.eps == 1e-3
    assert torch.equal(mine.running_mean, model[0].running_mean)
    assert torch.equal(convert(model, Tanh)[0].weight, model[0].weight)
    assert conversion_plan(nn.Sequential(nn.BatchNorm1d(6)), Mine)[0].status == "refuse"
    none = convert(model, "none")
    assert isinstance(none[0], fx.NoNorm)
    assert "torch has no none layer" in conversion_plan(none, "torch")[0].reason


def test_wrong_arguments_say_what_is_right() -> None:
    model = nn.Sequential(nn.BatchNorm2d(6))
    with pytest.raises(ValueError, match="did you mean 'unitized'"):
        convert(model, "unitised")
    for function in (convert, conversion_plan):
        with pytest.raises(ValueError, match=r"use flexnorm\.surgery\.convert_to_normprop\(model, example_input="):
            function(model, "normprop")
    with pytest.raises(TypeError, match="unknown argument for unitized 'norms'; did you mean 'norm'"):
        convert(model, "unitized", norms="rms")
    with pytest.raises(TypeError, match="unknown argument for torch"):
        conversion_plan(model, "torch", foo=1)
    with pytest.raises(ValueError, match="unknown unit_norm of UnitizedBatchNorm"):
        convert(model, "unitized", norm="bad")
    with pytest.raises(ValueError, match=r"torch\.layer"):
        convert(model, nn.LayerNorm)
    with pytest.raises(TypeError, match="to must be"):
        convert(model, 3)
    with pytest.raises(ValueError, match="no normalization layer"):
        convert(nn.Linear(2, 2), "unitized")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(model)
    with pytest.raises(TypeError, match="scripted"):
        convert(scripted, "unitized")
    part = nn.Sequential(nn.BatchNorm2d(6), nn.BatchNorm2d(5))
    with pytest.warns(UserWarning, match="num_groups must divide"):
        assert isinstance(convert(part, "group", num_groups=3)[1], nn.BatchNorm2d)


# -- the report


def test_plan_equals_the_conversion_and_has_no_side_effects() -> None:
    model = zoo()["mobilenet"]
    model[1].eval()
    state = copy.deepcopy(model.state_dict())
    versions = [t._version for t in (*model.parameters(), *model.buffers())]
    modules = list(model.modules())
    flags = [m.training for m in modules]
    rng = torch.get_rng_state()
    x = torch.randn(IMAGE, generator=torch.Generator().manual_seed(1))
    plan = conversion_plan(model, "unitized", example_input=x)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in modules] == flags
    assert list(model.modules()) == modules
    assert [t._version for t in (*model.parameters(), *model.buffers())] == versions
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    new = convert(model, "unitized")
    for row in plan:
        assert type(new.get_submodule(row.name)).__name__ == row.target
    assert plan.preserved
    assert 0 <= plan.evaluation.maximum < 1e-5 < plan.evaluation.scale


def test_plan_prints_as_a_table_and_by_rich() -> None:
    import io

    from rich.console import Console

    model = nn.Sequential(nn.BatchNorm2d(3), Louder(3))
    plan = conversion_plan(model, "unitized")
    lines = str(plan).splitlines()
    assert lines[0].split() == ["layer", "is", "becomes", "function", "remarks"]
    assert lines[1].split() == ["0", "BatchNorm2d", "UnitizedBatchNorm2d", "kept"]
    assert lines[-1] == "1 converted, 0 kept, 1 refused"
    assert len(plan) == 2
    assert plan.preserved is None
    assert plan["0"] is plan[0]
    with pytest.raises(KeyError):
        plan["nothing"]
    out = io.StringIO()
    Console(file=out, width=150).print(plan)
    assert "UnitizedBatchNorm2d" in out.getvalue()
    assert conversion_plan(nn.BatchNorm2d(3), "unitized").cells(conversion_plan(nn.BatchNorm2d(3), "unitized")[0])[0]


def test_measured_differences_report_failures() -> None:
    single = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12))
    plan = conversion_plan(single, "unitized", example_input=torch.ones(1, 3, 2, 2))
    assert plan.evaluation.preserved
    assert "the model itself failed" in plan.training.error
    assert plan.preserved is False
    broken = conversion_plan(single, lambda layer: nn.Linear(3, 3), example_input=torch.ones(2, 3, 2, 2))
    assert "the changed model failed" in broken.evaluation.error
    wider = conversion_plan(single, lambda layer: nn.Linear(12, 3), example_input=torch.ones(2, 3, 2, 2))
    assert "other shapes" in str(wider.evaluation)
    with pytest.raises(RuntimeError):
        conversion_plan(single, "unitized", example_input=torch.ones(2, 3, 2, 3))

    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> list[str]:
            self.bn(x)
            return ["no tensor"]

    assert "no tensor" in conversion_plan(Silent(), "unitized", example_input=torch.ones(3, 2)).evaluation.error


def test_outputs_in_dataclasses_mappings_and_keyword_inputs() -> None:
    from dataclasses import dataclass

    @dataclass
    class Output:
        logits: Tensor
        parts: tuple[Tensor, ...]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(2)

        def forward(self, x: Tensor, y: Tensor) -> Output:
            z = self.bn(x + y)
            return Output(z, (z, z[:0]))

    example = {"x": torch.randn(4, 2), "y": torch.randn(4, 2)}
    assert conversion_plan(Model(), "unitized", example_input=example).preserved
    assert not conversion_plan(Model(), "layer", example_input=(example["x"], example["y"])).preserved


def test_parametrized_convolutions_beside_are_untouched() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4))
    new = convert(model, "unitized")
    assert same_state(convert(new, "torch"), model)


@pytest.mark.filterwarnings("ignore:.*no running statistics yet")
@pytest.mark.parametrize("norm", ["group", "none"])
@pytest.mark.parametrize("layer", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_layers_for_any_number_of_axes_remember_those_they_came_from(norm: str, layer: type[nn.Module]) -> None:
    there = convert(nn.Sequential(layer(6)), norm)
    there = copy.deepcopy(there)
    assert type(convert(there, "torch.batch")[0]) is layer
    assert type(convert(there, "batch")[0]).__name__ == layer.__name__


@pytest.mark.parametrize("to", ["batch", "rms", "group"])
def test_transformers_of_torch_do_not_go_around_the_new_norms(to: str) -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x, padding = torch.randn(2, 5, 8), torch.arange(5) > torch.tensor([[4], [2]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        new = convert(encoder, to).eval()
        back = convert(convert(encoder, "layer"), "torch")
    with torch.no_grad():
        found = new(x), new(x, src_key_padding_mask=padding)
    for y, z in zip(found, (new(x), new(x, src_key_padding_mask=padding)), strict=True):
        torch.testing.assert_close(y, z)
    for layer in back.layers:
        assert layer.activation_relu_or_gelu == encoder.layers[0].activation_relu_or_gelu == 1
    assert back.use_nested_tensor
    assert not new.use_nested_tensor
