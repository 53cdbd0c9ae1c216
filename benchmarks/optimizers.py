"""Time of one optimizer step: SGD-G and Adam-G beside torch's SGD and geoopt's RiemannianSGD, interleaved, as ratios.

    python -m benchmarks.optimizers [--rounds 40] [--threads 2] [--sets resnet18,...] [--out results/....json]

All convolution weights of a network are on the manifold, float32: ResNet-18 as for ImageNet, ResNet-110 and WRN-28-10
as for CIFAR. "SGDG" and "AdamG" are without the regularizer, which neither torch nor geoopt have; "ortho" is with its
default (0.1, by turns: the mean over the steps of one), "ortho_every=1" with it in every step, as in the paper, "bf16"
with its matrix products in bfloat16 (``torch.backends.mkldnn.matmul.fp32_precision``), "no compiler" on torch's own
kernels, "compile=True" through TorchInductor. geoopt is timed where it is installed (each weight a tensor of rows on
its sphere, momentum 0.9). Ratios are medians over rounds of time / time of torch's SGD with momentum, foreach. The
learning rate is so small that weights stay where they are: against a constant gradient they would soon lie along it,
where steps need more care than in training.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks.timing import interleave, ratios, save
from flexnorm.kernels import sphere
from flexnorm.optim import SGDG, AdamG

Step = Callable[[], object]
RATE = 1e-4
EVERY = inspect.signature(SGDG).parameters["ortho_every"].default
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


def geoopt_sphere(geoopt: Any, params: list[nn.Parameter]) -> Step:
    points = []
    for p in params:
        point = geoopt.ManifoldParameter(p.detach().flatten(1), manifold=geoopt.Sphere())
        point.grad = p.grad.flatten(1)
        points.append(point)
    return geoopt.optim.RiemannianSGD(points, lr=RATE, momentum=0.9).step


@contextmanager
def bf16_products() -> Iterator[None]:
    """Float32 matrix products through bfloat16 where the processor has them."""
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def without_compiler(step: Step) -> Step:
    def call() -> None:
        with mock.patch.object(sphere, "load", return_value=None):
            step()

    return call


def in_bf16(step: Step) -> Step:
    def call() -> None:
        with bf16_products():
            step()

    return call


def one_turn(optimizer: SGDG | AdamG) -> Step:
    """The steps after which the regularizer has acted on every weight."""

    def call() -> None:
        for _ in range(EVERY):
            optimizer.step()

    return call


def contenders(make: Callable[[], list[nn.Parameter]], compiled: bool) -> dict[str, Step]:
    by_turns, every_step = SGDG(make(), lr=RATE), SGDG(make(), lr=RATE, ortho_every=1)
    found: dict[str, Step] = {
        "SGD foreach": torch.optim.SGD(make(), lr=RATE, momentum=0.9, foreach=True).step,
        "SGD fused": torch.optim.SGD(make(), lr=RATE, momentum=0.9, fused=True).step,
        "SGDG": SGDG(make(), lr=RATE, ortho=0.0).step,
        "AdamG": AdamG(make(), lr=RATE, ortho=0.0).step,
        "SGDG ortho": one_turn(by_turns),
        "AdamG ortho": one_turn(AdamG(make(), lr=RATE)),
        "SGDG ortho, bf16": in_bf16(one_turn(by_turns)),
        "SGDG ortho_every=1": every_step.step,
        "SGDG ortho_every=1, bf16": in_bf16(every_step.step),
        "SGDG no compiler": without_compiler(SGDG(make(), lr=RATE, ortho=0.0).step),
    }
    if compiled:
        found["SGDG compile=True"] = SGDG(make(), lr=RATE, ortho=0.0, compile=True).step
    try:
        import geoopt
    except ImportError:
        print("geoopt is not installed and is left out (pip install geoopt==0.5.1)")
    else:
        found["geoopt"] = geoopt_sphere(geoopt, make())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compiled", action="store_true", help="also time compile=True")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.sets.split(","):
        shapes = SETS[name]()
        numbers = sum(torch.Size(shape).numel() for shape in shapes)
        print(f"\n{name}: {len(shapes)} tensors, {numbers / 1e6:.1f} million numbers", flush=True)
        times = interleave(
            contenders(lambda shapes=shapes: weights(shapes, options.device), options.compiled), options.rounds
        )
        for key in ("SGDG ortho", "AdamG ortho", "SGDG ortho, bf16"):
            times[key] = [seconds / EVERY for seconds in times[key]]
        relative = ratios(times, "SGD foreach")
        geoopt = ratios(times, "SGDG").get("geoopt")
        adam = statistics.median(a / b for a, b in zip(times["AdamG"], times["SGDG"], strict=True))
        for key, own in times.items():
            row = {"set": name, "optimizer": key, "median ms": 1e3 * statistics.median(own), "ratio": relative[key]}
            rows.append(row)
            print(f"  {key:24s} {row['median ms']:8.2f} ms   {row['ratio']:6.2f} x SGD foreach", flush=True)
        faster = "" if geoopt is None else f"; SGDG is {geoopt:.1f} times faster than geoopt"
        print(f"  AdamG / SGDG {adam:.2f}{faster}")
        rows.append({"set": name, "AdamG / SGDG": adam, "geoopt / SGDG": geoopt})
    if options.out:
        save(options.out, "optimizers", rows, numbers="float32", threads=options.threads)


if __name__ == "__main__":
    main()
