"""recalibrate(): exact population statistics, and not a trace of anything else."""

from __future__ import annotations

import copy
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_zoo import BatchNormAct2d, zoo
from torch import Tensor, nn

import flexnorm.nn as fx
from flexnorm.statistics import freeze, recalibrate, unfreeze
from flexnorm.surgery import convert

BUILDERS = {
    "torch": lambda: nn.BatchNorm2d(3),
    "timm": lambda: BatchNormAct2d(3, nn.Identity()),
    "batch": lambda: fx.BatchNorm2d(3),
    "unitized": lambda: fx.UnitizedBatchNorm2d(3),
    "population": lambda: fx.PopulationNorm2d(3, statistics="estimated"),
    "running": lambda: fx.PopulationNorm2d(3),
    "renorm": lambda: fx.BatchRenorm2d(3),
    "switchable": lambda: fx.SwitchableNorm2d(3),
}


def data(*sizes: int, channels: int = 3) -> list[Tensor]:
    """Batches whose means lie far apart, so that the variance between them counts."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(n, channels, 4, 5, generator=generator) * (i + 1) + 3 * i for i, n in enumerate(sizes)]


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("sequential", [False, True])
def test_first_layer_gets_the_moments_of_all_data(kind: str, sequential: bool) -> None:
    layer = BUILDERS[kind]()
    batches = data(4, 1, 7)
    recalibrate(nn.Sequential(layer), batches, sequential=sequential)
    joined = torch.cat(batches).double()
    mean = joined.mean((0, 2, 3))
    correction = 0 if isinstance(layer, fx.PopulationNorm2d) else 1
    var = joined.var((0, 2, 3), correction=correction)
    torch.testing.assert_close(layer.running_mean, mean.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var, var.float(), rtol=1e-6, atol=1e-6)
    assert layer.num_batches_tracked == 3


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_any_split_gives_the_same_statistics(sizes: list[int]) -> None:
    x = data(sum(sizes))[0].double()
    split, whole = nn.BatchNorm2d(3).double(), nn.BatchNorm2d(3).double()
    recalibrate(split, x.split(sizes))
    recalibrate(whole, [x])
    torch.testing.assert_close(split.running_mean, whole.running_mean)
    torch.testing.assert_close(split.running_var, whole.running_var)


def deep() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 1), fx.UnitizedBatchNorm2d(4), nn.Tanh(),
        nn.Conv2d(4, 4, 1), fx.PopulationNorm2d(4),
    )  # fmt: skip


def test_precise_batch_norm_is_training_with_the_batch() -> None:
    """Layer after layer the input is that of a training forward on the same batches."""
    model, batches = deep(), data(6, 3)
    recalibrate(model, batches)
    inputs: dict[int, list[Tensor]] = {1: [], 4: [], 7: []}
    probe = convert(deep(), "batch").train()
    for i, seen in inputs.items():
        probe[i].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach()))
    for x in batches:
        probe(x)
    for i, seen in inputs.items():
        joined = torch.cat(seen).double()
        torch.testing.assert_close(model[i].running_mean.double(), joined.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
        var = joined.var((0, 2, 3), correction=0 if i == 7 else 1)
        torch.testing.assert_close(model[i].running_var.double(), var, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [(9,), (1, 1, 1, 1), (5, 1, 3)])
def test_sequential_standardizes_the_network_as_it_evaluates(sizes: tuple[int, ...]) -> None:
    model, batches = deep(), data(*sizes)
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    model[6].register_forward_hook(lambda *_: calls.append(100))
    recalibrate(model, batches, sequential=True)
    # One pass per layer and one batch for the order; those for the earlier layers end early.
    assert sum(c for c in calls if c == 1) == 1 + 3 * len(batches)
    assert sum(c == 100 for c in calls) == 1 + len(batches)
    model.eval()
    for i in (1, 4, 7):
        x = torch.cat([model[:i](b) for b in batches]).double()
        var = x.var((0, 2, 3), correction=0 if i == 7 else 1)
        torch.testing.assert_close(model[i].running_mean.double(), x.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model[i].running_var.double(), var, rtol=1e-4, atol=1e-6)


def test_nothing_else_changes() -> None:
    model = zoo()["resnet"]
    model.insert(1, nn.Dropout(0.5))
    model[2].eval()
    before = copy.deepcopy(model.state_dict())
    flags = [m.training for m in model.modules()]
    attributes = [{k: v for k, v in vars(m).items() if not k.startswith("_")} for m in model.modules()]
    versions = {n: p._version for n, p in model.named_parameters()}
    rng = torch.get_rng_state()
    batches = data(4, 4)
    assert recalibrate(model, batches) is model
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model.modules()] == flags
    assert [{k: v for k, v in vars(m).items() if not k.startswith("_")} for m in model.modules()] == attributes
    assert {n: p._version for n, p in model.named_parameters()} == versions
    changed = {k for k, v in model.state_dict().items() if not torch.equal(before[k], v)}
    assert changed == {k for k in before if k.endswith(("running_mean", "running_var"))}
    assert not any(m._forward_pre_hooks for m in model.modules())
    again = copy.deepcopy(model.state_dict())
    recalibrate(model, batches)
    assert all(torch.equal(again[k], v) for k, v in model.state_dict().items()), "dropout and data order play no part"


def test_instance_norm_averages_its_instances() -> None:
    for layer in (nn.InstanceNorm2d(3, track_running_stats=True), fx.InstanceNorm2d(3, track_running_stats=True)):
        batches = data(4, 2)
        recalibrate(layer, batches)
        x = torch.cat(batches)
        torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.running_var, x.var((2, 3)).mean(0), rtol=1e-5, atol=1e-5)
    alone = nn.InstanceNorm1d(3, track_running_stats=True)
    x = torch.randn(3, 7)
    recalibrate(alone, [x])
    torch.testing.assert_close(alone.running_mean, x.mean(1))


def test_layers_used_twice_pool_both_uses() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x) + self.bn(2 * x + 1)

    x = data(5)[0]
    for sequential in (False, True):
        model = recalibrate(Twice(), [x], sequential=sequential)
        torch.testing.assert_close(model.bn.running_mean, torch.cat([x, 2 * x + 1]).mean((0, 2, 3)))


Pair = namedtuple("Pair", "image target")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, torch.zeros(len(x))),
        lambda x: [x, None],
        lambda x: {"input": x},
        lambda x: Pair(x, 0),
    ],
)
def test_batches_of_any_form(wrap) -> None:
    batches = data(3, 2)
    model = nn.Sequential(nn.BatchNorm2d(3))
    recalibrate(model, map(wrap, batches))
    torch.testing.assert_close(model[0].running_mean, torch.cat(batches).mean((0, 2, 3)))


def test_own_forward_data_loader_and_device() -> None:
    x = data(10)[0]
    model = nn.Sequential(nn.BatchNorm2d(3))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=4, shuffle=True)
    recalibrate(model, loader, device="cpu", forward=lambda net, batch: net(2 * batch[0]), sequential=True)
    torch.testing.assert_close(model[0].running_mean, 2 * x.mean((0, 2, 3)))
    half = nn.Sequential(nn.BatchNorm2d(3)).to(torch.bfloat16)
    recalibrate(half, [x.to(torch.bfloat16)])
    assert half[0].running_mean.dtype == torch.bfloat16
    torch.testing.assert_close(half[0].running_mean.float(), x.mean((0, 2, 3)), rtol=2e-2, atol=2e-2)


def test_wrapped_and_compiled_models() -> None:
    x = data(6)[0]
    compiled = torch.compile(nn.Sequential(nn.BatchNorm2d(3)), backend="eager")
    compiled(x)
    recalibrate(compiled, [x])
    torch.testing.assert_close(compiled._orig_mod[0].running_mean, x.mean((0, 2, 3)))


def test_frozen_and_unreached_layers_keep_theirs() -> None:
    class Aux(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.aux, self.frozen = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.aux(self.main(x)) if self.training else self.frozen(self.main(x))

    model = Aux()
    freeze(model.frozen)
    before = copy.deepcopy(model.state_dict())
    recalibrate(model, data(4))
    after = model.state_dict()
    assert {k for k in before if not torch.equal(before[k], after[k])} == {
        "main.running_mean", "main.running_var", "main.num_batches_tracked",
    }  # fmt: skip
    unfreeze(model)
    recalibrate(model, data(4), include="frozen")
    assert not torch.equal(model.frozen.running_mean, before["frozen.running_mean"])


def test_errors_before_anything_is_changed() -> None:
    model = deep()
    state = copy.deepcopy(model.state_dict())
    bad = data(4, 4)
    bad[1][0, 0, 0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"input of 1 \(BatchNorm2d\) is not finite"):
        recalibrate(model, bad)
    with pytest.raises(ValueError, match="empty"):
        recalibrate(model, [])
    with pytest.raises(ValueError, match="iterated only once"):
        recalibrate(model, iter(data(4)), sequential=True)
    with pytest.raises(ValueError, match="no normalization layer with running statistics"):
        recalibrate(nn.Sequential(nn.GroupNorm(1, 3)), data(3))
    with pytest.raises(ValueError, match="process_group"):
        recalibrate(model, data(3), process_group="all")
    with pytest.raises(RuntimeError, match="expected"):
        recalibrate(model, [torch.randn(2, 7, 5, 5)])
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())
    empty = nn.BatchNorm2d(3)
    recalibrate(empty, [torch.zeros(0, 3, 2, 2), torch.ones(2, 3, 2, 2)])
    assert torch.equal(empty.running_mean, torch.ones(3))


def test_the_first_training_batch_does_not_overwrite_population_statistics() -> None:
    layer = fx.PopulationNorm2d(3)
    recalibrate(layer, data(4, 4, 4))
    before = layer.running_mean.clone()
    layer.train()(data(4)[0] + 100)
    assert (layer.running_mean - before).abs().max() < 50


SIZES = ((5, 2), (3,), ())


def _worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    every = data(5, 2, 3)
    mine = [every[:2], every[2:], []][rank]
    out = {}
    for sequential in (False, True):
        model = recalibrate(deep(), mine, sequential=sequential)
        out[sequential] = model.state_dict()
    ddp = nn.parallel.DistributedDataParallel(deep())
    if rank < 2:
        alone = recalibrate(deep(), mine, process_group=None)
        out["alone"] = alone.state_dict()
    out["ddp"] = recalibrate(ddp, mine).module.state_dict()
    try:
        recalibrate(deep(), [])
    except ValueError as error:
        out["empty"] = str(error)
    torch.save(out, f"{folder}/{rank}.pt")
    del ddp
    torch.distributed.barrier()  # gloo is done with all tensors: its end must not wait for one
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_with_unequal_data_equal_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_worker, (3, str(tmp_path)), nprocs=3)
    ranks = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(3)]
    for sequential in (False, True):
        single = recalibrate(deep(), data(5, 2, 3), sequential=sequential).state_dict()
        for key, value in single.items():
            if "tracked" in key:
                continue
            torch.testing.assert_close(ranks[0][sequential][key], value, rtol=1e-6, atol=1e-7)
            for rank in ranks[1:]:
                assert torch.equal(rank[sequential][key], ranks[0][sequential][key])
    assert not torch.equal(ranks[0]["alone"]["1.running_mean"], ranks[1]["alone"]["1.running_mean"])
    assert torch.equal(ranks[2]["ddp"]["4.running_var"], ranks[0][False]["4.running_var"])
    assert all("empty" in rank["empty"] for rank in ranks)
