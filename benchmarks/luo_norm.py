"""What BatchNorm held back (Luo et al., ICLR 2019, sec. 5, parameter norm): fold it away and train on.

    python -m benchmarks.luo_norm --data cifar10.npz

The trained BN networks of Fig. 2(c, d) are folded into plain convolutions, w = gamma w_bn / sigma, and trained on
without BN by SGD at the learning rate 1e-3 (the paper's); as a control the same networks are trained on with their BN.
Writes ``results/luo_norm.json`` and ``docs/theory/parameter-norm.svg``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.luo_figures import ROOT, images, measure, over_seeds, slug
from benchmarks.luo_runs import POOLING, configs
from flexnorm.lab import models
from flexnorm.lab.data import ImageData
from flexnorm.lab.figures import Curve, Figure, plot
from flexnorm.surgery import fold

LR, MOMENTUM, BATCH = 1e-3, 0.9, 128
WORDS = {"train_loss": "training loss", "test_loss": "test loss", "kernel_norm": "norm of the folded kernels"}
KINDS = ("folded, without BN", "with BN")
History = list[dict[str, float]]


@torch.no_grad()
def look(model: nn.Module, data: ImageData, test_limit: int | None) -> dict[str, float]:
    """Losses in evaluation mode, and the mean norm of a filter with its normalization folded in."""
    model.eval()

    def loss(x: Tensor, y: Tensor) -> float:
        return float(F.cross_entropy(torch.cat([model(part) for part in torch.split(x, 1000)]), y))

    plain = fold(model)
    norms = [m.weight.flatten(1).norm(dim=1) for m in plain.modules() if isinstance(m, nn.Conv2d)]
    test = slice(None, test_limit)
    return {
        "train_loss": loss(data.x_train, data.y_train),
        "test_loss": loss(data.x_test[test], data.y_test[test]),
        "kernel_norm": float(torch.cat(norms).mean()),
    }


def train_on(model: nn.Module, data: ImageData, epochs: int, seed: int, test_limit: int | None) -> History:
    """Train and look before, and after each epoch."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=MOMENTUM)
    history = [look(model, data, test_limit)]
    for _ in range(epochs):
        model.train()
        order = torch.randperm(len(data.x_train), generator=generator)
        for index in torch.split(order, BATCH):
            loss = F.cross_entropy(model(data.x_train[index]), data.y_train[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        history.append(look(model, data, test_limit))
    return history


def panels(found: dict[str, list[History]]) -> list[Figure]:
    """One panel per quantity: mean and standard error over the seeds against the epoch."""
    made = []
    for column, word in WORDS.items():
        curves = []
        for kind, seeds in found.items():
            points = [over_seeds([row[column] for row in rows]) for rows in zip(*seeds, strict=True)]
            y, error = zip(*points, strict=True)
            curves.append(Curve(kind, tuple(float(epoch) for epoch in range(len(y))), y, error))
        made.append(Figure(column, "Training on at a rate of 0.001", "epoch", word, tuple(curves)))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10.npz")
    parser.add_argument("--scale", choices=tuple(POOLING), default="small")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "luo", help="where the trainings are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "luo_norm.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "theory" / "parameter-norm.svg")
    options = parser.parse_args()
    config = configs("parts", options.scale, options.data)["BN"]
    torch.set_num_threads(config.threads or torch.get_num_threads())
    data = images(options.data, options.scale, config.limit)
    folder = options.runs / options.scale / slug("BN", config)
    environment = measure(folder, config, lambda _: data)["environment"]
    began = time.perf_counter()
    found: dict[str, list[History]] = {kind: [] for kind in KINDS}
    for seed, path in enumerate(sorted(folder.rglob("model.safetensors"))):
        classes, channels = data.num_classes, data.x_train.shape[1]
        model = models.build(config.model, "batch", channels, classes, **config.model_args)
        model.load_state_dict(load_file(path))
        for kind, start in zip(KINDS, (fold(model), model), strict=True):
            found[kind].append(train_on(start, data, options.epochs, seed, config.test_limit))
            print(f"seed {seed}, {kind}: {found[kind][-1][0]} -> {found[kind][-1][-1]}", flush=True)
    drawn = panels(found)
    result: dict[str, Any] = {
        "title": "Folded BN networks trained on without BN",
        "paper": "Luo, Wang, Shao & Peng, ICLR 2019, arXiv 1809.00846, sec. 5, parameter norm",
        "published": "the training loss falls, the validation loss rises, the norms of the kernels grow",
        "command": f"python -m benchmarks.luo_norm --data {Path(options.data).name} --scale {options.scale}",
        "environment": environment,
        "seconds": time.perf_counter() - began,
        "settings": {"lr": LR, "momentum": MOMENTUM, "batch_size": BATCH, "epochs": options.epochs},
        "panels": [panel.asdict() for panel in drawn],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(drawn, options.plot)
    print(f"written: {options.out}, {options.plot}")


if __name__ == "__main__":
    main()
