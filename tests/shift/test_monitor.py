"""The monitor changes nothing, measures what it says, resumes exactly, and works on models as they come."""

from __future__ import annotations

import copy
import math
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flexnorm.nn import NORMS, NoNorm, make_norm
from flexnorm.shift import EverySteps, MemorySink, ShiftMonitor, measure_shift, wasserstein


def convnet(norm: str = "batch") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        make_norm(norm, 8),
        nn.ReLU(inplace=True),
        nn.Dropout(0.2),
        nn.Conv2d(8, 4, 3, padding=1),
        make_norm(norm, 4),
        nn.Flatten(),
        nn.Linear(4 * 36, 5),
    )


IMAGES = torch.randn(24, 3, 6, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(24) % 5


class Run:
    """A training loop whose whole state can be saved and compared."""

    def __init__(
        self, model: nn.Module, monitor: ShiftMonitor | None = None, call: Callable[..., Any] | None = None
    ) -> None:
        self.model, self.monitor = model, monitor
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        self.call = call or model
        self.losses: list[float] = []
        torch.manual_seed(2)

    def steps(self, count: int) -> Run:
        for _ in range(count):
            self.optimizer.zero_grad()
            output = self.call(IMAGES)
            loss = nn.functional.cross_entropy(output["logits"] if isinstance(output, dict) else output, LABELS)
            loss.backward()
            self.optimizer.step()
            self.losses.append(float(loss.detach()))
            if self.monitor is not None:
                self.monitor.step()
        return self

    def state(self) -> list[Tensor]:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return [*self.model.state_dict().values(), *grads, torch.tensor(self.losses), torch.get_rng_state()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(u, v) for u, v in zip(a, b, strict=True))


@pytest.mark.quick(10)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("options", [{"every": 1}, {"every": 2, "lag": 3, "anchor": "both", "samples": "image"}])
def test_training_is_bit_identical_with_and_without(norm: str, options: dict[str, Any]) -> None:
    alone = Run(convnet(norm)).steps(6).state()
    model = convnet(norm)
    with ShiftMonitor(model, IMAGES[:12], **options) as monitor:
        watched = Run(model, monitor).steps(6).state()
    assert same(alone, watched)
    assert monitor.records
    for record in monitor.records:
        assert 0 <= record.lower <= record.w1 <= record.upper
        assert record.w1 > 0
        assert record.relative == pytest.approx(record.w1 / record.spread)


class Untidy(nn.Module):
    """Does everything in its forward that a side forward must undo."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("nothing", None)
        self.alias = self.seen
        self.average = torch.zeros(3)
        self.calls = 0
        self.losses: list[float] = []
        self.table = {"calls": 0}
        self.generator = torch.Generator().manual_seed(5)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.average.lerp_(x.mean(0).detach(), 0.5)
        self.calls += 1
        self.losses.append(float(x.sum()))
        self.table["calls"] += 1
        self.last = x
        self.alias = self.alias + 1
        noise = random.random() + float(np.random.rand()) + torch.rand(()) + torch.rand((), generator=self.generator)  # noqa: NPY002
        return self.norm(x + noise)


def snapshot(model: Untidy) -> tuple[Any, ...]:
    tensors = [t.clone() for t in (*model.buffers(), model.average, model.alias, *model.parameters())]
    versions = [t._version for t in (*model.buffers(), model.average)]
    identity = [id(v) for v in (model.losses, model.table, model.generator, model._buffers, model.seen, model.average)]
    plain = (model.calls, list(model.losses), dict(model.table), model.last, [m.training for m in model.modules()])
    generators = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    hooks = [len(m._forward_hooks) for m in model.modules()]
    return tensors, versions, identity, plain, generators, model.generator.get_state().tolist(), hooks


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("fails", [True, False])
def test_a_look_leaves_no_trace(training: bool, mode: str, fails: bool) -> None:
    model = Untidy().train(training)
    model.norm.eval()

    def forward(module: nn.Module, probe: Tensor) -> Tensor:
        out = module(probe)
        assert module.training == (mode == "train")
        assert not torch.is_grad_enabled()
        if fails:
            raise ZeroDivisionError
        return out

    monitor = ShiftMonitor(model, torch.randn(8, 3), forward=forward, mode=mode)
    before = snapshot(model)
    if fails:
        with pytest.raises(ZeroDivisionError):
            monitor.look()
    else:
        first, second = monitor.look(), monitor.look()
        assert torch.equal(first["norm"], second["norm"])  # the same noise each time
    after = snapshot(model)
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1:] == after[1:]
    assert torch.is_grad_enabled()


def test_frozen_layers_stay_frozen_in_the_side_forward() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[1].eval()
    model[1].running_mean += 100
    points = ShiftMonitor(model, torch.randn(8, 3)).look()
    assert points["0"].mean().abs() < 1e-5
    assert points["1"].mean() < -90


def test_autocast_cache_is_not_filled_without_gradient() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    x = torch.randn(6, 3)
    monitor = ShiftMonitor(model, x, "0")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        points = monitor.look()["0"]
        model(x).sum().backward()
    assert model[0].weight.grad is not None
    assert torch.equal(points, points.bfloat16().float())
    plain = monitor.look()["0"]
    assert not torch.equal(plain, points)
    assert torch.equal(ShiftMonitor(model, x, "0", autocast=torch.bfloat16).look()["0"], points)
    assert not torch.is_autocast_enabled("cpu")


def test_distance_is_that_of_the_outputs_before_and_after() -> None:
    model = nn.Sequential(nn.Linear(4, 3), NoNorm(3))
    x = torch.randn(20, 4)
    with ShiftMonitor(model, x, every=1) as monitor, torch.no_grad():
        before = model(x)
        model[0].bias += torch.tensor([3.0, 0.0, 4.0])
        records = monitor.step()
    assert monitor.records == records
    (record,) = records
    assert (record.layer, record.step, record.anchor_step, record.anchor) == ("1", 1, 0, "previous")
    assert record.w1 == pytest.approx(5, rel=1e-6)
    assert record.lower == pytest.approx(5, rel=1e-6)
    assert record.upper == pytest.approx(5, rel=1e-6)
    spread = (before - before.mean(0)).norm(dim=1).mean()
    assert record.spread == pytest.approx(float(spread), rel=1e-6)
    assert record.asdict() == {
        "step": 1,
        "layer": "1",
        "reference": "previous",
        "reference_step": 0,
        "lower": record.lower,
        "w1": record.w1,
        "upper": record.upper,
        "spread": record.spread,
        "relative_lower": record.lower / record.spread,
        "relative": record.w1 / record.spread,
        "relative_upper": record.upper / record.spread,
    }


@pytest.mark.parametrize(
    ("every", "lag", "anchor", "expected"),
    [
        (1, 1, "previous", [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4), (6, 5)]),
        (3, 1, "previous", [(1, 0), (4, 3)]),
        (2, 3, "previous", [(3, 0), (5, 2)]),
        (4, 4, "previous", [(4, 0)]),
        (2, 1, "initial", [(2, 0), (4, 0), (6, 0)]),
        ([1, 4], 2, "previous", [(3, 1), (6, 4)]),
        (lambda step: step == 2, 1, "both", [(3, 2), (2, 0)]),
    ],
)
def test_when_it_measures(every: Any, lag: int, anchor: str, expected: list[tuple[int, int]]) -> None:
    model = convnet()
    with ShiftMonitor(model, IMAGES[:8], "1", every=every, lag=lag, anchor=anchor) as monitor:
        Run(model, monitor).steps(6)
    assert sorted((r.step, r.anchor_step) for r in monitor.records) == sorted(expected)


@pytest.mark.parametrize("cut", [1, 3, 4])
@pytest.mark.parametrize("anchor", ["previous", "both"])
def test_resume_equals_an_uninterrupted_run(cut: int, anchor: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"every": 2, "lag": 3, "anchor": anchor}
    whole_model = convnet()
    with ShiftMonitor(whole_model, IMAGES, sinks=[tmp_path / "whole.csv"], **options) as whole:
        Run(whole_model, whole).steps(8)

    model = convnet()
    sinks = [tmp_path / "cut.csv", tmp_path / "cut.jsonl"]
    with ShiftMonitor(model, IMAGES, sinks=sinks, **options) as monitor:
        run = Run(model, monitor).steps(cut)
        torch.save(
            [model.state_dict(), run.optimizer.state_dict(), monitor.state_dict(), torch.get_rng_state()],
            tmp_path / "c.pt",
        )
        run.steps(2)  # lost with the crash, but its rows are in the files

    weights, optimizer, state, rng = torch.load(tmp_path / "c.pt", weights_only=True)
    model = convnet()
    model.load_state_dict(weights)
    memory = MemorySink()
    resumed = ShiftMonitor(model, IMAGES, sinks=[*sinks, memory], **options)
    resumed.load_state_dict(state)
    with resumed:
        run = Run(model, resumed)
        run.optimizer.load_state_dict(optimizer)
        torch.set_rng_state(rng)
        run.steps(8 - cut)
    assert resumed.records == whole.records
    assert resumed.steps == 8
    assert (tmp_path / "cut.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert memory.records == [r for r in whole.records if r.step > cut]
    assert len((tmp_path / "cut.jsonl").read_text().splitlines()) == len(whole.records)


def test_state_is_not_tied_to_the_monitor() -> None:
    model = convnet()
    monitor = ShiftMonitor(model, IMAGES, every=1, anchor="both")
    monitor.start()
    state = monitor.state_dict()
    kept = copy.deepcopy(state)
    Run(model, monitor).steps(2)
    assert state["steps"] == kept["steps"] == 0
    for a, b in zip(state["pending"][0]["values"].values(), kept["pending"][0]["values"].values(), strict=True):
        assert torch.equal(a, b)
    monitor.load_state_dict(kept)
    assert monitor.records == []


def test_state_of_another_monitor_is_refused() -> None:
    monitor = ShiftMonitor(convnet(), IMAGES, every=1)
    with pytest.raises(ValueError, match=r"lag: 2 there, 1 here"):
        monitor.load_state_dict(ShiftMonitor(convnet(), IMAGES, lag=2).state_dict())
    with pytest.raises(ValueError, match="format 7"):
        monitor.load_state_dict({"format": 7})


# Models as they come.


class Residual(nn.Module):
    """One normalization used twice and known under two names, dictionaries in and out, and a checkpointed part."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.tied = self.norm
        self.unused = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, images: Tensor, scale: float = 1.0) -> dict[str, Any]:
        h = checkpoint(self.conv, images, use_reentrant=False)
        h = self.norm(self.tied(h) * scale)
        return {"logits": self.head(h.mean((2, 3))), "extra": (1, h)}


