"""What a norm declares about itself, and what reads it."""

from __future__ import annotations

import inspect

import pytest
import torch
from norm_options import BASE, BUILT_IN, OPTIONS, OTHER, declared_for_now
from torch import nn

import flexnorm
import flexnorm.nn as fx
from flexnorm.engine import NORMS, FlexNorm, Norm, constructor_arguments

COMMON = {"num_features", "num_channels", "eps", "momentum", "affine", "track_running_stats"}
COMMON |= {"bias", "process_group", "device", "dtype", "channel_axis", "per_position"}
FORMER = {"norm"}  # the former name of unit_norm


@pytest.mark.parametrize("name", BUILT_IN)
def test_all_classes_of_a_norm_declare_the_same_and_every_option_is_declared(name: str) -> None:
    classes = set(NORMS[name].values())
    for attribute in ("norm_name", "statistics_from", "options", "defaults", "torch_layer", "no_decay"):
        assert len({repr(getattr(cls, attribute)) for cls in classes}) == 1
    cls = fx.norm_class(name)
    arguments = constructor_arguments(cls)
    assert set(cls.options) <= arguments
    assert arguments - COMMON - FORMER <= set(cls.options), "an argument of its own decides the function"
    assert set(cls.defaults) <= arguments
    assert cls.torch_layer in ("", "batch", "group", "layer", "instance")
    assert cls.statistics_from in ("batch", "sample", "population", "none")
    assert [*NORMS[name]] == [1, 2, 3]
    for ndim, layer in NORMS[name].items():
        assert layer is fx.norm_class(name, ndim)
        assert ndim in layer.spatial()
        assert name == "none" or getattr(fx, layer.__name__) is layer


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_options_are_attributes_and_shown(name: str, option: str) -> None:
    layer = fx.make_norm(name, 6, **{**BASE.get(name, {}), option: OTHER[option]})
    assert getattr(layer, option) == OTHER[option]
    assert option == "num_groups" or f"{option}={OTHER[option]!r}" in repr(layer)


@pytest.mark.parametrize("name", BUILT_IN)
def test_statistics_come_from_where_it_is_declared(name: str) -> None:
    x = torch.randn(4, 6, 5, 3)
    # A population of its own, not the first batch's.
    layer = fx.make_norm(name, 6, **({"statistics": "estimated", "gradient": "none"} if name == "population" else {}))
    changed = torch.cat([x[:1], 3 + 2 * x[1:]])
    mixes = not torch.allclose(layer(x)[0], layer(changed)[0], atol=1e-4)
    assert mixes == (type(layer).statistics_from == "batch") == fx.needs_batch(layer)
    if type(layer).statistics_from == "sample":
        torch.testing.assert_close(layer.train()(x), layer.eval()(x))


def test_a_declared_class_is_known_at_once_and_forms_of_it_take_their_place() -> None:
    with declared_for_now():

        class Cube(FlexNorm):
            norm_name = "cube"
            statistics_from = "sample"

        assert fx.norm_class("cube") is fx.norm_class("cube", 3) is Cube

        class Cube2d(Cube, ndims=(4,)):
            """Of images."""

        class Named(Cube2d):
            """A subclass of a form is no form."""

            ndims = (4,)

        assert [fx.norm_class("cube", n) for n in (1, 2, 3)] == [Cube, Cube2d, Cube]
        assert (Cube2d.ndims, Cube2d.spatial(), Cube.spatial()) == ((4,), (2,), (1, 2, 3))
        assert fx.norm_of(Named(3)).norm_name == "cube"
        # Nor is a subclass of another module's norm.
        type("Wide", (fx.GroupNorm,), {"ndims": (4,), "__module__": "elsewhere"})
        assert fx.norm_class("group", 2) is fx.GroupNorm
        assert not fx.needs_batch(Cube2d(3))
        with pytest.raises(ValueError, match=r"Square declares norm_name = 'cube', which is that of .*Cube; choose"):

            class Square(FlexNorm):
                norm_name = "cube"

        class Flat(FlexNorm):
            norm_name = "flat"
            ndims = (2, 3)

        with pytest.raises(ValueError, match=r"the norm 'flat' has no layer for 2 spatial axes, only for \[1\]"):
            fx.make_norm("flat", 3)
        first = Flat

        # Edited and run again, as in a notebook.
        class Flat(FlexNorm):
            norm_name = "flat"

        assert fx.norm_class("flat", 2) is Flat is not first
    assert "cube" not in NORMS
    with pytest.raises(TypeError):
        NORMS["batch"] = {}


def test_torchs_layers_are_declared_by_those_that_compute_the_same() -> None:
    same = {
        "batch": (nn.BatchNorm1d(4), nn.SyncBatchNorm(4), nn.LazyBatchNorm2d(), type("Own", (nn.BatchNorm3d,), {})(4)),
        "instance": (nn.InstanceNorm2d(4),),
        "group": (nn.GroupNorm(2, 4),),
        "layer": (nn.LayerNorm(4),),
        "rms": (nn.RMSNorm(4),),
    }
    for name, modules in same.items():
        for module in modules:
            assert fx.norm_of(module).norm_name == name
            assert fx.needs_batch(module) == (name == "batch")
    assert fx.norm_of(nn.Linear(1, 1)) is fx.norm_of(nn.LocalResponseNorm(2)) is None
    assert fx.is_norm(nn.LocalResponseNorm(2))


