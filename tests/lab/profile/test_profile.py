"""A profile tells the truth: every number against a computation of its own, every sentence with its number."""

from __future__ import annotations

import copy
import io
import json
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from flexnorm.lab.commands.profile import show_profile
from flexnorm.lab.data import ImageData
from flexnorm.lab.data.images import from_arrays
from flexnorm.lab.models import build
from flexnorm.lab.profile import (
    LIMITS,
    Finding,
    LayerProfile,
    Limits,
    Profile,
    Progress,
    display,
    print_profile,
    profile,
)
from flexnorm.lab.profile.layers import channel_numbers, find_sites, statistics_error, watched
from flexnorm.lab.profile.records import judge
from flexnorm.lab.profile.run import _device
from flexnorm.nn import NORMS, NormPropConv2d, NormPropLinear, make_norm, needs_batch
from flexnorm.nn.normprop import propagate
from flexnorm.shift import ShiftMonitor
from flexnorm.statistics import freeze
from flexnorm.theory import advise

QUICK: dict[str, Any] = {"steps": 6, "measurements": 3, "batch_size": 32, "limit": 192, "population": 192, "probe": 64}
SMALL = {k: v for k, v in QUICK.items() if k != "limit"}


def pictures(count: int = 192, shape: tuple[int, int, int] = (8, 8, 1), classes: int = 3) -> ImageData:
    random = np.random.default_rng(0)
    y = np.arange(count) % classes
    x = random.normal(size=(count, *shape)) + y[:, None, None, None]
    return from_arrays("pictures", x, y, x[:30], y[:30])


def small(**parts: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3))


@pytest.mark.quick(5)
@pytest.mark.parametrize("norm", [*NORMS, "normprop"])
def test_every_normalization_of_this_package(norm: str) -> None:
    result = profile("convnet", "digits", norm=norm, lr=0.005, **QUICK)
    assert [row.layer.split(".")[0] for row in result.layers] == ["layer1", "layer2", "layer3"]
    assert (result.norm, result.measurements, result.images, result.probe) == (norm, 3, 192, 64)
    assert result.diverged_at is None
    for row in result.layers:
        assert 0 <= row.lower <= row.w1 <= row.upper
        assert row.bound is None or row.w1 <= row.bound
        assert row.angle > 0
        assert row.weight.startswith(row.layer.split(".")[0])
        assert 0 <= row.dead <= row.channels
        assert row.relative_since_start > 0
    has_bound = norm in ("batch", "population", "unitized")
    assert all((row.bound is not None) == (row.zeta is not None) == has_bound for row in result.layers)
    assert all(row.mixes_batch == (norm != "normprop" and needs_batch(make_norm(norm, 16))) for row in result.layers)
    plain = result.asdict()
    assert plain["format"] == 1
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["layers"][0]["level"] == result.layers[0].level


def test_shift_and_bound_are_those_of_a_monitor_in_the_same_training() -> None:
    """The same loop by hand, with the engine's own monitor."""
    data, model = pictures(), small()
    kept = copy.deepcopy(model.state_dict())
    result = profile(model, data, lr=0.1, momentum=0.9, weight_decay=0.0, **SMALL)
    assert all(torch.equal(a, b) for a, b in zip(kept.values(), model.state_dict().values(), strict=True))
    from flexnorm.lab.data import stratified

    probe = data.x_train[torch.from_numpy(stratified(data.y_train.numpy(), 64, seed=0))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(0))
    losses = []
    with ShiftMonitor(model, probe, every=2) as monitor:
        for part in order[:192].view(6, 32):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(data.x_train[part]), data.y_train[part])
            loss.backward()
            optimizer.step()
            monitor.step()
            losses.append(float(loss.detach()))
            if len(losses) == 5:
                norm = model[0].weight.detach().flatten(1).norm(dim=1)
    (row,) = result.layers
    expected = monitor.summary()["1"]
    for name in ("w1", "lower", "upper", "relative"):
        assert getattr(row, name) == pytest.approx(expected[name], rel=1e-6)
    assert (result.loss_first, result.loss_last) == (losses[0], losses[-1])
    assert row.bound == pytest.approx(2 * math.sqrt(6), rel=0.1)
    assert (row.weight, row.invariant, row.activation) == ("0.weight", True, "ReLU")
    # The last of the three measurements is that of the fifth update.
    assert row.norm == pytest.approx(float(norm.square().mean().sqrt()), rel=1e-5)
    # The mean of three measurements beside the last of them.
    assert row.effective_rate == pytest.approx(0.1 * float(norm.square().reciprocal().mean()), rel=0.2)


