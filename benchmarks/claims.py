"""The claims of Huang & Yu (CVPR 2020, arXiv 2001.02814) about internal covariate shift, tested on CIFAR-10.

    python -m benchmarks.claims width noise training --data path/to/cifar10.npz

* ``width``: is BatchNorm's bound on the shift of d outputs, sqrt(d), and the unitized layer's, which knows no d, also
  how far the outputs really move? One hidden layer of d = 16 ... 1024 units.
* ``noise``: the moments that a layer standardizes with get noise that is drawn anew at every step.
* ``training``: the recipe ``shift_cifar10``: the shift of every layer of a plain network, five normalizations.

Every row is written to ``results/claims_*.json`` as soon as it is there, and the same command goes on where an
interrupted one ended.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexnorm.lab.data import ImageData, load
from flexnorm.lab.replicates import mean
from flexnorm.lab.run import environment
from flexnorm.nn import make_norm
from flexnorm.shift import ShiftMonitor, layer_bound

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]

SETTINGS = {"images": 5000, "pixels": "2x2 averaged", "steps": 200, "batch": 128, "lr": 0.05, "momentum": 0.9}
WIDTHS = (16, 32, 64, 128, 256, 512, 1024)
LEVELS = (0.0, 0.03, 0.1, 0.3, 1.0)
NOISY_WIDTH = 64
CONTENDERS: dict[str, Callable[[int], nn.Module]] = {
    "batch": lambda d: make_norm("batch", d, ndim=0),
    "unitized": lambda d: unitized(d, "paper"),
    "unitized, rms": lambda d: unitized(d, "rms"),
}
SEEDS = (0, 1, 2)


def unitized(width: int, norm: str) -> nn.Module:
    """A unitized layer that is fully unitized from the start (alpha = 1), and free to change that."""
    layer = make_norm("unitized", width, ndim=0, unit_norm=norm)
    nn.init.ones_(layer.alpha)
    return layer


class Noisy(nn.Module):
    """BatchNorm or unitized BatchNorm of (N, C) input with wrong moments: mean + offset * std, var * exp(factor).

    Offset and factor stay as they are until :meth:`renew`, so that one measurement sees the noise of its step.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("offset", torch.zeros(norm.num_features))
        self.register_buffer("factor", torch.zeros(norm.num_features))

    def renew(self, level: float, generator: torch.Generator) -> None:
        """Draw the noise of the next step."""
        for buffer in (self.offset, self.factor):
            buffer.copy_(level * torch.randn(buffer.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, 0, correction=0)
        xhat = (x - mean - self.offset * var.sqrt()) / (var * self.factor.exp() + self.norm.eps).sqrt()
        alpha = getattr(self.norm, "alpha", None)
        if alpha is not None:
            square = xhat.square().sum(1) if self.norm.unit_norm == "paper" else xhat.square().mean(1)
            xhat = xhat * (alpha / (square + self.norm.eps).sqrt()[:, None] + 1 - alpha)
        return self.norm.weight * xhat + self.norm.bias

    @property
    def noise(self) -> Tensor:
        """n = E xhat^2 - 1 of every channel."""
        return (1 + self.offset.square()) * (-self.factor).exp() - 1


def watch(norm: nn.Module, data: ImageData, seed: int, level: float) -> Row:
    """Train a network with one hidden layer; measure the layer's output before and after every tenth update."""
    layer = Noisy(norm)
    width = norm.num_features
    torch.manual_seed(seed)
    x, test = (F.avg_pool2d(images, 2).flatten(1) for images in (data.x_train, data.x_test[:128]))
    model = nn.Sequential(nn.Linear(x.shape[1], width), layer, nn.ReLU(), nn.Linear(width, data.num_classes))
    optimizer = torch.optim.SGD(model.parameters(), SETTINGS["lr"], momentum=SETTINGS["momentum"])
    generator = torch.Generator().manual_seed(seed)
    layer.renew(level, generator)
    start = copy.deepcopy(layer)
    bounds: dict[str, list[float]] = {"previous": [], "initial": []}
    losses: list[float] = []
    with ShiftMonitor(model, test, lambda _, module: module is layer, every=10, anchor="both") as monitor:
        for _ in range(SETTINGS["steps"]):
            chosen = torch.randint(len(x), (SETTINGS["batch"],), generator=generator)
            loss = F.cross_entropy(model(x[chosen]), data.y_train[chosen])
            optimizer.zero_grad()
            loss.backward()
            before = copy.deepcopy(layer)
            optimizer.step()
            layer.renew(level, generator)
            losses.append(float(loss.detach()))
            for record in monitor.step():
                old = before if record.anchor == "previous" else start
                bound = layer_bound(old.norm, layer.norm, noise=old.noise.double(), noise_after=layer.noise.double())
                if not record.lower <= record.w1 <= min(record.upper, bound):
                    raise AssertionError(f"the bounds do not hold: {record}, {bound}")
                bounds[record.anchor].append(bound)
    row: Row = {"loss": mean(losses[-20:]), "noise": float(layer.noise.mean())}
    for kind, prefix in (("previous", ""), ("initial", "start_")):
        records = [record for record in monitor.records if record.anchor == kind]
        chosen_records = records if kind == "previous" else records[-1:]
        for name in ("lower", "w1", "upper", "spread", "relative"):
            row[prefix + name] = mean([getattr(record, name) for record in chosen_records])
        row[prefix + "bound"] = mean(bounds[kind] if kind == "previous" else bounds[kind][-1:])
    if (alpha := getattr(norm, "alpha", None)) is not None:
        row["alpha"] = [float(alpha.detach().min()), float(alpha.detach().max())]
    return row


def width_cells() -> Iterator[tuple[Row, float]]:
    """Widths, contenders and seeds of the first claim."""
    for d in WIDTHS:
        for norm in CONTENDERS:
            for seed in SEEDS:
                yield {"norm": norm, "width": d, "seed": seed}, 0.0


def noise_cells() -> Iterator[tuple[Row, float]]:
    """Levels of noise, contenders and seeds of the second claim."""
    for level in LEVELS:
        for norm in CONTENDERS:
            for seed in SEEDS:
                yield {"norm": norm, "width": NOISY_WIDTH, "level": level, "seed": seed}, level


def grid(claim: str, data: Callable[[], ImageData], spec: str) -> None:
    """Fill in the rows of a claim that are not there yet."""
    cells = list({"width": width_cells, "noise": noise_cells}[claim]())
    path = ROOT / "results" / f"claims_{claim}.json"
    result = read(path, {"settings": SETTINGS})
    key, numbers = ("width", WIDTHS) if claim == "width" else ("level", LEVELS)
    for cell, level in cells:
        if any(all(row[k] == v for k, v in cell.items()) for row in result["rows"]):
            continue
        began = time.perf_counter()
        row = watch(CONTENDERS[cell["norm"]](cell["width"]), data(), cell["seed"], level)
        result["rows"].append(cell | row)
        result["seconds"] = result.get("seconds", 0.0) + time.perf_counter() - began
        result["table"] = table(result["rows"], key, numbers)
        write(path, claim, spec, result)
        print(f"{claim}: {cell} W1 {row['w1']:.4f} bound {row['bound']:.2f} relative {row['relative']:.4f}", flush=True)
    if claim == "width":
        result["slopes"] = slopes(result["table"])
        write(path, claim, spec, result)


def table(rows: list[Row], key: str, numbers: tuple[float, ...]) -> list[Row]:
    """Means over seeds."""
    found = []
    for norm in CONTENDERS:
        for value in numbers:
            own = [row for row in rows if row["norm"] == norm and row[key] == value]
            if own:
                names = [name for name, v in own[0].items() if isinstance(v, float) and name != key]
                means = {name: mean([row[name] for row in own]) for name in names}
                found.append({"norm": norm, key: value, "seeds": len(own), **means})
    return found


def slopes(rows: list[Row]) -> dict[str, Row]:
    """Exponent e of value ~ width ** e, by least squares in logarithms; sqrt(d) is 0.5."""
    found: dict[str, Row] = {}
    for norm in CONTENDERS:
        own = [row for row in rows if row["norm"] == norm]
        x = [math.log(row["width"]) for row in own]
        found[norm] = {
            name: statistics.linear_regression(x, [math.log(row[name]) for row in own]).slope
            for name in ("bound", "w1", "relative", "start_w1", "start_relative")
        }
    return found


def training(spec: str) -> None:
    """Run the recipe, and put together the shift per layer."""
    from flexnorm.lab.files import read_rows
    from flexnorm.lab.run import Config, compare, load_config

    values = {**load_config(ROOT / "recipes" / "shift_cifar10.yaml", "small"), "data": spec}
    folder = ROOT / "runs" / "shift_cifar10-small"
    results = compare(Config.from_dict(values), folder, command="")
    rows: list[Row] = []
    for norm in values["norms"]:
        runs = [run for run in results.of(norm) if run.complete]
        measured = [read_rows(folder / run.path / "shift.csv") for run in runs]
        layers = list(dict.fromkeys(record["layer"] for record in measured[0])) if measured else []
        for number, layer in enumerate(layers, 1):
            row: Row = {"norm": norm, "depth": number, "layer": layer, "seeds": len(runs)}
            records = [record for run in measured for record in run if record["layer"] == layer]
            last = max(int(record["step"]) for record in records)
            for name in ("lower", "w1", "upper", "spread", "relative"):
                row[name] = mean([float(record[name]) for record in records])
            for part, chosen in (
                ("first_quarter", [r for r in records if 4 * int(r["step"]) <= last]),
                ("last_quarter", [r for r in records if 4 * int(r["step"]) > 3 * last]),
            ):
                for name in ("w1", "relative"):
                    row[f"{name}_{part}"] = mean([float(r[name]) for r in chosen])
            rows.append(row)
    accuracy = {cell.norm: cell.test_accuracy.asdict() for cell in results.cells}
    config = {**results.config, "data": Path(spec).name}
    result = {"rows": rows, "test_accuracy": accuracy, "config": config, "seconds": results.total_seconds}
    result["alpha"] = alphas(folder)
    write(ROOT / "results" / "claims_training.json", "training", spec, result)


def alphas(folder: Path) -> dict[str, list[float]]:
    """Smallest and largest alpha of each unitized layer after the training, over all seeds."""
    from safetensors.torch import load_file

    found: dict[str, list[float]] = {}
    for path in sorted(folder.glob("runs/unitized/sgd/*/model.safetensors")):
        for name, value in load_file(path).items():
            if name.endswith("alpha"):
                low, high = found.get(name, [math.inf, -math.inf])
                found[name] = [min(low, float(value.min())), max(high, float(value.max()))]
    return found


def read(path: Path, fresh: Row) -> Row:
    """The rows so far, if they were made with the same settings."""
    if path.exists():
        found: Row = json.loads(path.read_text(encoding="utf-8"))
        if found.get("settings") == fresh["settings"]:
            return found
    return {**fresh, "rows": []}


def write(path: Path, claim: str, spec: str, result: Row) -> None:
    """Replace the file in one step."""
    head = {
        "claim": claim,
        "command": f"python -m benchmarks.claims {claim} --data {Path(spec).name}",
        "environment": environment.describe(torch.device("cpu")),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({**head, **{k: v for k, v in result.items() if k not in head}}, indent=1) + "\n")
    part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="+", choices=("width", "noise", "training"))
    parser.add_argument("--data", default="cifar10.npz")
    options = parser.parse_args()
    loaded: list[ImageData] = []

    def data() -> ImageData:
        if not loaded:
            loaded.append(load(options.data, limit=SETTINGS["images"]))
        return loaded[0]

    for claim in options.claims:
        if claim == "training":
            training(options.data)
        else:
            grid(claim, data, options.data)


if __name__ == "__main__":
    main()
