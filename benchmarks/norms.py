"""Normalization layers against nn.BatchNorm2d: forward + backward and training steps, interleaved, as ratios.

    python -m benchmarks.norms [--rounds 40] [--out results/bench_norms.json] [--only passes,compiled,step,memory]

Rows: rule or layer, shape, memory format, eager or compiled, median ratio to nn.BatchNorm2d of the same run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.timing import interleave, ratios, save
from flexnorm import Moments, flex_norm
from flexnorm import nn as fx
from flexnorm.lab.models import build

SHAPES = [(64, 64, 32, 32), (64, 128, 16, 16), (64, 256, 8, 8)]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def user_rule(moments: Moments, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A rule that the package does not have: half batch, half layer statistics."""
    batch, layer = moments.pool("batch"), moments.pool("channels")
    scale = weight * (0.5 * batch.var + 0.5 * layer.var + 1e-5).rsqrt()
    return scale, bias - (0.5 * batch.mean + 0.5 * layer.mean) * scale


class UserNorm(nn.Module):
    """The user's rule as a user would write the module."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return flex_norm(x, user_rule, self.weight, self.bias)


class NaiveUnitized(nn.Module):
    """Unitized BatchNorm as the plain composition of tensor operations: what a rule costs without the engine."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.alpha = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((0, 2, 3), keepdim=True)
        var = x.var((0, 2, 3), correction=0, keepdim=True)
        xhat = (x - mean) / (var + 1e-5).sqrt()
        positions = x.shape[2] * x.shape[3]
        norm = (xhat.square().sum((1, 2, 3), keepdim=True) / positions**2 + 1e-5).rsqrt()
        weight, bias, alpha = (p.view(1, -1, 1, 1) for p in (self.weight, self.bias, self.alpha))
        return weight * xhat * (alpha * norm + 1 - alpha) + bias


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "nn.BatchNorm2d": nn.BatchNorm2d,
    "nn.GroupNorm(32)": lambda c: nn.GroupNorm(32, c),
    "naive unitized": NaiveUnitized,
    "batch": fx.BatchNorm2d,
    "unitized": fx.UnitizedBatchNorm2d,
    "population": fx.PopulationNorm2d,
    "population (estimated)": lambda c: fx.PopulationNorm2d(c, statistics="estimated"),
    "group(32)": lambda c: fx.GroupNorm(32, c),
    "layer": fx.LayerNorm2d,
    "instance": fx.InstanceNorm2d,
    "user rule": UserNorm,
}
BASE = "nn.BatchNorm2d"


def _call(layer: nn.Module, x: Tensor, g: Tensor) -> Callable[[], object]:
    parameters = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x), parameters, g)


def passes(rounds: int, compiled: bool) -> list[dict[str, object]]:
    """Forward and backward of one layer."""
    rows: list[dict[str, object]] = []
    chosen = [BASE, "nn.GroupNorm(32)", "batch", "unitized", "population", "user rule"] if compiled else list(LAYERS)
    for shape in SHAPES:
        for name, memory_format in FORMATS.items():
            x = torch.randn(shape, device=DEVICE).to(memory_format=memory_format).requires_grad_()
            g = torch.randn(shape, device=DEVICE).to(memory_format=memory_format)
            calls = {}
            for key in chosen:
                torch._dynamo.reset()
                layer = LAYERS[key](shape[1]).to(DEVICE)
                if compiled and key != BASE:
                    layer = torch.compile(layer)  # type: ignore[assignment]
                calls[key] = _call(layer, x, g)
                calls[key]()
            times = interleave(calls, rounds)
            for key, ratio in ratios(times, BASE).items():
                row = {
                    "layer": key,
                    "shape": "x".join(map(str, shape)),
                    "format": name,
                    "mode": "compiled" if compiled and key != BASE else "eager",
                    "ratio": round(ratio, 3),
                    "min_ms": round(1e3 * min(times[key]), 3),
                }
                rows.append(row)
                line = f"{key:24s} {row['shape']:14s} {name:14s} {row['mode']:9s} {ratio:6.2f}"
                print(f"{line}  {row['min_ms']} ms")
    return rows


def steps(rounds: int) -> list[dict[str, object]]:
    """A whole training step of a ResNet-20 at batch size 128."""
    rows: list[dict[str, object]] = []
    x, y = torch.randn(128, 3, 32, 32, device=DEVICE), torch.randint(10, (128,), device=DEVICE)
    for compiled in (False, True):
        for name, memory_format in FORMATS.items():
            calls = {}
            data = x.to(memory_format=memory_format)
            for norm in ("nn.BatchNorm2d", "unitized", "batch", "population"):
                torch._dynamo.reset()
                net = build("resnet20", norm=nn.BatchNorm2d if norm == "nn.BatchNorm2d" else norm).to(
                    DEVICE, memory_format=memory_format
                )
                model = torch.compile(net) if compiled else net
                optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)

                def step(model=model, optimizer=optimizer, data=data) -> None:  # type: ignore[no-untyped-def]
                    loss = nn.functional.cross_entropy(model(data), y)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()

                calls[norm] = step
                step()
            times = interleave(calls, rounds)
            for norm, ratio in ratios(times, "nn.BatchNorm2d").items():
                mode = "compiled" if compiled else "eager"
                rows.append(
                    {
                        "layer": norm,
                        "shape": "resnet20 step, batch 128",
                        "format": name,
                        "mode": mode,
                        "ratio": round(ratio, 3),
                        "median_ms": round(1e3 * statistics.median(times[norm]), 1),
                    }
                )
                print(f"resnet20 step {norm:16s} {name:14s} {mode:9s} {ratio:6.3f}  {rows[-1]['median_ms']} ms")
    return rows


def memory() -> list[dict[str, object]]:
    """Bytes of saved tensors of a training step of a ResNet-20, each storage once: what the backward keeps alive."""
    rows: list[dict[str, object]] = []
    x, y = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    for norm in (nn.BatchNorm2d, "batch", "unitized", "population"):
        net = build("resnet20", norm=norm)
        storages: dict[int, int] = {}

        def pack(t: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = nn.functional.cross_entropy(net(x), y)
        own = {p.untyped_storage().data_ptr() for p in net.parameters()}
        total = sum(size for pointer, size in storages.items() if pointer not in own)
        loss.backward()
        key = norm if isinstance(norm, str) else "nn.BatchNorm2d"
        rows.append({"layer": key, "shape": "resnet20, batch 32", "saved_bytes": total})
        rows[-1]["ratio"] = round(total / int(rows[0]["saved_bytes"]), 4)  # type: ignore[call-overload]
        print(f"saved for the backward {key:16s} {total / 2**20:8.2f} MiB  {rows[-1]['ratio']}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("results/bench_norms.json"))
    parser.add_argument("--only", default="passes,compiled,step,memory")
    options = parser.parse_args()
    wanted = options.only.split(",")
    rows: list[dict[str, object]] = []
    if "passes" in wanted:
        rows += passes(options.rounds, compiled=False)
    if "memory" in wanted:
        rows += memory()
    if "step" in wanted:
        rows += steps(max(5, options.rounds // 2))
    if "compiled" in wanted:
        rows += passes(options.rounds, compiled=True)
    save(options.out, "norms", rows, baseline=BASE)


if __name__ == "__main__":
    main()
