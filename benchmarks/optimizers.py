"""Time of one optimizer step: SGD-G and Adam-G beside torch's SGD and geoopt's RiemannianSGD, in interleaved runs.

    python benchmarks/optimizers.py [--sets resnet18,resnet110,wrn28_10] [--repeats 60] [--threads 2] [--ortho 0.1]

All convolution weights of the networks are on the manifold, float32. Every repeat runs one step of each optimizer in
turn, so that what else the machine does hits all alike; ratios are medians over repeats of time / time of the first
optimizer. With ``--ortho`` above 0 an optimizer with the regularizer is added: two matrix products per weight, which
neither torch nor geoopt do. geoopt is timed where it is installed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from evenkeel.optim import SGDG, AdamG

Shapes = list[tuple[int, ...]]


def resnet18() -> Shapes:
    shapes: Shapes = [(64, 3, 7, 7)]
    width = 64
    for channels in (64, 128, 256, 512):
        for _ in range(2):
            shapes += [(channels, width, 3, 3), (channels, channels, 3, 3)]
            if width != channels:
                shapes.append((channels, width, 1, 1))
            width = channels
    return shapes


def resnet110() -> Shapes:
    shapes: Shapes = [(16, 3, 3, 3)]
    for channels, before in ((16, 16), (32, 16), (64, 32)):
        shapes += [(channels, before if i == 0 else channels, 3, 3) for i in range(36)]
    return shapes


def wrn28_10() -> Shapes:
    shapes: Shapes = [(16, 3, 3, 3)]
    width = 16
    for channels in (160, 320, 640):
        for _ in range(4):
            shapes += [(channels, width, 3, 3), (channels, channels, 3, 3)]
            if width != channels:
                shapes.append((channels, width, 1, 1))
            width = channels
    return shapes


SETS: dict[str, Callable[[], Shapes]] = {"resnet18": resnet18, "resnet110": resnet110, "wrn28_10": wrn28_10}


def weights(shapes: Shapes, device: str) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    out = []
    for shape in shapes:
        rows = nn.functional.normalize(torch.randn(shape, generator=generator).flatten(1), dim=1).view(shape)
        p = nn.Parameter(rows.to(device))
        p.grad = (0.01 * torch.randn(shape, generator=generator)).to(device)
        out.append(p)
    return out


def geoopt_sphere(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    import geoopt

    points = []
    for p in params:
        point = geoopt.ManifoldParameter(p.detach().flatten(1), manifold=geoopt.Sphere())
        point.grad = p.grad.flatten(1)
        points.append(point)
    return geoopt.optim.RiemannianSGD(points, lr=0.1, momentum=0.9)


def contenders(ortho: float, compiled: bool) -> dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]:
    found: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
        "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
        "SGDG": lambda p: SGDG(p, lr=0.2, ortho=0.0),
        "AdamG": lambda p: AdamG(p, lr=0.05, ortho=0.0),
    }
    if ortho:
        found[f"SGDG ortho={ortho}"] = lambda p: SGDG(p, lr=0.2, ortho=ortho)
    if compiled:
        found["SGDG compiled"] = lambda p: SGDG(p, lr=0.2, ortho=0.0, compile=True)
    try:
        import geoopt  # noqa: F401
    except ImportError:
        print("geoopt is not installed and is left out")
    else:
        found["geoopt RSGD"] = geoopt_sphere
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ortho", type=float, default=0.0)
    parser.add_argument("--compiled", action="store_true", help="also time compile=True")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="write the numbers to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    synchronize = torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None
    results = {}
    for name in args.sets.split(","):
        shapes = SETS[name]()
        numbers = sum(torch.Size(shape).numel() for shape in shapes)
        print(f"\n{name}: {len(shapes)} tensors, {numbers / 1e6:.1f} million numbers")
        optimizers = {
            k: make(weights(shapes, args.device)) for k, make in contenders(args.ortho, args.compiled).items()
        }
        times: dict[str, list[float]] = {key: [] for key in optimizers}
        for repeat in range(args.repeats + 3):
            for key, optimizer in optimizers.items():
                synchronize()
                start = time.perf_counter()
                optimizer.step()
                synchronize()
                if repeat >= 3:
                    times[key].append(1e3 * (time.perf_counter() - start))
        base = times["SGD foreach"]
        table = {}
        for key, ts in times.items():
            ratio = statistics.median(a / b for a, b in zip(ts, base, strict=True))
            table[key] = {"min_ms": min(ts), "median_ms": statistics.median(ts), "ratio": ratio}
            print(f"  {key:16s} min {min(ts):8.2f} ms   median {statistics.median(ts):8.2f} ms   ratio {ratio:6.2f}")
        results[name] = table
    if args.json:
        environment = {"torch": torch.__version__, "machine": platform.machine(), "threads": args.threads}
        with open(args.json, "w") as file:  # noqa: PTH123
            json.dump({"environment": environment, "arguments": vars(args), "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
