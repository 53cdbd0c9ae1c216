"""Two real processes: the monitor watches on one of them, nobody waits, and the training does not notice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")

SCRIPT = """
import json, sys, torch
import torch.distributed as dist
from torch import nn
from flexnorm.nn import make_norm
from flexnorm.shift import ShiftMonitor

folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

def train(watchers):
    torch.manual_seed(0)
    inner = nn.Sequential(
        nn.Linear(4, 6), make_norm("batch", 6, ndim=0, process_group="world"), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3),
    )
    model = nn.parallel.DistributedDataParallel(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(rank)
    x, y = torch.randn(8 + 4 * rank, 4, generator=generator), torch.randint(3, (8 + 4 * rank,), generator=generator)
    monitor = ShiftMonitor(model, x, every=2, anchor="both") if rank in watchers else None
    torch.manual_seed(rank)
    if monitor:
        monitor.start()
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if monitor:
            monitor.step()
    state = [*inner.state_dict().values(), *(p.grad for p in inner.parameters()), torch.get_rng_state()]
    return [v.clone() for v in state], [r.asdict() for r in monitor.records] if monitor else []

alone, none = train(())
one, records = train((0,))
both, more = train((0, 1))
same = all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(alone, one, both))
result = {"same": same, "none": none, "records": records, "both": more, "weight": alone[0].tolist()}
open(f"{folder}/{rank}.json", "w").write(json.dumps(result))
dist.barrier()
dist.barrier()  # gloo is done with all tensors: its end must not wait for one
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    running = [
        subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True, env=environment) for rank in (0, 1)
    ]
    try:
        for process in running:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in running:
            process.kill()
            process.wait()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["same"]
    assert second["same"]
    assert first["weight"] == second["weight"]
    assert first["none"] == second["none"] == second["records"] == []
    assert first["records"] == first["both"]
    layers = {(record["layer"], record["reference"], record["step"]) for record in first["records"]}
    steps = {("previous", 1), ("previous", 3), ("previous", 5), ("initial", 2), ("initial", 4)}
    assert layers == {(layer, *step) for layer in ("1", "5") for step in steps}
    for record in (*first["records"], *second["both"]):
        assert 0 < record["lower"] <= record["w1"] <= record["upper"]
    assert [r["w1"] for r in second["both"]] != [r["w1"] for r in first["both"]]
