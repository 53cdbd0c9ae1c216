"""What a conversion reads off a layer, and what it says about the function, against what is measured."""

from __future__ import annotations

import copy

import pytest
import torch
from model_zoo import BatchNormAct2d, FrozenBatchNorm2d, GroupNormAct, randomized
from norm_options import BASE, BUILT_IN, OPTIONS, OTHER, declared_for_now
from torch import Tensor, nn

import flexnorm.nn as fx
from flexnorm import convert, fold, freeze, recalibrate
from flexnorm.engine import FlexNorm, constructor_arguments
from flexnorm.surgery import conversion_plan, fold_plan
from flexnorm.surgery._graft import effect, move_tensors, notes
from flexnorm.surgery._reading import RefusedError, common_ndim, name_of, read
from flexnorm.surgery._targets import resolve

X = torch.randn(8, 6, 5, 3)


def trained(name: str, **options: object) -> nn.Module:
    """A layer with statistics and parameters of its own."""
    layer = fx.make_norm(name, 6, **{**BASE.get(name, {}), **options})
    for _ in range(2):
        layer(2 * torch.randn(8, 6, 5, 3) + 1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.rand_like(parameter) + 0.25)
    return layer


# -- reading


@pytest.mark.parametrize("name", BUILT_IN)
def test_our_own_layers_are_read_with_all_that_they_were_built_with(name: str) -> None:
    options = {option: OTHER[option] for option in fx.norm_class(name).options}
    source = read(layer := fx.make_norm(name, 6, **options))
    assert source.norm is layer
    assert {key: source.config[key] for key in options} == options
    assert source.ndim == (2 if len(fx.norm_class(name).spatial()) == 1 else None)
    assert not source.frozen
    assert {"device", "dtype", "bias", "norm"}.isdisjoint(source.config)


@pytest.mark.parametrize(
    ("layer", "name", "ndim", "config"),
    [
        (nn.BatchNorm1d(6, momentum=None), "batch", 1, {"eps": 1e-5, "momentum": None, "affine": True}),
        (nn.BatchNorm3d(6, affine=False), "batch", 3, {"affine": False, "track_running_stats": True}),
        (nn.SyncBatchNorm(6), "batch", None, {"process_group": "world"}),
        (nn.InstanceNorm2d(6), "instance", 2, {"affine": False, "track_running_stats": False}),
        (nn.GroupNorm(3, 6, eps=0.1), "group", None, {"num_groups": 3, "eps": 0.1, "affine": True}),
        (nn.LayerNorm((6, 5, 3)), "layer", 2, {"eps": 1e-5, "affine": True}),
        (nn.LayerNorm(6, elementwise_affine=False), "layer", None, {"affine": False, "channel_axis": -1}),
        (nn.RMSNorm(6), "rms", None, {"eps": None, "channel_axis": -1}),
        (BatchNormAct2d(6), "batch", 2, {"momentum": 0.1}),
        (GroupNormAct(6), "group", None, {"num_groups": 2}),
        (FrozenBatchNorm2d(6), "batch", 2, {"affine": True, "track_running_stats": True}),
    ],
)
def test_layers_of_others_are_read_as_the_norm_that_computes_the_same(
    layer: nn.Module, name: str, ndim: int | None, config: dict
) -> None:
    source = read(layer)
    assert (source.norm.norm_name, source.ndim, source.norm.num_features) == (name, ndim, 6)
    assert config.items() <= dict(source.config).items()
    assert {t.device.type for t in (*source.norm.parameters(), *source.norm.buffers())} <= {"meta"}
    assert source.frozen == source.norm.frozen == isinstance(layer, FrozenBatchNorm2d)
    assert source.tracks == (source.norm.running_mean is not None)
    assert (source.origin is not None) == (type(layer).__module__ == "model_zoo")


def test_a_frozen_layer_is_read_frozen() -> None:
    for layer in (nn.BatchNorm2d(6), fx.UnitizedBatchNorm2d(6)):
        source = read(freeze(layer))
        assert source.frozen
        assert source.norm.function(True) == source.norm.function(False) == ("batch", True, 1e-5)


def test_names_of_classes() -> None:
    assert name_of(fx.UnitizedBatchNorm3d) == ("unitized", 3)
    assert name_of(fx.GroupNorm) == ("group", None)
    assert name_of(nn.InstanceNorm1d) == ("instance", 1)
    assert name_of(nn.SyncBatchNorm) == ("batch", None)
    assert name_of(type("Own", (fx.BatchNorm2d,), {})) is name_of(nn.Linear) is None


