"""One language for every option that chooses layers or parameters."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from flexnorm import nn as fn
from flexnorm.optim import BatchNoise, GammaDecay, param_groups
from flexnorm.probe import find_places, select_layers, select_parameters, select_places
from flexnorm.probe.select import _holder
from flexnorm.shift import OptimizationMonitor, ShiftMonitor, WeightMonitor
from flexnorm.statistics import accumulate, freeze, is_frozen, recalibrate
from flexnorm.surgery import conversion_plan, fold_plan
from flexnorm.theory.regularization import advise

NORMS = ["1", "2.1", "3.1"]
IMAGES = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Sequential):
    """A class of its own to select by."""


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        Block(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), fn.BatchNorm2d(4)),
    )


def every_way(model: nn.Sequential) -> dict[str, tuple[Any, list[str]]]:
    """Each kind of selection, and the normalization layers that it means."""
    return {
        "name": ("2.1", ["2.1"]),
        "name above": ("2", ["2.1"]),
        "glob": ("?.1", ["2.1", "3.1"]),
        "re": ("re:[12].*", ["1", "2.1"]),
        "pattern": (re.compile(r"\d"), ["1"]),
        "class": (nn.BatchNorm2d, ["1", "2.1"]),
        "module": (model[1], ["1"]),
        "module above": (model[3], ["3.1"]),
        "function": (lambda name, module: name > "2" and isinstance(module, nn.BatchNorm2d), ["2.1"]),
        "norm": ("norm", NORMS),
        "list": (["1", ["re:3.*"], nn.GroupNorm], ["1", "3.1"]),
    }


@pytest.mark.parametrize("kind", list(every_way(network())))
def test_every_option_for_layers_takes_every_kind_of_selection(kind: str) -> None:
    model = network()
    selection, wanted = every_way(model)[kind]
    others = [name for name in NORMS if name not in wanted]
    assert [row.name for row in conversion_plan(model, "group", include=selection).rows] == wanted
    assert [row.name for row in conversion_plan(model, "group", exclude=selection).rows] == others
    assert [row.name for row in fold_plan(model, include=selection).rows] == wanted
    assert list(GammaDecay(model, 4, layers=selection)._scales) == wanted
    assert len(BatchNoise(model, 4, layers=selection)._handles) == len(wanted)
    assert [row.layer for row in advise(model, [IMAGES], 4, layers=selection).layers] == wanted

    freeze(model, include=selection)
    assert [name for name in NORMS if is_frozen(model.get_submodule(name))] == wanted
    changed = {name: model.get_submodule(name).running_mean.clone() for name in NORMS}
    recalibrate(model, [IMAGES], exclude=selection) if others else None
    assert [n for n in NORMS if not torch.equal(model.get_submodule(n).running_mean, changed[n])] == others


@pytest.mark.parametrize("kind", list(every_way(network())))
def test_accumulation_takes_every_kind_of_selection(kind: str) -> None:
    model = network()
    selection, wanted = every_way(model)[kind]
    with accumulate(model, include=selection) as accumulation:
        model(IMAGES)
        held = [n for n in NORMS if not model.get_submodule(n).running_mean.abs().sum()]
        accumulation.step()
    assert held == wanted


@pytest.mark.parametrize(
    ("selection", "wanted"),
    [
        ("norm", NORMS),
        ("2", ["2"]),
        ("2.*", ["2.0", "2.1", "2.2"]),
        ("re:.*1", NORMS),
        (nn.Conv2d, ["0", "2.0", "3.0"]),
        (Block, ["2"]),
        (lambda name, _: name == "2.2", ["2.2"]),
        (["3.1", "norm"], NORMS),
    ],
)
def test_monitors_take_every_kind_of_selection(selection: Any, wanted: list[str]) -> None:
    assert list(ShiftMonitor(network(), IMAGES, selection).layers) == wanted
    assert list(select_layers(network(), selection)) == wanted


def test_monitor_of_the_loss_takes_a_class() -> None:
    model = network()
    monitor = OptimizationMonitor(model, lambda m, b: m(b).sum(), IMAGES, nn.Conv2d)
    assert list(monitor.layers) == ["0", "2.0", "3.0"]


@pytest.mark.filterwarnings("ignore:param_groups puts nothing")
@pytest.mark.parametrize(
    ("choose", "wanted"),
    [
        (lambda _: "0.weight", ["0.weight"]),
        (lambda _: "2", ["2.0.weight"]),
        (lambda _: "re:[23].*", ["2.0.weight", "3.0.weight"]),
        (lambda _: nn.Conv2d, ["0.weight", "2.0.weight", "3.0.weight"]),
        (lambda model: model[3], ["3.0.weight"]),
        (lambda model: [model[0], "2.*"], ["0.weight", "2.0.weight"]),
        (lambda _: lambda name, module: name > "2" and isinstance(module, nn.Conv2d), ["2.0.weight", "3.0.weight"]),
    ],
)
def test_options_for_parameters_take_every_kind_of_selection(choose: Any, wanted: list[str]) -> None:
    model = network()
    selection = choose(model)
    assert list(WeightMonitor(model, weights=selection).weights) == wanted
    groups = param_groups(model, 0.1, 0.1, 0.0, IMAGES, exclude=selection, normalize=False, verbose=False)
    off = {id(p) for group in groups if not group["manifold"] for p in group["params"]}
    assert [name for name, p in model.named_parameters() if p.ndim > 1 and id(p) in off] == wanted


def test_a_module_stands_for_all_parameters_below_it() -> None:
    attention = nn.MultiheadAttention(4, 2)
    model = nn.Sequential(attention, nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    names = [name for name, _ in model.named_parameters()]
    assert select_parameters(model, names, attention, "weights") == [name for name in names if name.startswith("0.")]
    assert select_parameters(model, names, nn.Linear, "weights") == [
        "0.out_proj.weight",
        "0.out_proj.bias",
        "1.bias",
        "1.parametrizations.weight.original0",
        "1.parametrizations.weight.original1",
    ]
    assert _holder("parametrizations.weight.original0") == _holder("weight") == ""


def test_a_layer_called_norm() -> None:
    model = nn.Sequential()
    model.norm = nn.LayerNorm(3)
    model.first = nn.BatchNorm1d(3)
    places = find_places(model, lambda module: not isinstance(module, nn.Sequential))
    assert list(select_layers(model, "norm")) == ["norm", "first"]
    assert list(select_layers(model, "re:norm")) == ["norm"]
    assert [place.name for place in select_places(places, "norm", None)] == ["norm"], "a name goes before the keyword"


def test_names_of_compiled_and_of_shared_modules() -> None:
    shared = nn.BatchNorm1d(3)
    model = nn.Sequential(torch.compile(nn.Sequential(nn.BatchNorm1d(3))), shared, nn.Sequential(shared))
    places = find_places(model, lambda module: isinstance(module, nn.BatchNorm1d))
    assert [place.names for place in places] == [["0._orig_mod.0"], ["1", "2.0"]]
    for selection, wanted in {"0.0": 0, "0": 0, "0._orig_mod.0": 0, "2.*": 1, "1": 1}.items():
        assert select_places(places, selection, None) == [places[wanted]]
    assert list(select_layers(model, ["0.0", model[0]])) == ["0", "0.0"]


def test_a_model_that_is_itself_a_layer() -> None:
    norm = nn.BatchNorm1d(3)
    for selection in ("*", "norm", norm, nn.BatchNorm1d, lambda name, _: not name):
        assert list(select_layers(norm, selection)) == [""]
        assert len(select_places(find_places(norm, lambda _: True), selection, None)) == 1
    assert "" not in select_layers(network(), "*")


@pytest.mark.parametrize(
    ("error", "message", "selection"),
    [
        (ValueError, "unknown layer or pattern '2.3'; did you mean", "2.3"),
        (ValueError, "unknown layer or pattern 're:x.'", "re:x."),
        (ValueError, r"'re:\(' is not a regular expression: missing \), unterminated", "re:("),
        (ValueError, "unknown layer or pattern 'x.'", re.compile("x.")),
        (ValueError, "the Linear given is not part of the model", nn.Linear(1, 1)),
        (TypeError, "must be or hold names, patterns or modules.*got int", 3),
        (TypeError, "got float", ["2", 3.0]),
    ],
)
def test_one_set_of_errors(error: type[Exception], message: str, selection: Any) -> None:
    model = network()
    with pytest.raises(error, match=f"^layers.*{message}"):
        select_layers(model, selection)
    with pytest.raises(error, match=f"^include.*{message}"):
        conversion_plan(model, "group", include=selection)
    with pytest.raises(error, match=f"^exclude.*{message}"):
        freeze(model, exclude=selection)
    with pytest.raises(error, match=f"^layers.*{message.replace('layer or', 'batch normalization layer or')}"):
        GammaDecay(model, 4, layers=selection)
    with pytest.raises(
        error, match=f"^weights.*{message.replace('layer or', 'weight or').removesuffix('; did you mean')}"
    ):
        WeightMonitor(model, weights=selection)


def test_what_may_fit_nothing() -> None:
    model = network()
    for nothing in (nn.GroupNorm, lambda *_: False, []):
        assert len(conversion_plan(model, "group", exclude=nothing).rows) == 3
        with pytest.raises(ValueError, match=r"unknown layer or pattern|empty list"):
            select_layers(model, nothing)
        with pytest.raises(ValueError, match=r"^weights(: unknown weight or pattern| is an empty list; .* one weight)"):
            WeightMonitor(model, weights=nothing)
        assert param_groups(model, 0.1, 0.1, 0.0, IMAGES, exclude=nothing, normalize=False)[0]["manifold"]
    with pytest.raises(ValueError, match="no normalization layer among the 1 layers"):
        select_layers(nn.Linear(2, 2), "norm")
    with pytest.raises(ValueError, match=r"^weights: there is no weight of a normalization layer among the 3 weights"):
        WeightMonitor(model, weights="norm")