def test_the_same_seed_gives_the_same_profile_and_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    first = profile("convnet", pictures(), seed=3, **SMALL)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    second = profile("convnet", pictures(), seed=3, **SMALL)
    other = profile("convnet", pictures(), seed=4, **SMALL)
    assert replace(first, seconds=0.0) == replace(second, seconds=0.0)
    assert first.layers[0].w1 != other.layers[0].w1


@pytest.mark.parametrize("size", [8, 32, 128])
def test_noise_of_independent_gaussians_has_its_closed_form(size: int) -> None:
    x = torch.randn(400, size, 5, generator=torch.Generator().manual_seed(1)) * 3 + 7
    var, mean = torch.var_mean(x, 1, correction=0)
    # Var(mean) = 1/n, Var(std) = 1/2n to leading order, and the bias of the std, 3/4n, squared.
    assert statistics_error(mean, var) == pytest.approx(math.sqrt(1.5 / size), rel=0.05)
    assert statistics_error(mean[:1], var[:1]) is None
    assert statistics_error(torch.zeros(3, 2), torch.zeros(3, 2)) is None


def test_noise_falls_with_the_batch_and_the_sentence_says_so() -> None:
    data = pictures(512)
    results = [profile(small(), data, batch_size=size, steps=4, measurements=2, population=512) for size in (2, 32)]
    few, many = (result.layers[0] for result in results)
    # 2 and 32 images: four times less noise, if the positions of an image are alike or not.
    assert few.noise / many.noise == pytest.approx(4, rel=0.35)
    sentence = next(f for f in few.findings if f.topic == "noise")
    assert sentence.value == few.noise
    assert f"batch 2 gives statistics noise of {100 * few.noise:.2g} %" in sentence.text
    assert sentence.level != "fine"
    assert "a batch of about" in sentence.text


def test_numbers_of_channels_against_numbers_by_hand() -> None:
    data, model = pictures(), small()
    with torch.no_grad():
        model[1].bias[0] = -100.0
        model[1].weight[1] = 0.0
        model[1].bias[1] = 1.0
    sites = find_sites(model, data.x_train[:8], watched(model, None))
    batches = [data.x_train[i : i + 48] for i in range(0, 192, 48)]
    before = copy.deepcopy(model.state_dict())
    seen = channel_numbers(model, batches, sites)["1"]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert seen["dead"] == 2
    assert seen["saturated"] is None
    with torch.no_grad():
        h = [model[0](batch).movedim(1, 0).flatten(1).double() for batch in batches]
    mean, var = torch.stack([v.mean(1) for v in h]), torch.stack([v.var(1, correction=0) for v in h])
    whole = torch.cat(h, 1)
    sigma = whole.std(1, correction=0)
    error = mean.var(0) / sigma**2 + (var.sqrt() / sigma - 1).square().mean(0)
    assert seen["noise"] == pytest.approx(float(error.mean().sqrt()), rel=1e-4)
    off = (whole.mean(1) / sigma).square() + (1 / sigma - 1).square()
    assert seen["staleness"] == pytest.approx(float(off.mean().sqrt()), rel=1e-4)


@pytest.mark.parametrize(
    ("activation", "scale", "saturated"),
    [
        (nn.Sigmoid(), 1000.0, 6),
        (nn.Tanh(), 1.0, 0),
        (nn.Hardtanh(-0.01, 0.01), 10.0, 6),
        (nn.Hardsigmoid(), 1.0, 0),
        (nn.ReLU6(), 1.0, None),
    ],
)
def test_saturated_channels(activation: nn.Module, scale: float, saturated: int | None) -> None:
    model = small()
    nn.init.constant_(model[1].weight, scale)
    nn.init.constant_(model[1].bias, scale / 50)
    model[2] = activation
    result = profile(model, pictures(), lr=1e-6, **SMALL)
    (row,) = result.layers
    assert row.activation == type(activation).__name__
    if type(activation) is nn.ReLU6:
        assert (row.saturated, row.dead) == (0, 0) or row.saturated is None
        return
    assert row.saturated == saturated
    found = [f for f in row.findings if f.topic == "channels"]
    assert bool(found) == bool(saturated)
    if found:
        assert f"6 of 6 channels of 1 (100 %) are flat in its {row.activation} on 192 images" in found[0].text
        assert found[0].level == "act"