def test_what_is_no_layer_of_known_kind_is_refused() -> None:
    own = type("Own", (fx.BatchNorm2d,), {"rule": lambda self, moments: (moments.mean, moments.var)})
    with pytest.raises(RefusedError, match="Own is a subclass with its own rule"):
        read(own(6))
    with pytest.raises(RefusedError, match="Linear is no layer that convert"):
        read(nn.Linear(2, 2))


def test_dimension_that_a_model_agrees_on() -> None:
    assert common_ndim(nn.Sequential(nn.ConvTranspose3d(1, 1, 1), nn.BatchNorm1d(2))) == 3
    assert common_ndim(nn.Sequential(nn.Conv3d(1, 1, 1), fx.NormPropConv2d(2, 2, 1))) is None
    assert common_ndim(nn.Linear(1, 1)) == 1
    assert common_ndim(nn.ReLU()) is None


# -- the effect

AFFINE = [(n, o) for n in BUILT_IN for o in ("affine", "bias") if o in constructor_arguments(fx.norm_class(n))]


@pytest.mark.parametrize(("name", "option"), [*OPTIONS, *AFFINE])
def test_an_option_that_changes_the_function_changes_the_verdict(name: str, option: str) -> None:
    arguments = dict.fromkeys(("affine", "bias"), False) | OTHER
    base = {"track_running_stats": True} if name == "instance" else {}
    model = nn.Sequential(trained(name, **base))
    plan = conversion_plan(model, name, example_input=X, **{option: arguments[option]})
    assert plan.evaluation is not None
    assert plan.training is not None
    verdict = plan[0].effect
    assert verdict in ("kept", "kept in evaluation", "changes")
    if verdict != "changes":
        assert plan.evaluation.preserved
    if verdict == "kept":
        assert plan.training.preserved
        # The gradients too.
        grads = []
        for m in (model, convert(model, name, **{option: arguments[option]})):
            x = X.clone().requires_grad_()
            copy.deepcopy(m).train()(x).square().sum().backward()
            grads.append(x.grad)
        torch.testing.assert_close(grads[1], grads[0])
    if option in ("eps", "affine", "bias") and name not in ("none", "mean_only"):
        assert verdict == "changes"


def test_gradient_of_the_population_changes_in_training_only() -> None:
    model = nn.Sequential(fx.PopulationNorm2d(6, gradient="batch"))
    plan = conversion_plan(model, "population", gradient="none")
    assert plan[0].effect == "kept in evaluation"
    assert conversion_plan(model.eval(), "population", gradient="batch")[0].effect == "kept"
    assert conversion_plan(freeze(model), "population", gradient="none")[0].effect == "kept"


@pytest.mark.parametrize(
    ("layer", "to", "expected"),
    [
        (nn.BatchNorm2d(6), "unitized", "kept"),
        (nn.BatchNorm2d(6), "population", "kept in evaluation"),
        (nn.BatchNorm2d(6), "renorm", "kept in evaluation"),
        (fx.PopulationNorm2d(6), "torch", "kept in evaluation"),
        (nn.BatchNorm2d(6), "group", "changes"),
        (nn.BatchNorm2d(6), "mean_only", "changes"),
        (nn.BatchNorm2d(6, track_running_stats=False), "population", "changes"),
        (nn.GroupNorm(1, 6), fx.LayerNorm2d, "kept"),
        (nn.GroupNorm(6, 6), fx.InstanceNorm2d, "kept"),
        (fx.InstanceNorm2d(6, track_running_stats=True), "torch.batch", "kept in evaluation"),
        (nn.InstanceNorm2d(6), "batch", "changes"),
        (nn.BatchNorm2d(6), "none", "changes"),
        (fx.NoNorm(6), "batch", "changes"),
        (fx.UnitizedBatchNorm2d(6), "torch", "kept"),
        (fx.BatchNorm2d(6), nn.SyncBatchNorm, "kept"),
    ],
)
def test_judgement_between_norms(layer: nn.Module, to: object, expected: str) -> None:
    model = nn.Sequential(randomized(layer)) if not isinstance(layer, fx.UnitizedBatchNorm2d) else nn.Sequential(layer)
    if isinstance(to, type) and to is nn.SyncBatchNorm:
        assert conversion_plan(model, to)[0].effect == expected
        return
    plan = conversion_plan(model, to, example_input=X)
    assert plan[0].effect == expected
    assert plan.evaluation.preserved == (expected != "changes") or isinstance(layer, fx.NoNorm)
    assert plan.training.preserved or expected != "kept"


def test_the_parameters_that_move_decide() -> None:
    """A gate of the old layer is taken over; of a new one the initial value counts."""
    source = read(trained("unitized"))
    new = resolve("unitized", {"unit_norm": "rms"}).build(source, 2, torch.device("cpu"), torch.float32)
    move_tensors(source, new)
    assert new.alpha is source.module.alpha
    assert effect(source, new) == "changes"
    nn.init.zeros_(source.module.alpha)
    assert effect(source, new) == "kept"


