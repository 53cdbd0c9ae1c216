"""Two processes with gloo: DDP gives one process's result, sharded rows work, split rows are refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from sphere_worker import data, network, optimizer_for, train
from torch import nn

from flexnorm.optim import SGDG, AdamG, param_groups

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    script = Path(__file__).parents[1] / "helpers" / "sphere_worker.py"
    commands = [[sys.executable, str(script), str(rank), str(folder)] for rank in range(2)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen(command, **pipes) for command in commands]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("cls", [SGDG, AdamG])
def test_ddp_equals_one_process(result, cls):
    model = network()
    train(model, optimizer_for(cls, model), data())
    torch.testing.assert_close(torch.tensor(result[cls.__name__], dtype=torch.float64), model[0].weight.detach())


@pytest.mark.parametrize("cls", [SGDG, AdamG])
def test_fully_sharded_equals_one_process(result, cls):
    model = network()
    train(model, optimizer_for(cls, model, ortho=0.0), data())
    torch.testing.assert_close(
        torch.tensor(result["fsdp" + cls.__name__], dtype=torch.float64), model[0].weight.detach(), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("cls", [SGDG, AdamG])
def test_rows_sharded_between_processes_equal_one_process(result, cls):
    full = torch.randn(5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    p = nn.Parameter(full.clone())
    optimizer = cls([p], lr=0.1, ortho=0.0)
    for _ in range(3):
        p.grad = full.flip(0)
        optimizer.step()
    torch.testing.assert_close(torch.tensor(result["sharded" + cls.__name__], dtype=torch.float64), p.detach())


def test_what_cannot_be_done_on_shards_is_said(result):
    split, together, replicated = result["errors"]
    assert "splits single weight vectors" in split
    assert "set ortho=0" in together
    assert replicated == ""


def test_groups_of_a_model_that_will_be_wrapped():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    assert param_groups(model, 0.1, 0.1, 0.0, torch.zeros(4, 4))[0]["manifold"]


def test_placements_in_one_process(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from flexnorm.optim.rows import local_part, local_parts

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain = torch.ones(4, 3)
        rows, split, whole = (distribute_tensor(plain, mesh, [p]) for p in (Shard(0), Shard(1), Replicate()))
        for t in (*local_parts([rows, whole, plain], 0, False), local_part(whole, 1, True)):
            assert type(t) is torch.Tensor
            assert torch.equal(t, plain)
        for t, row_dim in ((split, 0), (rows, 1)):
            with pytest.raises(RuntimeError, match="splits single weight vectors"):
                local_part(t, row_dim, needs_whole=False)
        with pytest.raises(RuntimeError, match="set ortho=0 and row_units=1"):
            local_part(rows, 0, needs_whole=True)
        for cls in (SGDG, AdamG):
            heads = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
            heads.grad = torch.zeros_like(heads)
            with pytest.raises(RuntimeError, match="sharded between processes"):
                cls([heads], lr=0.1, ortho=0.0, row_units=2).step()
    finally:
        dist.barrier()  # gloo is done with all tensors: its end must not wait for one
        dist.destroy_process_group()