class Block(nn.Module):
    """A residual block whose last normalization does not feed the activation as it is, and a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.more = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.norm(self.conv(x)))
        h = self.relu(h + self.norm(self.more(h)))
        return self.head(h.mean((2, 3)))


def test_places_of_layers() -> None:
    model = Block()
    first, second = find_sites(model, torch.randn(4, 1, 8, 8), watched(model, None))
    assert (first.name, first.weight, first.channels, first.positions) == ("norm", "conv.weight", 4, 64)
    assert (second.name, second.weight) == ("norm#2", "more.weight")
    assert isinstance(first.activation, nn.ReLU)
    assert second.activation is None
    result = profile(Block(), pictures(), **SMALL)
    assert [row.layer for row in result.layers] == ["norm", "norm#2"]
    assert result.layers[1].zeta is not None


class InPlaceSum(nn.Module):
    """A block whose residual sum is written into the output of its norm, as torchvision's and timm's are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.more, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.norm(self.conv(x)))
        out = self.last(self.more(h))
        out += h
        return self.head(self.relu(out).mean((2, 3)))


def test_an_activation_of_a_sum_belongs_to_no_layer() -> None:
    model = InPlaceSum()
    first, second = find_sites(model, torch.randn(4, 1, 8, 8), watched(model, None))
    assert isinstance(first.activation, nn.ReLU)
    assert second.activation is None


def test_models_without_normalization_are_watched_at_their_weights() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 3))
    result = profile(model, pictures(), **SMALL)
    assert [(row.layer, row.weight, row.noise) for row in result.layers] == [
        ("1", "1.weight", None),
        ("3", "3.weight", None),
    ]
    assert all(row.zeta is None and row.bound is None and not row.mixes_batch for row in result.layers)
    assert profile(model, pictures(), layers="3", **SMALL).layers[0].layer == "3"


def test_frozen_layers_do_not_mix_the_batch() -> None:
    model = freeze(small())
    result = profile(model, pictures(), lr=1e-3, **SMALL)
    (row,) = result.layers
    assert not row.mixes_batch
    assert row.w1 <= row.bound
    assert not [f for f in row.findings if f.topic == "noise"]
    assert profile(model, pictures(), **(SMALL | {"batch_size": 1})).batch_size == 1


def test_decay_is_that_of_the_theory() -> None:
    data = pictures()
    result = profile(small(), data, lr=1e-12, weight_decay=0.0, **SMALL)
    model = small()
    order = torch.randperm(192, generator=torch.Generator().manual_seed(1))
    chosen = data.x_train[order]
    from flexnorm.statistics import recalibrate

    advice = advise(recalibrate(model, [chosen]), [chosen], 32, max_images=192)
    (row,) = result.layers
    assert row.zeta == pytest.approx(advice.layers[0].zeta, rel=1e-3)
    assert row.decay == pytest.approx(advice.penalty, rel=1e-3)
    whole = next(f for f in result.findings if f.topic == "decay")
    assert whole.value == pytest.approx(row.decay / result.loss_last)


def test_divergence_is_said_first() -> None:
    result = profile("convnet", pictures(), norm="none", lr=1e30, **SMALL)
    assert result.diverged_at is not None
    assert result.findings[0].text.startswith(f"the loss was not finite any more at update {result.diverged_at}")
    assert result.level == "act"
    assert json.dumps(result.asdict(), allow_nan=False)
    assert all(row.noise is None for row in result.layers)


ROW = LayerProfile(
    layer="bn",
    kind="BatchNorm2d",
    channels=64,
    positions=16,
    w1=2.0,
    lower=1.0,
    upper=3.0,
    relative=0.2,
    bound=16.0,
    mixes_batch=True,
    noise=0.35,
    staleness=2.0,
    zeta=0.001,
    decay=0.4,
    weight="conv.weight",
    invariant=True,
    angle=0.2,
    norm=1.5,
    effective_rate=0.3,
    activation="ReLU",
    dead=32,
    saturated=1,
)
WHOLE = Profile(
    model="m",
    norm=None,
    data="d",
    checkpoint=None,
    steps=10,
    batch_size=8,
    lr=0.1,
    device="cpu",
    seed=0,
    measurements=2,
    probe=64,
    images=100,
    loss_first=2.0,
    loss_last=1.0,
    diverged_at=None,
    layers=(ROW,),
)