def test_tied_modules_and_dictionaries() -> None:
    model = Residual()
    monitor = ShiftMonitor(model, {"images": IMAGES, "scale": 2.0}, every=1)
    assert monitor.layers == ("norm", "unused")
    assert set(monitor.look()) == {"norm", "norm#2"}
    monitor.start()
    before = model.norm.num_batches_tracked.clone()
    Run(model, monitor).steps(2)
    assert model.norm.num_batches_tracked == before + 4
    assert {r.layer for r in monitor.records} == {"norm", "norm#2"}
    assert ShiftMonitor(model, IMAGES, "re:norm").layers == ("norm",)
    assert set(ShiftMonitor(model, [IMAGES, 2.0]).look()) == {"norm", "norm#2"}
    whole = ShiftMonitor(model, IMAGES, lambda name, _: name == "")
    assert whole.look()[""].shape == (24, 5)  # the first tensor of the dictionary


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    model = convnet()

    def call(x: Tensor) -> Tensor:
        return checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant)

    alone = Run(convnet())
    alone.call = lambda x: checkpoint(alone.model, x.clone().requires_grad_(), use_reentrant=reentrant)
    monitor = ShiftMonitor(model, IMAGES, every=1, forward=lambda m, x: checkpoint(m, x, use_reentrant=reentrant))
    monitor.start()
    assert same(alone.steps(3).state(), Run(model, monitor, call).steps(3).state())


