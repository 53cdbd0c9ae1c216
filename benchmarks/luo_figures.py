"""Fig. 2 of Luo et al. (ICLR 2019) from trainings of our own: one command per figure.

    python -m benchmarks.luo_figures 2e --data cifar10.npz --scale small
    python -m benchmarks.luo_figures 2a 2b 2c 2d 2e 2f --data cifar10.npz

Writes ``results/luo_2e.json`` (``--out``) and ``docs/theory/figure-2e.svg`` (``--plot``). The trainings are those of
`benchmarks.luo_runs`, kept in ``runs/luo``; figures share them, what is complete is not repeated, and an interrupted
command goes on where it was. Fig. 1 needs no training: ``flexnorm theory generalization``.

2a, 2b: population normalization with gamma decay against BatchNorm, losses and accuracy. 2c, 2d: the parts of
BatchNorm, training and test loss. 2e: BatchNorm at a single layer, gamma^2 and test loss against the batch size. 2f:
what dropout gives back at batch size 1024, and to weight normalization.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch.nn import functional as F

from benchmarks.luo_runs import POOLING, configs
from flexnorm.lab.data import ImageData, load
from flexnorm.lab.figures import Curve, Figure, plot
from flexnorm.lab.files import read_json, read_rows
from flexnorm.lab.records import Study
from flexnorm.lab.replicates import Replicates, mean
from flexnorm.lab.run import Config, compare

ROOT = Path(__file__).resolve().parent.parent
Result = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """One figure: the group of trainings it draws on, the columns of their metrics, and what the paper says of it."""

    group: str
    title: str
    columns: tuple[str, ...]
    published: str
    against: str = "epoch"


FIGURES = {
    "2a": Recipe(
        "resnet",
        "Population normalization with gamma decay against BN: loss",
        ("train_loss", "test_loss"),
        "PN + gamma decay has a lower validation loss than BN at 128; BN at 1024 has the lower training and the higher "
        "validation loss",
    ),
    "2b": Recipe(
        "resnet",
        "Population normalization with gamma decay against BN: accuracy",
        ("test_accuracy",),
        "PN + gamma decay outperforms BN",
    ),
    "2c": Recipe("parts", "The parts of batch normalization: training loss", ("train_loss",), "curves only"),
    "2d": Recipe(
        "parts",
        "The parts of batch normalization: test loss",
        ("test_loss",),
        "BN has the lowest validation loss; mean-only and variance-only BN both improve on WN",
    ),
    "2e": Recipe(
        "single",
        "BN at a single layer",
        ("gamma_squared", "test_loss"),
        "gamma^2 and the validation loss grow with the batch size",
        against="batch size M",
    ),
    "2f": Recipe(
        "dropout",
        "Dropout in place of the noise of batches",
        ("test_loss", "test_accuracy"),
        "at M = 1024 dropout 0.1 recovers validation loss and accuracy; WN + dropout 0.2: accuracy 0.90 to 0.93",
    ),
}
WORDS = {
    "train_loss": "training loss",
    "test_loss": "test loss",
    "test_accuracy": "test accuracy",
    "gamma_squared": "mean gamma^2",
}


def images(spec: str, scale: str, limit: int | None) -> ImageData:
    """Load the images; at the small scale each 2 x 2 pixels become one, and the channels are standardized again."""
    data = load(spec, limit=limit)
    side = POOLING[scale]
    if side == 1:
        return data
    train, test = F.avg_pool2d(data.x_train, side), F.avg_pool2d(data.x_test, side)
    mean, std = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True)
    digest = hashlib.sha256(f"{data.digest} averaged {side}".encode()).hexdigest()
    return dataclasses.replace(data, x_train=(train - mean) / std, x_test=(test - mean) / std, digest=digest)


def measure(folder: Path, config: Config, data: Callable[[int | None], ImageData]) -> Result:
    """Run an experiment, or what is missing of it, and return the curves of its seeds."""
    path = folder / "results.json"
    done = Study.read(read_json(path)) if path.exists() else None
    if done is None or done.config != config.as_dict():
        done = compare(config, folder, data=data(config.limit), command="python -m benchmarks.luo_figures")
    tables = [read_rows(folder / run.path / "metrics.csv") for run in done.complete]
    seeds = {
        column: [[float(row[column]) for row in rows] for rows in tables]
        for column in ("train_loss", "test_loss", "test_accuracy")
    }
    seeds["gamma_squared"] = [[gamma_squared(folder / run.path / "model.safetensors")] for run in done.complete]
    bad = [run.reason for run in done.runs if not run.complete]
    return {"seeds": seeds, "bad": bad, "seconds": done.total_seconds, "environment": done.environment}


def gamma_squared(path: Path) -> float:
    """Mean of gamma^2 over the channels of all normalized layers of a trained network; NaN without any."""
    weights = load_file(path)
    gammas = [value for name, value in weights.items() if re.search(r"norm\d?\.weight$", name) and value.dim() == 1]
    values = [float(v) for gamma in gammas for v in gamma.square()]
    return mean(values)


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error over seeds."""
    found = Replicates.of(values)
    return found.mean, found.standard_error if found.n > 1 else 0.0