def sentences(row: LayerProfile, limits: Limits = LIMITS, **whole: Any) -> dict[str, Finding]:
    (judged,) = judge(replace(WHOLE, layers=(row,), **whole), limits).layers
    return {finding.topic: finding for finding in reversed(judged.findings)}


def test_sentences_of_a_layer_in_trouble() -> None:
    found = sentences(ROW)
    assert found["noise"].text == (
        "batch 8 gives statistics noise of 35 % at bn: synchronize it over processes, convert it to group or "
        "population normalization (flexnorm.convert), or freeze it once its running statistics are good "
        "(flexnorm.freeze); a batch of about 98 would bring it down to 10 %"
    )
    assert found["shift"].text == (
        "one update moves the output of bn by 20 % of its spread (W1 2, certified between 1 and 3); its parameters "
        "allow 16: a learning rate of about 0.05 instead of 0.1 would bring it down to about 10 %"
    )
    assert "off by 2 standard deviations after 10 steps" in found["statistics"].text
    assert "gamma decay of 0.001, which adds 40 % to the loss: take back" in found["decay"].text
    assert "conv.weight, before bn, turns by 0.2 rad" in found["rate"].text
    assert "effective learning rate 0.3): lower" in found["rate"].text
    assert (
        "32 of 64 channels of bn (50 %) are constant, or never positive before its ReLU, on 100 images"
        in found["channels"].text
    )
    levels = {topic: finding.level for topic, finding in found.items()}
    assert levels == {
        "noise": "act",
        "shift": "look",
        "statistics": "act",
        "decay": "look",
        "rate": "look",
        "channels": "act",
    }


def test_sentences_of_other_layers() -> None:
    assert "by orders of magnitude" in sentences(replace(ROW, relative=3.0))["shift"].text
    calm = sentences(
        replace(ROW, noise=0.01, relative=0.01, bound=None, dead=0, saturated=0, staleness=0.1, decay=0.01)
    )
    assert calm["noise"].text == "batch 8 gives statistics noise of 1 % at bn"
    assert {calm[topic].level for topic in ("noise", "shift", "decay")} == {"fine"}
    assert "parameters allow" not in calm["shift"].text
    assert not {"channels", "statistics"} & calm.keys()
    assert "does not hold; take it for large): take back" in sentences(replace(ROW, decay=3.0))["decay"].text
    still = sentences(replace(ROW, angle=1e-7))["rate"]
    assert still.level == "look"
    assert still.text.endswith("or its weight decay, which shortens vectors of length 1.5")
    free = sentences(replace(ROW, angle=1e-7, invariant=False))["rate"]
    assert free.text.endswith("it hardly learns; raise the learning rate")
    population = sentences(replace(ROW, mixes_batch=False))
    assert "noise" not in population
    assert population["decay"].text.startswith(
        "BatchNorm in place of bn would act like a gamma decay of 0.001 at batch 8"
    )
    assert population["decay"].level == "fine"
    assert "are constant on" in sentences(replace(ROW, activation=None))["channels"].text
    assert "lower the threshold" in sentences(replace(ROW, activation="Threshold"))["channels"].text
    own = sentences(replace(ROW, layer="np", weight="np.weight"))["rate"].text
    assert own.startswith("np.weight turns by")
    nothing = LayerProfile(layer="x", kind="K", channels=1, positions=1)
    assert sentences(nothing) == {}
    assert nothing.level == "fine"
    assert "decay" not in sentences(ROW, loss_last=None)
    assert sentences(ROW, Limits(noise=(0.5, 0.9)))["noise"].level == "fine"


def test_sentences_of_the_whole() -> None:
    calm = replace(
        ROW, layer="calm", noise=0.01, relative=0.02, decay=0.01, staleness=0.0, angle=0.01, dead=0, saturated=0
    )
    result = judge(replace(WHOLE, layers=(ROW, calm)))
    texts = [finding.text for finding in result.findings]
    assert [finding.level for finding in result.findings] == ["act", "look", "look", "fine", "fine"]
    assert texts == [
        "statistics noise of batch 8 is largest at bn (35 %); 1 of 2 layers reach 10 %",
        "one update moves the layers by 11 % of their spread in the mean, most at bn (20 %)",
        "the noise of BatchNorm regularizes like a penalty of 41 % of the loss, all layers together",
        "the loss went from 2 to 1 in 10 updates",
        "of 2 layers 1 need a change and 0 a look",
    ]
    rose = judge(replace(WHOLE, loss_last=5.0)).findings
    assert any(f.text.endswith("it did not fall") and f.level == "look" for f in rose)
    empty = judge(replace(WHOLE, layers=(), loss_last=None, loss_first=None))
    assert empty.findings == ()
    assert empty.level == "fine"


