"""Norms of classes that nobody declared: converted, taken back, folded, and listed where they cannot be read."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from norm_lookalikes import (
    CentredByStd,
    ChannelsFirst,
    ColumnNorm,
    FrozenStatistics,
    GainNorm,
    GatedRMS,
    GraphMeanNorm,
    HandBatchNorm,
    LastAxisNorm,
    NormThenAct,
    PlainRMS,
    Wrapped,
)
from torch import Tensor, nn

import flexnorm.nn as fx
from flexnorm import convert, fold
from flexnorm.surgery import conversion_plan, fold_plan

TOKENS, IMAGES, ROWS = (2, 5, 8), (2, 8, 3, 4), (6, 8, 5)


def spread(layer: nn.Module) -> nn.Module:
    """With parameters and statistics of its own."""
    generator = torch.Generator().manual_seed(0)
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.data = torch.rand(tensor.shape, generator=generator) + 0.3
    return layer


CASES: list[tuple[Callable[[], nn.Module], tuple[int, ...], str, type[nn.Module], str]] = [
    (lambda: PlainRMS(8), TOKENS, "rms", fx.RMSNorm, "divides by the root mean square"),
    (lambda: GainNorm(8), TOKENS, "rms", fx.RMSNorm, "the weight becomes 1 + weight"),
    (lambda: LastAxisNorm(8, bias=False), TOKENS, "layer", fx.LayerNorm, "channels last"),
    (lambda: LastAxisNorm(8, bias=True), (2, 3, 4, 8), "layer", fx.LayerNorm, "weight, bias"),
    (lambda: ChannelsFirst(8), IMAGES, "layer", fx.LayerNorm, "channels on axis 1"),
    (lambda: NormThenAct(8), IMAGES, "layer", fx.LayerNorm, "channels on axis 1"),
    (lambda: FrozenStatistics(8), IMAGES, "batch", fx.BatchNorm2d, "statistics frozen"),
    (lambda: HandBatchNorm(8, momentum=0.3), ROWS, "batch", fx.BatchNorm1d, "gamma becomes weight"),
]


@pytest.mark.quick(4)
@pytest.mark.parametrize(("make", "shape", "name", "ours", "note"), CASES)
def test_there_and_back_the_function_and_the_state_are_kept(
    make: Callable[[], nn.Module], shape: tuple[int, ...], name: str, ours: type[nn.Module], note: str
) -> None:
    model, x = nn.Sequential(nn.Identity(), spread(make())), torch.randn(shape)
    (row,) = plan = conversion_plan(model, name, example_input=x)
    assert (row.status, row.effect) == ("convert", "kept")
    assert "recognized by trying" in row.notes[0]
    assert note in "; ".join(row.notes)
    assert plan.preserved
    there = convert(model, name)
    assert isinstance(there[1], ours)
    again = pickle.loads(pickle.dumps(copy.deepcopy(there)))
    torch.testing.assert_close(again(x), model(x), rtol=1e-6, atol=1e-6)
    back = convert(again, "torch")
    assert type(back[1]) is type(model[1])
    torch.testing.assert_close(back(x), model(x), rtol=1e-6, atol=1e-6)
    assert back.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(back.state_dict(), model.state_dict())
    assert [p.requires_grad for p in back.parameters()] == [p.requires_grad for p in model.parameters()]


def test_parameters_stay_the_same_objects_and_batch_statistics_go_on() -> None:
    old = spread(HandBatchNorm(8, momentum=0.3))
    model = nn.Sequential(old)
    twin, x = copy.deepcopy(model), torch.randn(ROWS)
    convert(model, "batch", inplace=True)
    assert model[0].weight is old.gamma
    assert model[0].bias is old.beta
    assert model[0].momentum == 0.3
    torch.testing.assert_close(model(x), twin(x))
    torch.testing.assert_close(model.eval()(x), twin.eval()(x))
    torch.testing.assert_close(convert(model, "torch")(x), twin(x))


def test_to_torch_by_name_and_to_other_norms() -> None:
    model, x = nn.Sequential(spread(GainNorm(8))), torch.randn(TOKENS)
    plain = convert(model, "torch.rms")
    assert type(plain[0]) is nn.RMSNorm
    torch.testing.assert_close(plain(x), model(x))
    layer = convert(model, "layer")
    assert conversion_plan(model, "layer")[0].effect == "changes"
    torch.testing.assert_close(layer[0].weight, 1 + model[0].weight)
    assert type(convert(layer, "torch")[0]) is nn.LayerNorm, "another function than that of the class it came from"
    changed = convert(model, "rms", eps=1e-2)
    assert type(convert(changed, "torch")[0]) is nn.RMSNorm, "another eps"
    assert type(convert(convert(nn.Sequential(ChannelsFirst(8)), "rms"), "layer")[0]) is fx.LayerNorm


def test_frozen_statistics_are_folded() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), spread(FrozenStatistics(8)), nn.ReLU())
    x = torch.randn(2, 3, 5, 5)
    folded = fold(model, example_input=x)
    assert type(folded[1]) is nn.Identity
    torch.testing.assert_close(folded(x), model(x))
    rows = nn.Sequential(nn.Conv1d(3, 8, 1), spread(HandBatchNorm(8))).eval()
    torch.testing.assert_close(fold(rows)(x[..., 0]), rows(x[..., 0]))
    assert "its own statistics" in fold_plan(nn.Sequential(nn.Linear(8, 8), PlainRMS(8)))[0].reason


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (GraphMeanNorm(8), "no layer here standardizes over each channel of the batch"),
        (CentredByStd(8), "takes no notice of the scale"),
        (ColumnNorm(), "any number of channels"),
        (GatedRMS(8), "takes more than the input (gate)"),
    ],
)
def test_norms_that_cannot_be_read_are_listed(layer: nn.Module, reason: str) -> None:
    model = nn.Sequential(PlainRMS(8), layer)
    plan = conversion_plan(model, "rms")
    assert [row.status for row in plan] == ["convert", "refuse"]
    assert reason in plan[1].reason
    with pytest.warns(UserWarning, match="1 of 2 normalization layers stay as they are"):
        assert type(convert(model, "rms")[1]) is type(layer)


class Strange(nn.Module):
    """Nothing that looks like a norm."""

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh()


def test_what_is_named_outright_is_reached() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.ModuleDict({"a": Strange()}), nn.Sequential(nn.LayerNorm(8)))
    for include in (Strange, "1.a", model[1]["a"], [Strange]):  # type: ignore[index]
        plan = conversion_plan(model, "rms", include=include)
        assert [(row.name, row.status) for row in plan] == [("1.a", "refuse")]
        assert "no layer that convert() knows" in plan[0].reason
        new = convert(model, lambda layer: nn.Tanh() if isinstance(layer, Strange) else None, include=include)
        assert type(new[1]["a"]) is nn.Tanh  # type: ignore[index]
        assert type(new[0]) is nn.LayerNorm
    assert [row.name for row in conversion_plan(model, "rms", include=nn.Sequential)] == []
    assert [row.name for row in conversion_plan(nn.Sequential(Wrapped(8)), "rms")] == ["0.norm"]
    assert [row.name for row in conversion_plan(model, "rms")] == ["0", "2.0"]
    seen: list[nn.Module] = []
    reached = nn.Sequential(PlainRMS(8), CentredByStd(8), GraphMeanNorm(8))
    convert(reached, lambda layer: seen.append(layer) or nn.Identity(), inplace=True)  # type: ignore[func-returns-value]
    assert [type(layer) for layer in seen] == [PlainRMS, CentredByStd, GraphMeanNorm]