def curves(recipe: Recipe, found: dict[str, Result]) -> list[Figure]:
    """One panel per column: against the epoch a line per variant, against the batch size a line per layer."""
    panels = []
    for column in recipe.columns:
        lines: dict[str, list[tuple[float, float, float]]] = {}
        for label, result in found.items():
            seeds = result["seeds"][column]
            if not seeds:
                continue
            if recipe.against == "epoch":
                lines[label] = [(i + 1.0, *over_seeds(values)) for i, values in enumerate(zip(*seeds, strict=True))]
            else:
                layer, _, size = label.partition(", M=")
                lines.setdefault(layer, []).append((float(size), *over_seeds([values[-1] for values in seeds])))
        drawn = []
        for label, points in lines.items():
            x, y, error = zip(*points, strict=True)
            drawn.append(Curve(label, x, y, error))
        log = "x" if recipe.against != "epoch" else ""
        panels.append(Figure(column, recipe.title, recipe.against, WORDS[column], tuple(drawn), log=log))
    return panels


def table(found: dict[str, Result]) -> list[Result]:
    """Last values of every variant, and the lowest test loss of an epoch: mean and standard error over the seeds."""
    rows = []
    for label, result in found.items():
        row: Result = {"variant": label, "seeds": len(result["seeds"]["test_loss"]), "failed": result["bad"]}
        for column in WORDS:
            last = [values[-1] for values in result["seeds"][column] if math.isfinite(values[-1])]
            if last:
                row[column], row[f"{column}_error"] = over_seeds(last)
        if result["seeds"]["test_loss"]:
            row["lowest_test_loss"], row["lowest_test_loss_error"] = over_seeds(
                [min(values) for values in result["seeds"]["test_loss"]]
            )
        rows.append(row)
    return rows


def make(
    name: str, scale: str, spec: str, runs: Path, out: Path, picture: Path, data: Callable[[int | None], ImageData]
) -> None:
    """Make one figure: run what is missing, write numbers and picture."""
    recipe, found = FIGURES[name], {}
    experiments = configs(recipe.group, scale, spec)
    for label, config in experiments.items():
        found[label] = measure(runs / scale / slug(label, config), config, data)
        last = {k: [round(v[-1], 4) for v in values] for k, values in found[label]["seeds"].items()}
        print(f"{name}: {label}: {last} ({found[label]['seconds']:.0f} s)", flush=True)
    panels = curves(recipe, found)
    result = {
        "figure": name,
        "title": recipe.title,
        "paper": "Luo, Wang, Shao & Peng, ICLR 2019, arXiv 1809.00846, Fig. 2 and sec. 5",
        "published": recipe.published,
        "command": f"python -m benchmarks.luo_figures {name} --data {Path(spec).name} --scale {scale}",
        "environment": next(iter(found.values()))["environment"],
        "seconds": sum(result["seconds"] for result in found.values()),
        "pixels_averaged": POOLING[scale],
        "variants": {label: {**config.as_dict(), "data": Path(spec).name} for label, config in experiments.items()},
        "table": table(found),
        "panels": [panel.asdict() for panel in panels],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    part.replace(out)
    picture.parent.mkdir(parents=True, exist_ok=True)
    plot(panels, picture)
    print(f"written: {out}, {picture}")


def slug(label: str, config: Config) -> str:
    """The folder of a variant: network and label without what is in brackets, so that figures share trainings."""
    return f"{config.model}-" + re.sub(r"[^a-z0-9]+", "-", label.lower().partition(" (")[0]).strip("-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="+", choices=tuple(FIGURES))
    parser.add_argument("--data", default="cifar10.npz")
    parser.add_argument("--scale", choices=tuple(POOLING), default="small")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "luo", help="where the trainings are kept")
    parser.add_argument("--out", type=Path, help="numbers; results/luo_NAME.json (with the scale, if it is not small)")
    parser.add_argument("--plot", type=Path, help="picture; docs/theory/figure-NAME.svg (likewise)")
    options = parser.parse_args()
    if len(options.figures) > 1 and (options.out or options.plot):
        parser.error("--out and --plot name the files of one figure; give one figure, or neither")
    loaded: dict[int | None, ImageData] = {}

    def data(limit: int | None) -> ImageData:
        if limit not in loaded:
            loaded[limit] = images(options.data, options.scale, limit)
        return loaded[limit]

    suffix = "" if options.scale == "small" else f"_{options.scale}"
    for name in options.figures:
        out = options.out or ROOT / "results" / f"luo_{name}{suffix}.json"
        picture = options.plot or ROOT / "docs" / "theory" / f"figure-{name}{suffix}.svg"
        make(name, options.scale, options.data, options.runs, out, picture, data)


if __name__ == "__main__":
    main()