def shown(width: int = 200, **options: Any) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"), highlight=False)  # noqa: SIM115, PTH123
    show_profile("convnet", data="digits", console=console, **QUICK, **options)
    console.file.close()
    return console.export_text()


def test_command_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    text = shown(json_to=tmp_path / "p.json", everything=True)
    for word in ("layer1.norm", "W1", "noise %", "zeta", "eff. rate", "verdict", "convnet with norm batch", "written:"):
        assert word in text
    stored = json.loads((tmp_path / "p.json").read_text())
    assert len(stored["layers"]) == 3
    for row in stored["layers"]:
        for finding in row["findings"]:
            assert finding["text"] in " ".join(text.split()) or finding["text"][:60] in text
    narrow = shown(80, norm="none", lr=1e-4)
    assert "W1" not in narrow.splitlines()[2]
    assert "shift %" in narrow
    assert "no layer needs a change" in shown(70, norm="none", lr=1e-3)


def test_command_prints_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    result = show_profile("convnet", data="digits", json_to="-", **QUICK)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == result.asdict()
    assert captured.err.splitlines()[:2] == ["profile of convnet on digits", "loading data"]
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        show_profile("convnet", json_to="nowhere/p.json")


def test_long_verdicts_are_cut_unless_all_are_asked_for() -> None:
    result = judge(replace(WHOLE, layers=tuple(replace(ROW, layer=f"bn{i}") for i in range(4))))
    for everything in (False, True):
        console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
        print_profile(result, console, everything=everything)
        console.file.close()
        assert ("and 10 more" in console.export_text()) != everything


class _OnlyEvaluates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        return self.linear(x.flatten(1))


