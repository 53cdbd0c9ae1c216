"""Distances against POT, and the cost of a ShiftMonitor in training, interleaved, as ratios.

    python -m benchmarks.shift [--rounds 9] [--out results/bench_shift.json] [--only distances,measurement,monitor]

Rows: method and sizes, least times of both in milliseconds, median ratio within a round, largest difference of the
values.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ot
import torch
from torch import Tensor, nn

from benchmarks.timing import interleave, ratios, save
from evenkeel.models import build
from evenkeel.shift import ShiftMonitor, measure_shift, shift_bounds, wasserstein

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
    """Cost of a monitor at its defaults on ResNet-20: a measurement (two looks, all distances) beside a step."""
    torch.manual_seed(0)
    model = build("resnet20", norm="batch", in_channels=3, num_classes=10).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, y = torch.randn(batch, 3, 32, 32, device=DEVICE), torch.randint(10, (batch,), device=DEVICE)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    # Of two steps in a row one takes the reference and one measures against it.
    watch = ShiftMonitor(model, x, every=2)
    step()
    watch.start()
    times = interleave({"step": step, "monitor": watch.step}, 2 * rounds, warmup=2)
    pairs = [a + b for a, b in zip(times["monitor"][::2], times["monitor"][1::2], strict=True)]
    one, each = statistics.median(pairs), statistics.median(times["step"])
    return [
        {
            "model": "resnet20",
            "batch": batch,
            "layers": len(watch.layers),
            "step ms": 1e3 * each,
            "measurement ms": 1e3 * one,
            "every": every,
            "share of training %": 100 * one / (every * each),
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