def test_of_a_class_with_its_own_rule_nothing_is_claimed() -> None:
    own = type("Own", (fx.BatchNorm2d,), {"rule": lambda self, moments: (self.weight, self.bias)})
    plain = type("Plain", (fx.BatchNorm2d,), {"extra_repr": lambda self: "plain"})
    model = nn.Sequential(randomized(nn.BatchNorm2d(6)))
    assert conversion_plan(model, own)[0].effect == "changes"
    assert conversion_plan(model, plain)[0].effect == "kept"


def test_a_weight_without_effect_may_go() -> None:
    assert conversion_plan(nn.Sequential(nn.BatchNorm2d(6)), "batch", affine=False)[0].effect == "kept"
    row = conversion_plan(nn.Sequential(randomized(nn.BatchNorm2d(6))), "batch", affine=False)[0]
    assert (row.effect, row.notes) == ("changes", ("drops weight, bias",))


def test_notes_name_what_goes_and_what_is_not_known_yet() -> None:
    source = read(trained("unitized"))
    group = resolve("group", {}).build(source, 2, torch.device("cpu"), torch.float32)
    move_tensors(source, group)
    assert notes(source, group) == ("drops alpha, running statistics",)
    source = read(nn.GroupNorm(2, 6))
    batch = resolve("torch.batch", {}).build(source, 2, torch.device("cpu"), torch.float32)
    assert notes(source, batch) == ("statistics unknown: recalibrate() before evaluation",)


# -- a norm that is declared here and nowhere else


def test_a_norm_of_ones_own_is_one_like_the_others() -> None:
    with declared_for_now():

        class SoftNorm(FlexNorm):
            """Divide by the batch's standard deviation to some power; at power 1 it is batch normalization."""

            norm_name = "soft"
            options = ("eps", "power")
            torch_layer = "batch"
            no_decay = ("weight",)

            def __init__(self, num_features: int, eps: float = 1e-5, power: float = 0.5, **kwargs: object) -> None:
                super().__init__(num_features, eps, **kwargs)
                self.power = power

            def same_as(self, training: bool) -> str:
                return "batch" if self.power == 1 else "soft"

            def rule(self, moments) -> tuple[Tensor, Tensor]:
                mean, var = self.batch_or_running(moments)
                scale = self.weight * (var + self.eps) ** (-self.power / 2)
                return scale, self.bias - mean * scale

        assert isinstance(soft := fx.make_norm("soft", 6, ndim=3, power=0.9), SoftNorm)
        assert (soft.power, fx.needs_batch(soft), fx.is_norm(soft)) == (0.9, True, True)
        assert fx.undecayed(soft) == [soft.weight]
        assert "power=0.9" in repr(soft)

        images, x = nn.Sequential(nn.Conv2d(3, 6, 1), randomized(nn.BatchNorm2d(6, eps=1e-3))), torch.randn(4, 3, 5, 5)
        plan = conversion_plan(images, "soft", example_input=x)
        assert (plan[0].target, plan[0].effect, plan.preserved) == ("SoftNorm", "changes", False)
        assert conversion_plan(images, "soft", power=1.0, example_input=x).preserved
        there = convert(images, "soft", power=0.7)
        assert (there[1].power, there[1].eps) == (0.7, 1e-3)
        assert torch.equal(there[1].running_mean, images[1].running_mean)
        assert convert(there, "soft", momentum=0.3)[1].power == 0.7
        assert conversion_plan(there, "soft", power=0.6)[0].effect == "changes"
        assert conversion_plan(there, SoftNorm)[0].status == "keep"
        back = convert(there, "torch")
        assert all(torch.equal(value, back.state_dict()[key]) for key, value in images.state_dict().items())
        with pytest.raises(TypeError, match="unknown argument for soft 'powr'; did you mean 'power'"):
            convert(images, "soft", powr=1)

        folded = fold(there, example_input=x)
        assert isinstance(folded[1], nn.Identity)
        untracked = nn.Sequential(nn.Conv2d(3, 6, 1), SoftNorm(6, track_running_stats=False))
        assert "statistics of the batch" in fold_plan(untracked)[0].reason

        recalibrate(there, [x])
        y = there[0](x)
        torch.testing.assert_close(there[1].running_mean, y.mean((0, 2, 3)))
        frozen = freeze(there).train()[1]
        assert frozen.frozen
        assert not fx.needs_batch(frozen)
    with pytest.raises(ValueError, match="unknown norm 'soft'"):
        fx.make_norm("soft", 6)
