"""Normalization layers beside torch's layers and the plain composition: time and memory, on every layout, as ratios.

    python -m benchmarks.norms                               # all parts, one after the other: about ten minutes
    python -m benchmarks.norms --parts table,small           # the layers alone: two minutes
    python -m benchmarks.norms --device cuda                 # its own table, under four minutes
    python -m benchmarks.norms --parts table --split         # also forward and backward apart
    python -m benchmarks.norms --device cuda --dry-run cpu   # does the script run? Few rows, one round, nothing kept

A case is one line of the tables below: input, layer, what it is measured beside, and the ratio that it is to reach.
All contenders of one input run interleaved in one process; each layer is also timed beside its plain composition, which
has to give the same values and gradients. A ratio is the median over rounds of the layer's time over the peer's in the
same round, forward and backward, float32 unless the row says something else; of networks, one step of training. Each
part replaces its own rows in results/bench_norms.json (bench_norms_cuda.json).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks import networks
from benchmarks.compositions import NODES, Place
from benchmarks.layers import FLOAT32, LAYERS, PLAIN
from benchmarks.timing import allocations, interleave, save_part

Row = dict[str, Any]
C = TypeVar("C", "Case", "Training")

# --- The tables. A case is one line.


@dataclass(frozen=True)
class Case:
    """A layer beside a peer on one input; ``target`` is the largest ratio aimed at, None where none is set.

    Two axes are features (N, C), three are tokens (B, T, C), four are images (N, C, H, W) in ``format``. A name after
    "compiled" goes through torch.compile.
    """

    shape: tuple[int, ...]
    layer: str
    peer: str
    target: float | None = None
    format: str = "contiguous"
    dtype: torch.dtype = torch.float32

    @property
    def place(self) -> Place:
        return Place(self.shape, -1 if len(self.shape) == 3 else 1)

    @property
    def input(self) -> Row:
        """What the contenders of one input share."""
        layout = {2: "features", 3: "tokens", 4: "images"}[len(self.shape)]
        if self.format == LAST:
            layout += ", channels last"
        shape, dtype = "x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")
        return {"input": shape, "layout": layout, "dtype": dtype}


@dataclass(frozen=True)
class Training:
    """A step of training of a network with a layer, beside the same network with the peer in all its places."""

    network: str
    layer: str
    peer: str
    target: float | None = 1.0

    @property
    def input(self) -> Row:
        return {"input": self.network}


NETWORKS: dict[str, Callable[[networks.Norm, str], networks.Network]] = {
    "perceptron on digits": networks.mlp,
    "graph network": networks.gnn,
    "ViT of 6 layers": networks.vit,
    "ResNet-20": networks.resnet20,
    "ResNet-20 channels last": partial(networks.resnet20, memory_format=torch.channels_last),
    "ResNet-50, bfloat16, channels last": networks.resnet50,
    "language model, bfloat16": networks.transformer,
}
SMALL_NETWORKS = {
    "ResNet-50, bfloat16, channels last": partial(networks.resnet50, batch=2, size=64),
    "language model, bfloat16": partial(networks.transformer, batch=2, length=16, width=128),
}
LAST, BF16 = "channels_last", torch.bfloat16
IMAGES = ((64, 64, 32, 32), (64, 128, 16, 16), (64, 256, 8, 8))
TOKENS = (16, 197, 384)

TABLE = [
    Case((4096, 512), "batch", "nn.BatchNorm", 0.9),
    Case((256, 64), "batch", "nn.BatchNorm", 1.3),
    Case((64, 1024), "batch", "nn.BatchNorm", 1.2),
    Case((4096, 512), "unitized", "nn.BatchNorm", 1.5),
    Case((64, 1024), "unitized", "nn.BatchNorm", 2.0),
    Case((4096, 512), "population", "nn.BatchNorm", 0.8),
    Case((64, 1024), "population", "nn.BatchNorm", 1.2),
    Case(TOKENS, "layer", "nn.LayerNorm", 1.1),
    Case(TOKENS, "rms", "nn.RMSNorm", 0.35),
    Case(TOKENS, "rms", "language models' RMSNorm", 0.35),
    Case((16, 96, 28, 28), "layer at each position", "timm's LayerNorm2d", 0.3),
    Case((64, 128, 16, 16), "batch", "nn.BatchNorm", 0.85, LAST),
    Case((64, 128, 16, 16), "unitized", "nn.BatchNorm", 0.85, LAST),
    Case((64, 256, 8, 8), "batch", "nn.BatchNorm", 0.85, LAST),
    Case((64, 256, 8, 8), "unitized", "nn.BatchNorm", 0.85, LAST),
]
SMALL = [
    Case((32, 16), "batch", "nn.BatchNorm", 1.3),
    Case((32, 16), "layer", "nn.LayerNorm", 1.3),
    Case((32, 16), "rms", "nn.RMSNorm", 1.3),
    Case((32, 16), "population", "nn.BatchNorm", 1.3),
    Case((64, 16, 8, 8), "batch", "nn.BatchNorm", 1.3),
    Case((64, 16, 8, 8), "layer", "nn.GroupNorm(1)", 1.3),
    Case((64, 16, 8, 8), "rms", "nn.RMSNorm over C, H, W", 1.3),
    Case((64, 16, 8, 8), "population", "nn.BatchNorm", 1.3),
    Case((8, 32, 384), "batch", "nn.BatchNorm", 1.3),
    Case((8, 32, 384), "layer", "nn.LayerNorm", 1.3),
    Case((8, 32, 384), "rms", "nn.RMSNorm", 1.3),
    Case((8, 32, 384), "population", "nn.BatchNorm", 1.3),
]
USERS = [
    Case((64, 64, 32, 32), "user's batch", "batch", 1.15),
    Case((64, 64, 32, 32), "user's unitized", "unitized", 1.15),
    Case((64, 64, 32, 32), "user's unitized", "unitized", 1.15, LAST),
    Case((64, 64, 32, 32), "user's layer", "layer", 1.15),
    Case((4096, 512), "user's batch", "batch", 1.15),
    Case((4096, 512), "user's unitized", "unitized", 1.15),
    Case((4096, 512), "user's layer", "layer", 1.15),
    Case(TOKENS, "user's batch", "batch", 1.15),
    Case(TOKENS, "user's layer", "layer", 1.15),
    Case(TOKENS, "user's rms", "rms", 1.15),
]
OTHERS = [  # no goal is set for these
    *(
        Case(shape, layer, "nn.BatchNorm", None, layout)
        for shape in IMAGES
        for layout in ("contiguous", LAST)
        for layer in ("batch", "unitized", "population", "population (estimated)", "user's mixed", "nn.GroupNorm(32)")
    ),
    *(
        Case(shape, layer, peer, None, layout)
        for shape in IMAGES
        for layout in ("contiguous", LAST)
        for layer, peer in (
            ("group(32)", "nn.GroupNorm(32)"),
            ("layer", "nn.GroupNorm(1)"),
            ("instance", "nn.InstanceNorm"),
        )
    ),
    Case((256, 512), "batch", "nn.BatchNorm"),
    Case((4096, 512), "layer", "nn.LayerNorm"),
    Case((4096, 512), "user's mixed", "nn.BatchNorm"),
    Case(TOKENS, "batch", "nn.BatchNorm"),
    Case(TOKENS, "unitized", "nn.BatchNorm"),
    Case(TOKENS, "population", "nn.BatchNorm"),
    Case(TOKENS, "user's mixed", "nn.BatchNorm"),
    Case(TOKENS, "batch, masked", "plain"),
    Case((4096, 128), "layer of each graph", "plain"),
    Case((4096, 128), "instance of each graph", "plain"),
]
COMPILED = [
    *(
        Case(IMAGES[1], f"compiled {layer}", peer, None, layout)
        for layout in ("contiguous", LAST)
        for layer in ("batch", "unitized", "population", "user's mixed")
        for peer in ("nn.BatchNorm", "compiled nn.BatchNorm")
    ),
    Case((4096, 512), "compiled batch", "compiled nn.BatchNorm"),
    Case(TOKENS, "compiled layer", "compiled nn.LayerNorm"),
    Case(TOKENS, "compiled rms", "compiled nn.RMSNorm"),
    Case((16, 96, 28, 28), "compiled layer at each position", "compiled timm's LayerNorm2d"),
]
TRAINING = [
    Training("perceptron on digits", "batch", "nn.BatchNorm"),
    Training("perceptron on digits", "unitized", "nn.BatchNorm", None),
    Training("perceptron on digits", "population", "nn.BatchNorm", None),
    Training("graph network", "batch", "nn.BatchNorm"),
    Training("graph network", "layer", "nn.LayerNorm"),
    Training("ViT of 6 layers", "layer", "nn.LayerNorm"),
    Training("ViT of 6 layers", "rms", "nn.RMSNorm"),
    Training("ViT of 6 layers", "rms", "language models' RMSNorm"),
]
TRAINING_IMAGES = [  # no goal is set for these
    *(
        Training(network, layer, "nn.BatchNorm", None)
        for network in ("ResNet-20", "ResNet-20 channels last")
        for layer in ("batch", "unitized", "population")
    ),
]
TRAINING_COMPILED = [
    Training("perceptron on digits", "compiled batch", "compiled nn.BatchNorm"),
    Training("graph network", "compiled batch", "compiled nn.BatchNorm"),
    Training("graph network", "compiled layer", "compiled nn.LayerNorm"),
    Training("ViT of 6 layers", "compiled layer", "compiled nn.LayerNorm"),
    Training("ViT of 6 layers", "compiled rms", "compiled nn.RMSNorm"),
]
KEPT = [
    *(Case((4096, 512), layer, "nn.BatchNorm") for layer in ("batch", "unitized", "population")),
    *(Case(TOKENS, layer, "nn.BatchNorm") for layer in ("batch", "unitized", "population")),
    Case(TOKENS, "layer", "nn.LayerNorm"),
    Case(TOKENS, "rms", "nn.RMSNorm"),
    Case((16, 96, 28, 28), "layer at each position", "timm's LayerNorm2d"),
    *(
        Case((64, 128, 16, 16), layer, peer, None, layout)
        for layout in ("contiguous", LAST)
        for layer, peer in (
            ("batch", "nn.BatchNorm"),
            ("unitized", "nn.BatchNorm"),
            ("population", "nn.BatchNorm"),
            ("layer", "nn.GroupNorm(1)"),
            ("group(32)", "nn.GroupNorm(32)"),
        )
    ),
    Case(TOKENS, "batch, masked", "plain"),
    Case((4096, 128), "layer of each graph", "plain"),
]
PEAKS = [
    Training("perceptron on digits", "batch", "nn.BatchNorm", 1.02),
    Training("graph network", "layer", "nn.LayerNorm", 1.02),
    Training("ViT of 6 layers", "layer", "nn.LayerNorm", 1.02),
    Training("ViT of 6 layers", "rms", "nn.RMSNorm", 1.02),
    *(Training("ResNet-20", layer, "nn.BatchNorm", 1.02) for layer in ("batch", "unitized", "population")),
]

WORDS = (4, 2048, 4096)
GPU_LAYERS = [
    *(
        Case(shape, layer, "nn.BatchNorm", target, layout, dtype)
        for dtype in (torch.float32, BF16)
        for shape in ((128, 64, 112, 112), (128, 256, 28, 28), (128, 2048, 7, 7))
        for layout, target in (("contiguous", 1.0), (LAST, 1.1))
        for layer in ("batch", "unitized", "population")
    ),
    Case((128, 256, 28, 28), "group(32)", "nn.GroupNorm(32)", None, "contiguous", torch.float32),
    Case((128, 256, 28, 28), "group(32)", "nn.GroupNorm(32)", None, LAST, torch.float32),
    Case((128, 256, 28, 28), "layer at each position", "timm's LayerNorm2d", None, "contiguous", torch.float32),
    Case((65536, 512), "batch", "nn.BatchNorm"),
    Case((65536, 512), "unitized", "nn.BatchNorm"),
    *(
        Case(WORDS, layer, peer, target, dtype=dtype)
        for dtype in (torch.float32, BF16)
        for layer, peer, target in (
            ("rms", "nn.RMSNorm", 1.0),
            ("rms", "language models' RMSNorm", None),
            ("rms", "Liger's RMSNorm", None),
            ("layer", "nn.LayerNorm", None),
            ("user's rms", "rms", 1.15),
        )
    ),
]
GPU_TRAINING = [
    Training("ResNet-50, bfloat16, channels last", "batch", "nn.BatchNorm"),
    Training("ResNet-50, bfloat16, channels last", "unitized", "nn.BatchNorm", None),
    Training("language model, bfloat16", "rms", "nn.RMSNorm"),
    Training("language model, bfloat16", "layer", "nn.LayerNorm"),
]
GPU_TRAINING_COMPILED = [
    Training("language model, bfloat16", "compiled rms", "compiled nn.RMSNorm"),
    Training("ResNet-50, bfloat16, channels last", "compiled batch", "compiled nn.BatchNorm"),
]


# --- The measurements.


@dataclass(frozen=True)
class Run:
    """Where and how long to measure: rounds, and the least seconds of a measurement."""

    device: str
    rounds: int
    least: float = 2e-3
    split: bool = False


class Contender:
    """A layer on an input: forward and backward in one call."""

    def __init__(self, name: str, case: Case, x: Tensor, g: Tensor) -> None:
        make = PLAIN[case.layer] if name == f"plain {case.layer}" else LAYERS[name.removeprefix("compiled ")]
        layer = make(case.place).to(x.device)
        self.layer = layer if name.removeprefix("compiled ") in FLOAT32 else layer.to(x.dtype)
        self.parameters = dict(self.layer.named_parameters())
        if name.startswith("compiled"):
            self.layer = torch.compile(self.layer)  # type: ignore[assignment]
        self.x, self.g = x, g

    def forward(self) -> Tensor:
        return self.layer(self.x)

    def __call__(self) -> dict[str, Tensor]:
        y = self.forward()
        grads = torch.autograd.grad(y, [self.x, *self.parameters.values()], self.g)
        return {"output": y, **dict(zip(["input", *self.parameters], grads, strict=True))}


def contenders(cases: Sequence[Case], device: str) -> dict[str, Contender]:
    """All that run on one input, by name; the plain compositions too, with which the layers have to agree."""
    torch.manual_seed(0)
    first = cases[0]
    memory_format = getattr(torch, f"{first.format}_format" if first.format == "contiguous" else first.format)
    x, g = (
        torch.randn(first.shape, device=device).add_(shift).to(first.dtype, memory_format=memory_format)
        for shift in (0.5, 0.0)
    )
    x.requires_grad_()
    found: dict[str, Contender] = {}
    torch._dynamo.reset()
    for case in cases:
        name = case.layer
        if name not in found:
            found[name] = Contender(name, case, x, g)
            if name in PLAIN:
                composition = found[f"plain {name}"] = Contender(f"plain {name}", case, x, g)
                agree(f"{name} on {case.input}", found[name](), composition())
        if case.peer != "plain" and case.peer not in found:
            found[case.peer] = Contender(case.peer, case, x, g)
    return found


def agree(what: str, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Raise unless both gave the same values and gradients, up to the precision of the input's type."""
    close = 2e-4 if one["output"].dtype == torch.float32 else 5e-2
    for key in one.keys() & other.keys():
        a, b = (values[key].detach().float() for values in (one, other))
        worst = float((a - b).abs().max() / b.abs().max().clamp(min=1e-3))
        if not worst < close:
            raise AssertionError(f"{what}: {key} differs by {worst:.1e} from the plain composition")


