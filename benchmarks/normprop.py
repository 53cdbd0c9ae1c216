"""Normalization Propagation against nn.BatchNorm2d: training steps of the paper's NIN, and inference after folding.

    python -m benchmarks.normprop [--rounds 5] [--batch 16] [--width 192] [--out results/bench_normprop.json]
                                  [--only eager,compiled,inference]

Rows: network, memory format, eager or compiled, median ratio to the network with nn.BatchNorm2d of the same round; for
inference to the same network without any normalization.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.timing import interleave, ratios, save
from flexnorm.lab.models import build
from flexnorm.nn.normprop import register_unit_norm
from flexnorm.surgery import fold

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BASE, NONE = "nn.BatchNorm2d", "none"


def network(norm: str, width: int) -> nn.Module:
    return build("nin", norm=nn.BatchNorm2d if norm == BASE else norm, width=width)


def steps(rounds: int, batch: int, width: int, compiled: bool) -> list[dict[str, object]]:
    """Forward, backward and update; with Normalization Propagation the filters go back to unit norm, too."""
    rows: list[dict[str, object]] = []
    y = torch.randint(10, (batch,), device=DEVICE)
    for name, memory_format in FORMATS.items():
        x = torch.randn(batch, 3, 32, 32, device=DEVICE).to(memory_format=memory_format)
        calls: dict[str, Callable[[], object]] = {}
        for norm in (BASE, "normprop", NONE):
            torch._dynamo.reset()
            net = network(norm, width).to(DEVICE, memory_format=memory_format)
            model = torch.compile(net) if compiled else net
            optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
            if norm == "normprop":
                register_unit_norm(optimizer, net)

            def step(model=model, optimizer=optimizer, x=x) -> None:  # type: ignore[no-untyped-def]
                loss = nn.functional.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

            calls[norm] = step
            step()
        rows += _rows(interleave(calls, rounds, warmup=1), BASE, "compiled" if compiled else "eager", name, "step")
    return rows


def inference(rounds: int, batch: int, width: int) -> list[dict[str, object]]:
    """The folded network against the plain one."""
    rows: list[dict[str, object]] = []
    for name, memory_format in FORMATS.items():
        x = torch.randn(batch, 3, 32, 32, device=DEVICE).to(memory_format=memory_format)
        calls: dict[str, Callable[[], object]] = {}
        for label, net in (("folded", fold(network("normprop", width).eval())), (NONE, network(NONE, width).eval())):
            model = net.to(DEVICE, memory_format=memory_format)

            def call(model=model, x=x) -> None:  # type: ignore[no-untyped-def]
                with torch.no_grad():
                    model(x)

            calls[label] = call
        rows += _rows(interleave(calls, rounds, warmup=1), NONE, "eager", name, "inference")
    return rows


def _rows(times: dict[str, list[float]], base: str, mode: str, layout: str, what: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for key, ratio in ratios(times, base).items():
        milliseconds = round(1e3 * min(times[key]), 2)
        row: dict[str, object] = {"layer": key, "what": what, "format": layout, "mode": mode, "baseline": base}
        rows.append({**row, "ratio": round(ratio, 3), "min_ms": milliseconds})
        print(f"{what:10s} {key:16s} {layout:14s} {mode:9s} {ratio:6.3f}  {milliseconds} ms")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--out", type=Path, default=Path("results/bench_normprop.json"))
    parser.add_argument("--only", default="eager,compiled,inference")
    options = parser.parse_args()
    sizes, wanted = (options.rounds, options.batch, options.width), options.only.split(",")
    rows: list[dict[str, object]] = []
    if "eager" in wanted:
        rows += steps(*sizes, compiled=False)
    if "inference" in wanted:
        rows += inference(4 * sizes[0], *sizes[1:])
    if "compiled" in wanted:
        rows += steps(*sizes, compiled=True)
    save(options.out, "normprop", rows, baseline=BASE, network="nin", batch=options.batch, width=options.width)


if __name__ == "__main__":
    main()