def test_models_compiled_before_or_after(recwarn: pytest.WarningsRecorder) -> None:
    plain = convnet()
    with ShiftMonitor(plain, IMAGES, every=1) as monitor:
        Run(plain, monitor).steps(2)
    expected = [(r.layer, r.w1) for r in monitor.records]

    def compiled_inside(model: nn.Sequential) -> tuple[nn.Module, nn.Module]:
        model[1] = torch.compile(model[1], backend="eager")
        return model, model

    def compiled_in_place(model: nn.Sequential) -> tuple[nn.Module, nn.Module]:
        model.compile(backend="eager")
        return model, model

    def compiled_before(model: nn.Sequential) -> tuple[nn.Module, nn.Module]:
        compiled = torch.compile(model, backend="eager")
        return compiled, compiled

    def compiled_after(model: nn.Sequential) -> tuple[nn.Module, nn.Module]:
        return model, torch.compile(model, backend="eager")

    for arrange in (compiled_before, compiled_after, compiled_in_place, compiled_inside):
        torch._dynamo.reset()
        counter = torch._dynamo.utils.counters
        model, trained = arrange(convnet())
        counter.clear()
        monitor = ShiftMonitor(model, IMAGES, every=1)
        monitor.start()
        run = Run(model, monitor, trained).steps(1)
        graphs = counter["stats"]["unique_graphs"]
        assert graphs >= 1
        run.steps(1)
        assert counter["stats"]["unique_graphs"] == graphs, f"{arrange.__name__} compiled again"
        assert [(r.layer, pytest.approx(r.w1, rel=1e-4)) for r in monitor.records] == expected, arrange.__name__
    torch._dynamo.reset()


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.barrier()  # gloo is done with all tensors: its end must not wait for one
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_wrappers_and_synchronized_norms_are_called_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = nn.Sequential(nn.Linear(3, 4), make_norm("batch", 4, ndim=1, process_group="world"))
    model = nn.parallel.DistributedDataParallel(inner)
    monitor = ShiftMonitor(model, torch.randn(8, 3), every=1)
    assert monitor.layers == ("1",)
    for name in ("all_reduce", "all_gather_into_tensor", "all_gather", "broadcast", "_broadcast_coalesced"):
        monkeypatch.setattr(dist, name, lambda *_, **__: pytest.fail("a collective call"), raising=False)
    monitor.look()
    assert inner[1].process_group == "world"

    synced = nn.SyncBatchNorm(3)
    x = torch.randn(8, 3)
    points = ShiftMonitor(synced, x, lambda *_: True).look()[""]
    torch.testing.assert_close(points, nn.BatchNorm1d(3)(x).detach())
    assert "forward" not in synced.__dict__
    assert nn.DataParallel(inner).module is ShiftMonitor(nn.DataParallel(inner), x)._model


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("norm", ["1", "5"]),
        ("1", ["1"]),
        ("[05]", ["0", "5"]),
        ("re:[4-6]", ["4", "5", "6"]),
        (["7", "norm"], ["1", "5", "7"]),
        (lambda _, module: isinstance(module, nn.Conv2d), ["0", "4"]),
        (lambda _, module: isinstance(module, nn.Conv2d | nn.Linear), ["0", "4", "7"]),
    ],
)
def test_selection(layers: Any, expected: list[str]) -> None:
    assert list(ShiftMonitor(convnet(), IMAGES, layers).layers) == expected