def together(cases: Iterable[C]) -> list[list[C]]:
    """Cases of one input, in the order in which inputs first occur."""
    groups: dict[str, list[C]] = {}
    for case in cases:
        groups.setdefault(json.dumps(case.input), []).append(case)
    return list(groups.values())


def compared(case: Case | Training, times: Mapping[str, Sequence[float]]) -> Row:
    """The row of a case."""
    quotients = [a / b for a, b in zip(times[case.layer], times[peer_of(case)], strict=True)]
    low, ratio, high = statistics.quantiles(quotients, n=4) if len(quotients) > 1 else quotients * 3
    return {
        **case.input,
        "layer": case.layer,
        "peer": case.peer,
        "ratio": round(ratio, 3),
        "quartiles": [round(low, 3), round(high, 3)],
        **judged(ratio, case.target),
        "ms": round(1e3 * statistics.median(times[case.layer]), 4),
        "peer ms": round(1e3 * statistics.median(times[peer_of(case)]), 4),
    }


def judged(ratio: float, target: float | None) -> Row:
    return {"target": target, "met": None if target is None else ratio <= target}


def peer_of(case: Case | Training) -> str:
    return f"plain {case.layer}" if case.peer == "plain" else case.peer


def timed(cases: Sequence[Case], run: Run) -> Iterator[Row]:
    """Forward and backward of layers beside their peers; then each beside its plain composition.

    Apart from the others, because a composition allocates so much that whoever comes next finds caches and pages gone.
    """
    for group in together(cases):
        found = contenders(group, run.device)
        times = interleave({n: c for n, c in found.items() if not n.startswith("plain ")}, run.rounds, least=run.least)
        for case in group:
            if case.peer != "plain":
                yield compared(case, times)
        for case in dict.fromkeys(replace(case, peer="plain", target=None) for case in group):
            if (name := peer_of(case)) in found:
                both = {case.layer: found[case.layer], name: found[name]}
                yield compared(case, interleave(both, max(2, run.rounds // 4), least=run.least))
        if run.split:
            forwards = interleave({name: found[name].forward for name in times}, run.rounds, least=run.least)
            for name, own in forwards.items():
                forward, total = (1e6 * statistics.median(t) for t in (own, times[name]))
                print(f"    {name:32s} forward {forward:9.1f} us   backward {total - forward:9.1f} us")


def kept(cases: Sequence[Case], run: Run) -> Iterator[Row]:
    """Bytes that a layer keeps for its backward besides input and output; the ratio is of the peaks of both ways."""
    for case in cases:
        found = contenders([case], run.device)
        (own, own_peak), (peer, peer_peak) = (held(found[name], run.device) for name in (case.layer, peer_of(case)))
        yield {
            **case.input,
            "layer": case.layer,
            "peer": case.peer,
            "ratio": round(own_peak / peer_peak, 4),
            **judged(own_peak / peer_peak, case.target),
            "bytes": own,
            "peer bytes": peer,
            "of the input": round(own / found[case.layer].x.nbytes, 5),
        }


def held(contender: Contender, device: str) -> tuple[int, int]:
    contender()
    _, after_forward = allocations(contender.forward, device)
    peak, _ = allocations(contender, device)
    return after_forward - contender.x.nbytes, peak


def steps(group: Sequence[Training], device: str) -> dict[str, Callable[[], Tensor]]:
    """A step of training with each layer of some cases of one network; the same seed gives them the same weights."""
    torch._dynamo.reset()
    found: dict[str, Callable[[], Tensor]] = {}
    for name in dict.fromkeys(name for case in group for name in (case.peer, case.layer)):
        torch.manual_seed(0)
        network, loss = NETWORKS[group[0].network](LAYERS[name.removeprefix("compiled ")], device)
        optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
        model = torch.compile(network) if name.startswith("compiled") else network

        def step(model: Any = model, optimizer: Any = optimizer, loss: Any = loss) -> Tensor:
            value: Tensor = loss(model)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            return value.detach()

        found[name] = step
    return found


def trained(cases: Sequence[Training], run: Run) -> Iterator[Row]:
    """Whole steps of training."""
    for group in together(cases):
        times = interleave(steps(group, run.device), run.rounds, least=run.least)
        for case in group:
            yield compared(case, times)


def peaks(cases: Sequence[Training], run: Run) -> Iterator[Row]:
    """The most memory that a step of training takes above what weights, momenta and data hold."""
    for group in together(cases):
        most = {}
        for name, step in steps(group, run.device).items():
            for _ in range(2):
                step()
            most[name] = allocations(step, run.device)[0]
        for case in group:
            ratio = most[case.layer] / most[case.peer]
            row = {**case.input, "layer": case.layer, "peer": case.peer, "ratio": round(ratio, 4)}
            yield {**row, **judged(ratio, case.target), "bytes": most[case.layer], "peer bytes": most[case.peer]}


# --- The command.

Measure = Callable[[Any, "Run"], Iterator[Row]]
PARTS: dict[str, dict[str, tuple[Measure, Sequence[Case | Training]]]] = {
    "cpu": {
        "table": (timed, TABLE),
        "small": (timed, SMALL),
        "users": (timed, USERS),
        "others": (timed, OTHERS),
        "kept": (kept, KEPT),
        "training": (trained, TRAINING),
        "training images": (trained, TRAINING_IMAGES),
        "peaks": (peaks, PEAKS),
        "compiled": (timed, COMPILED),
        "training compiled": (trained, TRAINING_COMPILED),
    },
    "cuda": {
        "layers": (timed, GPU_LAYERS),
        "kept": (kept, KEPT),
        "small": (timed, SMALL),
        "training": (trained, GPU_TRAINING),
        "training compiled": (trained, GPU_TRAINING_COMPILED),
    },
}


def available(case: Case | Training) -> bool:
    if case.peer == "Liger's RMSNorm" and find_spec("liger_kernel") is None:
        print("liger-kernel is not installed: left out beside it")
        return False
    return True


def table(row: Row) -> str:
    """A row as a line of the printed table."""
    where = " ".join(str(row[key]) for key in ("input", "layout", "dtype") if key in row).replace(" float32", "")
    goal = "" if row["target"] is None else f"<= {row['target']:<5} {'met' if row['met'] else 'MISSED'}"
    cells = f"{where:38s} {row['layer']:24s} / {row['peer']:28s} {row['ratio']:7.3f} {goal:14s}"
    if "ms" in row:
        return f"{cells} {row['ms']:9.3f} ms {row['peer ms']:9.3f} ms"
    return f"{cells} {row['bytes']:12,d} bytes {row['peer bytes']:12,d} bytes"


def fewer(case: Case | Training) -> Case | Training:
    """A case with few rows."""
    if isinstance(case, Training):
        return case
    rows = {2: 2 * NODES, 3: 2, 4: 4}[len(case.shape)]
    return replace(case, shape=(rows, *case.shape[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=list(PARTS))
    parser.add_argument("--parts", help="comma-separated; default: all of the device")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--layer", help="only cases of this layer")
    parser.add_argument("--split", action="store_true", help="also print forward and backward of every contender")
    parser.add_argument("--dry-run", metavar="DEVICE", help="few rows of each, on this device; saves nothing")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    parts = PARTS[options.device]
    run = Run(options.device, options.rounds, split=options.split)
    if options.dry_run:
        run = Run(options.dry_run, rounds=2, least=0.0, split=options.split)
        NETWORKS.update(SMALL_NETWORKS)
    torch.backends.cudnn.benchmark = True
    for name in options.parts.split(",") if options.parts else parts:
        measure, cases = parts[name]
        chosen = [case for case in cases if available(case) and options.layer in (None, case.layer)]
        print(f"\n== {name}", flush=True)
        begin, rows = time.perf_counter(), []
        for row in measure([fewer(case) for case in chosen] if options.dry_run else chosen, run):
            rows.append(row)
            print(table(row), flush=True)
        seconds = time.perf_counter() - begin
        missed = sum(row["met"] is False for row in rows)
        print(f"{len(rows)} rows, {missed} goals missed, {seconds:.0f} s")
        if not options.dry_run and not options.layer:
            where = options.out or Path(f"results/bench_norms{'_cuda' if options.device == 'cuda' else ''}.json")
            save_part(where, "norms", name, rows, options.device, seconds=round(seconds))


if __name__ == "__main__":
    main()
