"""Distances against POT, and the cost of a ShiftMonitor in training, interleaved, as ratios.

    python -m benchmarks.shift --only distances,measurement --out results/bench_shift.json
    python -m benchmarks.shift --only monitor --rounds 8 --out results/bench_monitor.json

Rows: method and sizes, least times of both in milliseconds, median ratio within a round, largest difference of the
values.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ot
import torch
from torch import Tensor, nn

from benchmarks.timing import interleave, ratios, save
from flexnorm.lab.models import build
from flexnorm.shift import ShiftMonitor, measure_shift, shift_bounds, wasserstein

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Row = dict[str, Any]
SIZES = [
    (256, 256, 64, torch.float32),
    (1024, 1024, 64, torch.float32),
    (1024, 1024, 512, torch.float32),
    (1024, 1024, 512, torch.float64),
    (1024, 768, 512, torch.float32),
]


def against_pot(method: str, size: str, ours: Callable[[], Tensor], peer: Callable[[], Tensor], rounds: int) -> Row:
    """Time one method and POT's on the same inputs in the same rounds."""
    times = interleave({"ours": ours, "POT": peer}, rounds, warmup=1)
    return {
        "method": method,
        "size": size,
        "ms": 1e3 * min(times["ours"]),
        "POT ms": 1e3 * min(times["POT"]),
        "times faster": ratios(times, "ours")["POT"],
        "largest difference": float((ours() - peer()).detach().abs().max()),
    }


def with_gradient(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The gradient with respect to x, to time a backward as well."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x, y).sum(), x)[0]


def distances(rounds: int) -> list[Row]:
    """Every method against POT's on the same inputs."""
    rows = []
    for n, m, d, dtype in SIZES:
        x, y = torch.randn(n, d, dtype=dtype, device=DEVICE), torch.randn(m, d, dtype=dtype, device=DEVICE)
        u = torch.randn(d, 512, dtype=dtype, device=DEVICE)
        u = u / u.norm(dim=0)
        size = f"{n}, {m} x {d} {str(dtype)[6:]}"
        peer = partial(ot.sliced_wasserstein_distance, x, y, p=1, projections=u)
        rows += [
            against_pot("marginal", size, partial(wasserstein, x, y), partial(ot.wasserstein_1d, x, y), rounds),
            against_pot("sliced 512", size, partial(wasserstein, x, y, "sliced", projections=u), peer, rounds),
        ]
    x, y = torch.randn(1024, 512, device=DEVICE), torch.randn(1024, 512, device=DEVICE)
    ours, theirs = partial(with_gradient, wasserstein, x, y), partial(with_gradient, ot.wasserstein_1d, x, y)
    rows.append(against_pot("marginal, gradient", "1024, 1024 x 512 float32", ours, theirs, rounds))
    for n, m in ((128, 128), (256, 256), (128, 96)):
        x, y = torch.randn(n, 64, dtype=torch.float64), torch.randn(m, 64, dtype=torch.float64)
        even = [torch.full((k,), 1 / k, dtype=torch.float64) for k in (n, m)]
        rows.append(
            against_pot(
                "exact",
                f"{n}, {m} x 64 float64",
                partial(wasserstein, x, y, "exact"),
                partial(pot_exact, x, y, *even),
                rounds,
            )
        )
    return rows


def pot_exact(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The exact distance by POT's network simplex."""
    return ot.emd2(a, b, torch.cdist(x, y), numItermax=10**7)


def measurement(rounds: int) -> list[Row]:
    """What a monitor computes for one layer of d channels from n points."""
    rows = []
    for n, d in ((128, 16), (128, 64), (128, 512), (256, 64), (512, 64)):
        x = torch.randn(n, d)
        y = x + 0.05 * torch.randn(n, d)
        times = interleave({"measure": partial(measure_shift, x, y), "bounds": partial(shift_bounds, x, y)}, rounds)
        rows.append(
            {
                "points": n,
                "channels": d,
                "measure ms": 1e3 * min(times["measure"]),
                "all bounds ms": 1e3 * min(times["bounds"]),
            }
        )
    return rows


def monitor(rounds: int, every: int = 100, batch: int = 128) -> list[Row]:
    """Training with a monitor at its defaults against the same training without one, ResNet-20, step by step in turn.

    Two copies of one network make the same steps, in an order that changes with every step, so that whatever else the
    machine does meets both. A block is ``every`` steps of each and contains one measurement with its two looks; its
    ratio is of the whole times, so it also has what a measurement does to the steps after it.
    """
    x, y = torch.randn(batch, 3, 32, 32, device=DEVICE), torch.randint(10, (batch,), device=DEVICE)

    def training() -> tuple[nn.Module, Callable[[], None]]:
        torch.manual_seed(0)
        model = build("resnet20", norm="batch", in_channels=3, num_classes=10).to(DEVICE)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

        def step() -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

        return model, step

    (model, step_with), (twin, step_without) = training(), training()
    watch = ShiftMonitor(model, x, every=every)
    looks: list[float] = []

    def watched() -> None:
        step_with()
        begin = time.perf_counter()
        watch.step()
        looks.append(time.perf_counter() - begin)

    watch.start()
    times = interleave({"on": watched, "off": step_without}, every * max(1, rounds // 2), warmup=2)
    blocks = [slice(k, k + every) for k in range(0, len(times["on"]), every)]
    whole = [sum(times["on"][block]) / sum(times["off"][block]) for block in blocks]
    looks = looks[2:]  # the first measurement imports what it needs
    same = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    return [
        {
            "model": "resnet20",
            "batch": batch,
            "layers": len(watch.layers),
            "step ms": 1e3 * statistics.median(times["off"]),
            "every": every,
            "steps of each": len(times["on"]),
            "on / off, all": sum(times["on"]) / sum(times["off"]),
            "on / off, median block": statistics.median(whole),
            "on / off, least block": min(whole),
            "on / off, worst block": max(whole),
            "monitor itself %": 100 * sum(looks) / sum(times["off"]),
            "weights equal": same,
        }
    ]


def show(rows: list[Row]) -> None:
    """Print rows as a table."""
    names = list(rows[0])
    cells = [names, *([f"{r[k]:.3g}" if isinstance(r[k], float) else str(r[k]) for k in names] for r in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)).rstrip())
    print(flush=True)


PARTS: dict[str, Callable[[int], list[Row]]] = {"distances": distances, "measurement": measurement, "monitor": monitor}


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for part in options.only.split(","):
        made = PARTS[part](options.rounds)
        show(made)
        rows += [{"part": part, **row} for row in made]
    if options.out:
        save(options.out, "shift", rows, pot=ot.__version__)


if __name__ == "__main__":
    main()
