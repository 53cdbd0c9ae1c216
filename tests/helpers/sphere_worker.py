"""One of two processes that train with the manifold optimizers: ``python sphere_worker.py RANK FOLDER``."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from flexnorm.optim import SGDG, AdamG


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10, bias=False), nn.LayerNorm(10), nn.Linear(10, 2)).double()


def optimizer_for(cls, model, **kwargs):
    # One weight is put on the manifold by hand: BatchNorm would make the two processes differ from one.
    groups = [{"params": [model[0].weight]}, {"params": [*model[1:].parameters()], "manifold": False}]
    return cls(groups, lr=0.1, **kwargs)


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 8, 6, generator=generator, dtype=torch.float64)


def train(model, optimizer, batches):
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def work(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        out = {}
        for cls in (SGDG, AdamG):
            model = network()
            wrapped = DistributedDataParallel(model)
            train(wrapped, optimizer_for(cls, model), [x[rank * 4 : rank * 4 + 4] for x in data()])
            out[cls.__name__] = model[0].weight.detach().tolist()

        mesh = init_device_mesh("cpu", (2,))
        full = torch.randn(5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        for cls in (SGDG, AdamG):
            sharded = nn.Parameter(distribute_tensor(full, mesh, [Shard(0)]))
            optimizer = cls([sharded], lr=0.1, ortho=0.0)
            for _ in range(3):
                sharded.grad = distribute_tensor(full.flip(0), mesh, [Shard(0)])
                optimizer.step()
            out["sharded" + cls.__name__] = sharded.full_tensor().detach().tolist()
        for cls in (SGDG, AdamG):
            model = network()
            fully_shard(model, mesh=mesh)
            optimizer = optimizer_for(cls, model, ortho=0.0)
            train(model, optimizer, [x[rank * 4 : rank * 4 + 4] for x in data()])
            out["fsdp" + cls.__name__] = model[0].weight.full_tensor().detach().tolist()
        errors = []
        for placement, kwargs in ((Shard(1), {"ortho": 0.0}), (Shard(0), {"ortho": 0.1}), (Replicate(), {})):
            p = nn.Parameter(distribute_tensor(full, mesh, [placement]))
            p.grad = distribute_tensor(torch.ones_like(full), mesh, [placement])
            try:
                SGDG([p], lr=0.1, **kwargs).step()
                errors.append("")
            except RuntimeError as error:
                errors.append(str(error))
        out["errors"] = errors
        if rank == 0:
            (folder / "result.json").write_text(json.dumps(out))
    finally:
        dist.barrier()  # gloo is done with all tensors: its end must not wait for one
        dist.destroy_process_group()


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
