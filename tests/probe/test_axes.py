"""On which axis the channels are: also where another axis has as many entries."""

from __future__ import annotations

import pytest
import torch
from norm_lookalikes import CentredByStd, ChannelsFirst, GainNorm, LastAxisNorm, PlainRMS
from torch import Tensor, nn

from flexnorm.nn import BatchNorm2d, LayerNorm, LayerNorm1d
from flexnorm.probe import channel_axes, channel_axis
from flexnorm.shift import ShiftMonitor


@pytest.mark.parametrize(
    ("layer", "axis"),
    [
        (nn.Linear(2, 3), -1),
        (nn.Embedding(2, 3), -1),
        (nn.LayerNorm(3), -1),
        (nn.LayerNorm((3, 4, 4)), 1),
        (nn.RMSNorm(3), -1),
        (nn.Conv2d(1, 1, 1), 1),
        (nn.BatchNorm1d(3), 1),
        (nn.GroupNorm(1, 3), 1),
        (BatchNorm2d(3), 1),
        (LayerNorm1d(3, channel_axis=-1), -1),
        (LayerNorm(3), -1),
        (LayerNorm((3, 4, 4)), 1),
        (LayerNorm(3, channel_axis=1), 1),
        (PlainRMS(8), -1),
        (GainNorm(8), -1),
        (ChannelsFirst(8), 1),
        (nn.ReLU(), None),
        (nn.Sequential(nn.Linear(2, 2)), None),
    ],
)
def test_what_a_kind_tells(layer: nn.Module, axis: int | None) -> None:
    assert channel_axis(layer) == axis


class Shift(nn.Module):
    """A bias of its own, on whatever axis."""

    def __init__(self, size: int, axis: int, *, odd: bool = False) -> None:
        super().__init__()
        self.shift, self.axis, self.odd = nn.Parameter(torch.zeros(size)), axis, odd

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift.view([-1 if k == self.axis % x.ndim else 1 for k in range(x.ndim)])


class Turn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1)


class Scores(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bti,bsi->bts", x, x)[:, None].expand(-1, 2, -1, -1)


def found(model: nn.Module, x: Tensor, name: str = "") -> int | None:
    return channel_axes(model, x, {name: model.get_submodule(name)})[name]


def test_the_layers_weights_tell() -> None:
    assert found(Shift(6, 1), torch.randn(2, 6, 5)) == 1
    assert found(Shift(6, -1), torch.randn(2, 5, 6)) == 2


@pytest.mark.parametrize("axis", [1, 2])
def test_where_several_axes_fit_it_is_tried(axis: int) -> None:
    layer = Shift(6, axis)
    state = torch.get_rng_state()
    assert found(layer, torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0))) == axis
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(layer.shift, nn.Parameter)
    assert not layer.shift.any()


def test_layers_without_weights_follow_those_inside_and_before() -> None:
    images, tokens = torch.randn(2, 3, 6, 6), torch.randn(2, 6, 6)
    assert found(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU()), images, "1") == 1
    assert found(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), tokens, "1") == -1
    assert found(nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.GELU())), tokens, "1") == -1
    assert found(nn.Sequential(nn.Conv2d(3, 8, 1), Turn()), images, "1") == 3, "the only axis with 8 entries"
    assert found(nn.Sequential(nn.Conv2d(3, 6, 1), nn.Flatten()), images, "1") == 1
    assert found(nn.Identity(), images) == 1


def test_where_nothing_tells_the_monitor_refuses_and_says_what_to_do() -> None:
    model, tokens = nn.Sequential(nn.Linear(5, 6), Scores()), torch.randn(2, 7, 5)
    assert found(model, tokens, "1") is None
    with pytest.raises(ValueError, match=r"1 \(Scores, \(2, 2, 7, 7\)\).*channel_dim=\{'1': -1\}"):
        ShiftMonitor(model, tokens, ["0", "1"]).look()
    points = ShiftMonitor(model, tokens, ["0", "1"], channel_dim={Scores: 1}).look()
    assert {name: p.shape[1] for name, p in points.items()} == {"0": 6, "1": 2}
    with pytest.raises(ValueError, match=r"channel_dim: unknown layer or pattern '2'"):
        ShiftMonitor(model, tokens, ["0", "1"], channel_dim={"2": 1})


class LanguageModel(nn.Module):
    """Twice as wide as a sequence is long, so that a wrong axis would show."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": norm, "map": nn.Linear(width, width)})
            for norm in (PlainRMS(width), GainNorm(width), LastAxisNorm(width, bias=False))
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block["map"](block["norm"](x))  # type: ignore[index, operator]
        return x


@pytest.mark.parametrize("length", [8, 16])
@pytest.mark.parametrize("layers", ["norm", "re:.*norm.*"])
def test_norms_of_language_models_are_measured_by_token(length: int, layers: str) -> None:
    tokens = torch.randint(11, (2, length), generator=torch.Generator().manual_seed(0))
    points = ShiftMonitor(LanguageModel(), tokens, layers).look()
    assert [p.shape for p in points.values()] == [(2 * length, 16)] * 3


def test_norms_that_cannot_be_read_are_watched_and_named() -> None:
    monitor = ShiftMonitor(nn.Sequential(nn.Linear(5, 8), CentredByStd(8), PlainRMS(8)), torch.randn(2, 8, 5))
    assert monitor.layers == ("1", "2")
    assert list(monitor.unread) == ["1"]
    assert "takes no notice of the scale" in monitor.unread["1"]
    assert {name: p.shape for name, p in monitor.look().items()} == {"1": (16, 8), "2": (16, 8)}


def test_norms_of_channels_first_are_measured_by_position() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), ChannelsFirst(8), nn.ReLU())
    (points,) = ShiftMonitor(model, torch.randn(2, 3, 4, 8)).look().values()
    assert points.shape == (2 * 4 * 8, 8)
