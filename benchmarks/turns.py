"""Does it matter when the orthogonality regularizer acts? SGD-G and Adam-G with it in every step, and by turns.

    python -m benchmarks.turns [--seeds 5] [--networks convnet,resnet8] [--no-clip] [--out results/turns.json]

The digits, the plain network and the small residual one of the lab, batch normalization, the paper's rates (0.2 and
0.05 on the sphere), 10 epochs of 22 updates of 64 images; by one cycle, as the demo, and with constant rates. For each
``ortho_every``: test accuracy, training loss of the last epoch, and how far the rows of the regularized weights are
from orthogonal, ``||Y Y^T - I||`` over the root of the number of rows: in the mean over the first epoch, over the
others, and at the end. ``off`` is without the regularizer. Each run is one thread's, on the processor.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.timing import save
from flexnorm.lab import models
from flexnorm.lab.data import ImageData, load
from flexnorm.lab.run.settings import SCHEDULES, schedule_factor
from flexnorm.optim import SGDG, AdamG, param_groups

EVERY = (1, 2, 3, 4, 5, 6, 8, 16)
NETWORKS: dict[str, dict[str, Any]] = {"convnet": {}, "resnet8": {"width": 16}}
EPOCHS, BATCH = 10, 64
MEASURES = ("accuracy", "train loss", "distance, first epoch", "distance, then", "distance, last")


def distance(optimizer: SGDG | AdamG) -> float:
    """Mean over the regularized weights of ``||Y Y^T - I|| / sqrt(rows)``."""
    found = []
    for group in optimizer.param_groups:
        if group["manifold"] and group["measured"]:
            for p in group["params"]:
                rows = p.detach().flatten(1)
                gram = rows @ rows.T
                found.append(float((gram - torch.eye(len(rows))).norm()) / len(rows) ** 0.5)
    return statistics.fmean(found)


def train(
    network: str, optim: str, schedule: str, every: int | None, seed: int, data: ImageData, clip: float | None = 0.1
) -> dict[str, float]:
    """Train one network; return the measures. ``every=None`` is without the regularizer."""
    torch.manual_seed(seed)
    model = models.build(network, "batch", 1, 10, **NETWORKS[network])
    rate = {"sgdg": 0.2, "adamg": 0.05}[optim]
    images, labels, args = data.x_train, data.y_train, SCHEDULES[schedule]
    groups = param_groups(model, 0.1, rate, 5e-4, images[:16], grad_clip=clip)
    for group in groups:
        group["measured"] = bool(group.get("ortho"))
        if every is None:
            group["ortho"] = 0.0
    make = SGDG if optim == "sgdg" else partial(AdamG, off_manifold="sgd")
    optimizer = make(groups, nesterov=True, ortho_every=every or 1)
    rates = [group["lr"] for group in optimizer.param_groups]
    steps = len(images) // BATCH
    losses, distances = [], []
    for epoch in range(EPOCHS):
        order = torch.randperm(len(images))
        for step in range(steps):
            factor = schedule_factor(schedule, args, epoch * steps + step, steps, EPOCHS)
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr * factor
            batch = order[step * BATCH : (step + 1) * BATCH]
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            distances.append(distance(optimizer))
    return {
        "accuracy": 100 * accuracy(model, data),
        "train loss": statistics.fmean(losses[-steps:]),
        "distance, first epoch": statistics.fmean(distances[:steps]),
        "distance, then": statistics.fmean(distances[steps:]),
        "distance, last": distances[-1],
    }


@torch.no_grad()
def accuracy(model: nn.Module, data: ImageData) -> float:
    model.eval()
    return float((model(data.x_test).argmax(1) == data.y_test).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--no-clip", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, rows = load("digits"), []
    clip = None if options.no_clip else 0.1
    for network in options.networks.split(","):
        for schedule in ("onecycle", "constant"):
            for optim in ("sgdg", "adamg"):
                print(f"\n{network}, {optim}, {schedule}", flush=True)
                for every in (*EVERY, None):
                    runs = [train(network, optim, schedule, every, seed, data, clip) for seed in range(options.seeds)]
                    row: dict[str, Any] = {"network": network, "optimizer": optim, "schedule": schedule}
                    row["ortho_every"] = every or "off"
                    for key in MEASURES:
                        values = [run[key] for run in runs]
                        row |= {key: statistics.fmean(values), f"{key}, standard deviation": statistics.stdev(values)}
                    rows.append(row)
                    said = [f"{key} {row[key]:.4g} ± {row[f'{key}, standard deviation']:.2g}" for key in MEASURES]
                    print(f"  {row['ortho_every']!s:>4}: {'  '.join(said)}", flush=True)
    if options.out:
        save(options.out, "turns", rows, seeds=options.seeds, epochs=EPOCHS, batch=BATCH)


if __name__ == "__main__":
    main()