def test_the_same_function_as_a_simpler_norm() -> None:
    unitized, gated = fx.UnitizedBatchNorm2d(6), fx.BatchInstanceNorm2d(6)
    assert unitized.same_as(True) == unitized.same_as(False) == gated.same_as(True) == "batch"
    assert unitized.function(True) == fx.BatchNorm2d(6).function(True) == ("batch", False, 1e-5)
    nn.init.constant_(unitized.alpha, 0.5)
    nn.init.constant_(gated.gate, 0.5)
    assert (unitized.same_as(True), gated.same_as(True)) == ("unitized", "batch_instance")
    assert unitized.function(False) == ("unitized", True, 1e-5, "paper", False)
    groups = [fx.GroupNorm(n, 6) for n in (1, 2, 6)]
    assert [g.same_as(True) for g in groups] == ["layer", "group", "instance"]
    assert groups[1].function(True) == ("group", False, 2, 1e-5)
    for layer in (fx.PopulationNorm2d(6), fx.BatchRenorm2d(6), fx.InstanceNorm2d(6, track_running_stats=True)):
        assert layer.same_as(False) == "batch" != layer.same_as(True)
        assert layer.function(False) == ("batch", True, 1e-5)
        assert layer.freeze().function(True) == layer.function(False)
    assert fx.BatchRenorm2d(6, r_max=1, d_max=0).same_as(True) == "batch"
    assert fx.InstanceNorm2d(6).same_as(False) == "instance"
    own = type("Own", (FlexNorm,), {})
    assert own(3).function(True) == (f"{__name__}.Own", False, 1e-5)


def test_parameters_without_weight_decay() -> None:
    model = nn.Sequential(nn.PReLU(), fx.UnitizedBatchNorm2d(3), fx.BatchNorm2d(3), fx.NoNorm(3))
    assert fx.undecayed(model) == [model[1].alpha]
    with declared_for_now():
        own = type("Own", (FlexNorm,), {"no_decay": ("weight", "tau")})
        assert fx.undecayed(own(3)) != []


def test_the_former_name_of_unit_norm_still_works() -> None:
    assert fx.UnitizedBatchNorm2d(3, norm="rms").unit_norm == "rms"
    assert fx.make_norm("unitized", 3, norm="rms").unit_norm == "rms"
    with pytest.raises(ValueError, match="unknown unit_norm of UnitizedBatchNorm 'bad'"):
        fx.UnitizedBatchNorm2d(3, norm="bad")


def test_arguments_behind_keywords_are_those_of_the_class_above() -> None:
    class Own(fx.UnitizedBatchNorm2d):
        def __init__(self, channels: int, **kwargs: object) -> None:
            super().__init__(channels, **kwargs)

    assert constructor_arguments(nn.GroupNorm) == {"num_groups", "num_channels", "eps", "affine", "device", "dtype"} | (
        {"bias"} if "bias" in inspect.signature(nn.GroupNorm).parameters else set()
    )
    assert constructor_arguments(Own) >= {"channels", "unit_norm", "process_group", "bias", "dtype"}
    assert "momentum" in constructor_arguments(Own)
    assert "track_running_stats" not in constructor_arguments(fx.BatchRenorm2d), "typed keywords: it sets that itself"
    assert isinstance(Own(3, unit_norm="rms"), Norm)


def test_where_the_channels_are_belongs_to_the_function_where_it_matters() -> None:
    def same(a: Norm, b: Norm) -> bool:
        return a.function(True) == b.function(True)

    assert same(fx.LayerNorm(6), fx.LayerNorm1d(6, channel_axis=-1))
    assert same(fx.LayerNorm(6, channel_axis=1), fx.LayerNorm2d(6, per_position=True))
    assert same(fx.LayerNorm(6), fx.GroupNorm(1, 6, channel_axis=-1))
    assert not same(fx.LayerNorm(6), fx.LayerNorm2d(6))
    assert not same(fx.LayerNorm(6), fx.LayerNorm((1, 6)))
    for name in BUILT_IN:
        layer = fx.norm_class(name)
        if name == "none" or layer.pools_positions:
            continue
        options = BASE.get(name, {})
        images, positions = fx.make_norm(name, 6, **options), fx.make_norm(name, 6, per_position=True, **options)
        x = torch.randn(4, 6, 5, 3)
        for module in (images, positions):
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.fill_(0.7)
        alike = torch.allclose(images(x), positions(x), atol=1e-5)
        assert layer.positions_matter != alike == same(images, positions), name


def test_the_factory_gives_the_layer_of_the_place() -> None:
    assert repr(fx.make_norm("layer", 6, channel_axis=-1, eps=1e-3, affine=False)) == repr(
        fx.LayerNorm(6, 1e-3, elementwise_affine=False)
    )
    ours = fx.make_norm("rms", 6, per_position=True)
    assert (type(ours), ours.channel_axis) == (fx.RMSNorm, 1)
    assert "channel_axis=1" in repr(ours)
    whole = fx.make_norm("layer", 6, channel_axis=-1, per_position=False)
    assert type(whole) is fx.LayerNorm2d
    assert fx.norm_of(fx.LayerNorm(6)).norm_name == "layer"
    assert fx.is_norm(fx.RMSNorm(6))
    assert fx.undecayed(fx.LayerNorm(6)) == []
    x, none = torch.randn(2, 5, 6), fx.make_norm("none", 6, channel_axis=-1)
    assert none(x, mask=torch.ones(2, 5)) is x
    there = flexnorm.convert(flexnorm.convert(nn.Sequential(fx.BatchNorm1d(6, channel_axis=-1)), "none"), "layer")[0]
    assert (type(there), there.channel_axis) == (fx.LayerNorm, -1)
    for arguments in ({"momentum": 0.1}, {"per_position": True}):
        with pytest.raises(TypeError, match="LayerNorm"):
            fx.LayerNorm(6, **arguments)