def test_selection_by_module_and_compiled_names() -> None:
    model = convnet()
    assert ShiftMonitor(model, IMAGES, model[4]).layers == ("4",)
    assert ShiftMonitor(model, IMAGES, [model[4], model[0]]).layers == ("0", "4")
    nested = nn.Sequential(torch.compile(model, backend="eager"))
    assert ShiftMonitor(nested, IMAGES).layers == ("0.1", "0.5")
    assert ShiftMonitor(nested, IMAGES, nested[0]).layers == ("0",)


def test_points_are_positions_or_images() -> None:
    model = convnet()
    x = IMAGES[:5]
    expected = nn.Sequential(*model[:2])(x).detach()
    positions = ShiftMonitor(model, x, "1", max_samples=10**6).look()["1"]
    assert torch.equal(positions, expected.permute(0, 2, 3, 1).reshape(-1, 8))
    images = ShiftMonitor(model, x, "1", samples="image").look()["1"]
    assert torch.equal(images, expected.flatten(1))
    few = ShiftMonitor(model, x, "1", max_samples=30).look()["1"]
    rows = (positions.unsqueeze(0) == few.unsqueeze(1)).all(-1).nonzero()[:, 1]
    assert few.shape == (30, 8)
    assert len(rows.unique()) == 30
    assert rows.tolist() == sorted(rows.tolist())
    channels_last = ShiftMonitor(model, x.to(memory_format=torch.channels_last), "1", max_samples=30).look()["1"]
    torch.testing.assert_close(channels_last, few)


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.LayerNorm(6), (2, 5, 6), (10, 6)),
        (nn.LayerNorm([6, 3]), (2, 6, 3), (6, 6)),
        (nn.RMSNorm(6), (2, 5, 6), (10, 6)),
        (nn.Linear(6, 4), (2, 5, 6), (10, 4)),
        (nn.BatchNorm1d(5), (2, 5, 6), (12, 5)),
        (nn.GRU(6, 3), (2, 5, 6), (10, 3)),
        (nn.Flatten(0), (4, 2), (8, 1)),
    ],
)
def test_channels_lie_where_the_layer_puts_them(
    layer: nn.Module, shape: tuple[int, ...], expected: tuple[int, int]
) -> None:
    assert ShiftMonitor(layer, torch.randn(shape), lambda *_: True).look()[""].shape == expected
    if len(shape) == 3:
        by_hand = ShiftMonitor(layer, torch.randn(shape), lambda *_: True, channel_dim=0).look()[""]
        assert by_hand.shape[1] == shape[0]


