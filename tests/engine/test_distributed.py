"""Batch statistics over processes: unequal local batches on gloo equal one process on the joined batch."""

from __future__ import annotations

import copy
import os
import socket
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import flexnorm.nn as fx
from flexnorm.engine import Segments

SIZES = (5, 2, 0)


def _network(norm: str) -> nn.Module:
    torch.manual_seed(1)
    norms = {
        "batch": lambda: fx.BatchNorm2d(6, process_group="world"),
        "unitized": lambda: fx.UnitizedBatchNorm2d(6, process_group="world"),
        "population": lambda: fx.PopulationNorm2d(6, process_group="world", max_ratio=1.5),
    }
    net = nn.Sequential(nn.Conv2d(3, 6, 3), norms[norm](), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 16, 2)).double()
    if norm == "unitized":
        nn.init.constant_(net[1].alpha, 0.3)
    return net


def _data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(sum(SIZES), 3, 6, 6, dtype=torch.float64), torch.randn(sum(SIZES), 2, dtype=torch.float64)


def _worker(rank: int, world: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    x, target = (t.split(SIZES[:world])[rank] for t in _data())
    out: dict[str, list[Tensor]] = {}
    for norm in ("batch", "unitized", "population"):
        net = _network(norm)
        ddp = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
        outputs = []
        for _ in range(2):
            y = ddp(x)
            outputs.append(y.detach())
            # The loss is a sum; DDP averages gradients over processes.
            loss = world * (y - target).square().sum()
            ddp.zero_grad()
            loss.backward()
        out[norm] = [torch.cat(outputs), *(p.grad for p in net.parameters()), *net.buffers()]
    torch.save(out, f"{folder}/{rank}.pt")
    del ddp
    torch.distributed.barrier()  # gloo is done with all tensors: its end must not wait for one
    torch.distributed.destroy_process_group()


@pytest.mark.quick(1)
@pytest.mark.parametrize("world", [2, 3])
def test_processes_with_unequal_batches_equal_one_process(world: int, tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_worker, (world, port, str(tmp_path)), nprocs=world)
    ranks = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(world)]
    x, target = (t[: sum(SIZES[:world])] for t in _data())
    for norm in ("batch", "unitized", "population"):
        net = _network(norm)
        outputs = []
        for _ in range(2):
            y = net(x)
            outputs.append(y.detach())
            net.zero_grad()
            (y - target).square().sum().backward()
        joined = [torch.cat([r[norm][0].chunk(2)[i] for r in ranks]) for i in range(2)]
        torch.testing.assert_close(torch.cat(joined), torch.cat(outputs))
        expected = [*(p.grad for p in net.parameters()), *net.buffers()]
        for rank in ranks:
            for got, want in zip(rank[norm][1:], expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def _masked_layers() -> dict[str, nn.Module]:
    torch.manual_seed(3)
    options = {"dtype": torch.float64, "channel_axis": -1, "process_group": "world"}
    return {
        "batch": fx.BatchNorm1d(5, **options),
        "mean": fx.BatchNorm1d(5, momentum=None, **options),
        "unitized": fx.UnitizedBatchNorm1d(5, **options),
        "population": fx.PopulationNorm1d(5, max_ratio=1.5, **options),
        "renorm": fx.BatchRenorm1d(5, warmup=0, ramp=0, **options),
        "instance": fx.InstanceNorm1d(5, track_running_stats=True, **options),
        "sequences": fx.BatchNorm1d(5, per_position=False, **options),
    }


def _graph_layer() -> nn.Module:
    return fx.InstanceNorm1d(5, track_running_stats=True, process_group="world", dtype=torch.float64)


def _masked_data(world: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(4)
    lengths = torch.tensor([6, 2, 3, 5, 0, 0][: 2 * world])  # the third process has nothing that counts
    return torch.randn(2 * world, 6, 5, dtype=torch.float64), torch.arange(6) < lengths[:, None]


def _masked_worker(rank: int, world: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    x, mask = (t.split(2)[rank] for t in _masked_data(world))
    out = {}
    for name, layer in _masked_layers().items():
        own = x.clone().requires_grad_()
        for _ in range(2):
            y = layer(own, mask=mask)
        (grad,) = torch.autograd.grad(y[mask].pow(3).sum(), own)
        out[name] = [y.detach()[mask], grad[mask], *layer.buffers()]
    layer = _graph_layer()
    layer(x[mask], segments=Segments(mask.nonzero()[:, 0], 2))
    out["graphs"] = [*layer.buffers()]
    torch.save(out, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.quick(1)
@pytest.mark.parametrize("world", [2, 3])
def test_processes_with_unequal_masks_equal_one_process(world: int, tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_masked_worker, (world, port, str(tmp_path)), nprocs=world)
    ranks = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(world)]
    x, mask = _masked_data(world)
    x.requires_grad_()
    for name, layer in _masked_layers().items():
        for _ in range(2):
            y = layer(x, mask=mask)
        (grad,) = torch.autograd.grad(y[mask].pow(3).sum(), x)
        torch.testing.assert_close(torch.cat([r[name][0] for r in ranks]), y[mask])
        torch.testing.assert_close(torch.cat([r[name][1] for r in ranks]), grad[mask], rtol=1e-6, atol=1e-7)
        for rank in ranks:
            for got, want in zip(rank[name][2:], layer.buffers(), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7, check_dtype=False)
    graphs = _graph_layer()
    graphs(x.detach()[mask], segments=Segments(mask.nonzero()[:, 0], 2 * world))
    for rank in ranks:
        for got, want in zip(rank["graphs"], graphs.buffers(), strict=True):
            torch.testing.assert_close(got, want)


def test_process_group_without_distributed_is_this_process() -> None:
    net = _network("batch")
    alone = copy.deepcopy(net)
    alone[1].process_group = None
    x, _ = _data()
    assert torch.equal(net(x), alone(x))