class Wrapped(nn.Module):
    """A classifier that returns its logits in something."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.wrap = small(), wrap

    def forward(self, pixel_values: Tensor) -> Any:
        return self.wrap(self.net(pixel_values))


class Output(OrderedDict[str, Any]):
    """As ModelOutput of Transformers: a mapping with attributes."""


@dataclass
class Record:
    loss: Tensor | None
    logits: Tensor


class Named(NamedTuple):
    auxiliary: Tensor
    logits: Tensor


class Plain:
    def __init__(self, logits: Tensor) -> None:
        self.other, self.logits = torch.zeros(1), logits


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: (y, y.new_zeros(3)),
        lambda y: [y],
        lambda y: Output(hidden=y.new_zeros(1), logits=y),
        lambda y: Record(None, y),
        lambda y: Named(y.new_zeros(1), y),
        Plain,
        lambda y: {"scores": y},
        lambda y: {"last_hidden_state": y[:, None].expand(-1, 5, -1)},
        lambda y: Output(last_hidden_state=y[..., None, None].expand(-1, -1, 2, 3)),
    ],
)
def test_models_return_their_logits_in_many_ways(wrap: Callable[[Tensor], Any]) -> None:
    data = pictures()
    plain, model = profile(Wrapped(lambda y: y), data, **SMALL), Wrapped(wrap)
    result = profile(model, data, **SMALL)
    assert result.loss_first == pytest.approx(plain.loss_first, rel=1e-5)
    assert result.layers[0].w1 == pytest.approx(plain.layers[0].w1, rel=1e-4)
    assert result.layers[0].decay == pytest.approx(plain.layers[0].decay, rel=1e-3)
    assert not model._forward_hooks


def test_an_image_classifier_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_channels=1, num_labels=3,
    )  # fmt: skip
    for model in (transformers.ViTForImageClassification(config), transformers.ViTModel(config)):
        assert profile(model, pictures(), **SMALL).diverged_at is None


def test_the_progress_is_told_from_the_first_moment_on() -> None:
    told: list[Progress] = []
    profile(small(), pictures(), notify=told.append, **SMALL)
    assert [p.phase for p in told if p.done == 0] == [
        "loading data", "building and checking the model", "finding the layers",
        "trying which of 1 weights are scale invariant", "updates under the monitors", "statistics of 192 images",
    ]  # fmt: skip
    steps = [p for p in told if p.total]
    assert [p.done for p in steps] == [0, 1, 2, 3, 4, 5, 6]
    assert all(p.total == 6 for p in steps)
    assert steps[0].left is None
    assert steps[-1].left == 0
    assert Progress("x", 2, 6, seconds=3.0).left == 6.0


def test_progress_in_a_file_is_a_line_now_and_then() -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    with display(console, interval=10.0) as show:
        show(Progress("one"))
        show(Progress("two", 0, 8))
        for done, seconds in ((1, 4.0), (2, 11.0), (3, 12.0), (8, 30.0)):
            show(Progress("two", done, 8, seconds))
    console.file.close()
    lines = console.export_text().splitlines()
    assert lines == ["one", "two 0/8", "two 2/8, about 33 s left", "two 8/8, about 0 s left"]


def test_progress_in_a_terminal_is_a_bar() -> None:
    console = Console(width=100, file=io.StringIO(), force_terminal=True)
    with display(console) as show:
        show(Progress("two", 0, 8))
        show(Progress("two", 4, 8, 20.0))
    assert "4/8" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("steps must be a whole number", {"steps": 0}),
        ("batch_size must be a whole number", {"batch_size": 2.5}),
        ("lr must be a positive number", {"lr": math.nan}),
        ("batch_size is 999, but there are only 192", {"batch_size": 999}),
        ("one image has none but its own", {"batch_size": 1}),
        ("device 'tpu' cannot be used", {"device": "tpu"}),
        ("norm='group' is for models that are built here", {"norm": "group"}),
        ("fails in evaluation on images of shape", {"model": nn.Conv2d(5, 3, 3)}),
        (
            "must return logits of shape .images, 3. or more, it returns .2, 2. for",
            {"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 2))},
        ),
        ("it returns dict in evaluation", {"model": Wrapped(lambda _: {"boxes": []})}),
        ("it returns .2, 3, 4. for 2 images", {"model": Wrapped(lambda y: [y[..., None].expand(-1, -1, 4)])}),
        ("no weights to train", {"model": nn.Flatten()}),
        ("no parameter of the model requires a gradient", {"model": small().requires_grad_(False)}),
        ("fails in training on images of shape .1, 8, 8.: AssertionError", {"model": _OnlyEvaluates()}),
    ],
)
def test_errors(message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        profile(**({"model": small(), "data": pictures()} | arguments))


def test_model_must_be_a_name_or_a_module() -> None:
    with pytest.raises(TypeError, match="a name or a module, got int"):
        profile(3, pictures())  # type: ignore[arg-type]


def test_devices() -> None:
    assert _device("cpu").type == "cpu"
    assert _device("auto").type in ("cpu", "cuda")


def test_one_batch_is_too_few_for_noise() -> None:
    result = profile(small(), pictures(40), batch_size=32, steps=2, measurements=2)
    assert result.layers[0].noise is None
    assert result.layers[0].dead == 0


def test_weights_of_a_module_from_a_file(tmp_path: Path) -> None:
    model = small()
    with torch.no_grad():
        model[4].bias += 7
    torch.save(model.state_dict(), tmp_path / "m.pt")
    first = profile(small(), pictures(), checkpoint=tmp_path / "m.pt", **SMALL)
    assert first.checkpoint == str(tmp_path / "m.pt")
    assert first.loss_first == profile(model, pictures(), **SMALL).loss_first
    assert build("convnet") is not None


def test_propagation_of_normprop_layers_is_told_with_its_numbers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        NormPropConv2d(1, 4, 3, constants="paper"), NormPropConv2d(4, 4, 3, constants="paper"), nn.Flatten()
    ).append(NormPropLinear(64, 3, activation=None))
    result = profile(model, pictures(), lr=1e-9, **SMALL)
    before = {row.name: row for row in propagate(model, pictures().x_train[:32])}
    for row in result.layers:
        assert row.chi == pytest.approx(before[row.layer].chi, abs=1e-4)
        assert row.input_var is not None
    told = judge(replace(WHOLE, layers=(replace(ROW, chi=2.0, input_var=0.05),))).layers[0].findings[-1]
    assert (told.topic, told.level, told.value) == ("propagation", "act", 0.05)
    assert "have variance 0.05 where propagation takes them for 1 (chi 2): unitize=True" in told.text
    calm = judge(replace(WHOLE, layers=(replace(ROW, chi=0.8, input_var=1.1),))).layers[0].findings[-1]
    assert (calm.topic, calm.level) == ("propagation", "fine")
    assert judge(replace(WHOLE, layers=(replace(ROW, chi=0.8, input_var=0.0),))).layers[0].findings[-1].level == "act"