def test_numbers_of_diverged_and_constant_layers() -> None:
    x = torch.zeros(4, 2)
    assert math.isnan(measure_shift(x, x / 0).w1)
    still, jump = measure_shift(x, x), measure_shift(x, x + 1)
    assert (still.w1, still.relative) == (0, 0)
    assert jump.relative == math.inf


def test_same_inputs_keep_the_bias_of_high_dimension_out() -> None:
    x = torch.randn(128, 64)
    assert measure_shift(x, x + 1e-3).w1 == pytest.approx(8e-3, rel=1e-3)
    assert measure_shift(x, torch.randn(128, 64)).w1 > 8
    assert float(wasserstein(x, x + 1e-3, "coupled")) == pytest.approx(8e-3, rel=1e-3)


def test_summary_is_the_mean_over_measurements() -> None:
    model = convnet()
    with ShiftMonitor(model, IMAGES, every=1) as monitor:
        Run(model, monitor).steps(3)
    values = [r.relative for r in monitor.records if r.layer == "5"]
    assert monitor.summary()["5"]["relative"] == pytest.approx(sum(values) / 3)
    assert set(monitor.summary()) == {"1", "5"}


def test_probe_is_kept_as_a_copy() -> None:
    x = torch.randn(6, 3)
    model = nn.BatchNorm1d(3, affine=False)
    monitor = ShiftMonitor(model, (x,), lambda *_: True)
    before = monitor.look()
    x.fill_(7)
    assert torch.equal(before[""], monitor.look()[""])


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.long()


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "model must be a module", lambda: ShiftMonitor(3, IMAGES)),
        (ValueError, "lag must be a whole number", lambda: ShiftMonitor(convnet(), IMAGES, lag=0)),
        (ValueError, "max_samples must be", lambda: ShiftMonitor(convnet(), IMAGES, max_samples=True)),
        (ValueError, "did you mean 'image'", lambda: ShiftMonitor(convnet(), IMAGES, samples="images")),
        (ValueError, "did you mean 'initial'", lambda: ShiftMonitor(convnet(), IMAGES, anchor="initially")),
        (ValueError, "unknown mode", lambda: ShiftMonitor(convnet(), IMAGES, mode="test")),
        (ValueError, "no normalization layer", lambda: ShiftMonitor(nn.Linear(2, 2), IMAGES)),
        (ValueError, "unknown layer or pattern '9'", lambda: ShiftMonitor(convnet(), IMAGES, "9")),
        (ValueError, "unknown layer or pattern", lambda: ShiftMonitor(convnet(), IMAGES, ["re:x+"])),
        (ValueError, "empty list", lambda: ShiftMonitor(convnet(), IMAGES, [])),
        (ValueError, "not part of the model", lambda: ShiftMonitor(convnet(), IMAGES, nn.Linear(1, 1))),
        (TypeError, "names, patterns or modules", lambda: ShiftMonitor(convnet(), IMAGES, [3])),
        (TypeError, "every must be", lambda: ShiftMonitor(convnet(), IMAGES, every=True)),
        (ValueError, "lazy and has no parameters", lambda: ShiftMonitor(nn.LazyBatchNorm1d(), IMAGES)),
        (RuntimeError, "call start", lambda: ShiftMonitor(convnet(), IMAGES).step()),
        (RuntimeError, "called none of the layers unused", lambda: ShiftMonitor(Residual(), IMAGES, "unused").look()),
        (ValueError, "no floating-point tensor", lambda: ShiftMonitor(Odd(), IMAGES, lambda *_: True).look()),
    ],
)
def test_errors(error: type[Exception], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(error, match=message):
        call()


def test_schedules_that_are_functions_or_objects_are_taken_as_they_are() -> None:
    monitor = ShiftMonitor(convnet(), IMAGES, every=EverySteps(2))
    assert monitor._schedule == EverySteps(2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules_are_refused() -> None:
    with pytest.raises(TypeError, match="scripted"):
        ShiftMonitor(nn.Sequential(torch.jit.trace(nn.BatchNorm1d(3).eval(), torch.randn(4, 3))), IMAGES)


def test_import_brings_in_nothing_heavy() -> None:
    heavy = ("scipy", "ot", "tensorboard", "torch.utils.tensorboard", "torch._dynamo")
    code = f"import sys, flexnorm.shift; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
