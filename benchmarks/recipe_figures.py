"""The pictures of the recipes' results in docs/optim.md and docs/normprop.md, from results/*.json.

python -m benchmarks.recipe_figures
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
COLOURS = {"sgd": "#1d262f", "sgdg": "#1a60ab", "adamg": "#c04a08"}
COLOURS |= {
    "batch": "#1d262f",
    "normprop": "#2c8c57",
    "group": "#8b5cb0",
    "unitized": "#1a60ab",
    "population": "#c04a08",
}
LABELS = {"sgd": "SGD", "sgdg": "SGD-G", "adamg": "Adam-G"}


def read(name: str) -> dict[str, Any]:
    """Return a result."""
    content: dict[str, Any] = json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return content


def optimizers() -> None:
    """Training loss and test accuracy across the drops of the learning rate, and accuracy against the rate."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    vgg, rates = read("riemannian_cifar10"), read("riemannian_rates_cifar10")
    for row in vgg["table"]:
        draw: dict[str, Any] = {
            "color": COLOURS[row["optim"]],
            "marker": "o",
            "markersize": 3.5,
            "label": LABELS[row["optim"]],
        }
        epochs = range(1, len(row["curves"]["train_loss"]) + 1)
        axes[0].plot(epochs, row["curves"]["train_loss"], **draw)
        axes[1].plot(epochs, [100 * value for value in row["curves"]["test_accuracy"]], **draw)
    for axis, label in zip(axes, ("training loss", "test accuracy, %"), strict=False):
        for drop in vgg["config"]["schedule_args"]["drops"]:
            axis.axvline(drop + 0.5, color="#b8c0c8", linewidth=0.8, linestyle=":")
        axis.set(xlabel="epoch (dotted: rates times 0.2)", ylabel=label)
    factors = {name: float(name.removeprefix("times-")) for name in rates["variants"]}
    for optim in LABELS:
        points = [
            (factors[name], 100 * row["test_accuracy"]["mean"], 100 * (row["test_accuracy"]["std"] or 0))
            for name, part in rates["variants"].items()
            for row in part["table"]
            if row["optim"] == optim and row["complete"]
        ]
        x, y, spread = zip(*points, strict=True)
        axes[2].errorbar(x, y, spread, color=COLOURS[optim], marker="o", markersize=3.5, capsize=2, label=LABELS[optim])
    axes[2].set(xscale="log", xlabel="learning rates, times those of the paper", ylabel="test accuracy, %")
    axes[0].legend(frameon=False)
    save(figure, DOCS / "optim" / "recipes.png")


def batch_sizes() -> None:
    """Test accuracy against the batch size."""
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    result = read("normprop_batch_sizes_cifar10")
    norms = dict.fromkeys(row["norm"] for part in result["variants"].values() for row in part["table"])
    for norm in norms:
        points = sorted(
            (part["config"]["batch_size"], 100 * row["test_accuracy"]["mean"], 100 * (row["test_accuracy"]["std"] or 0))
            for part in result["variants"].values()
            for row in part["table"]
            if row["norm"] == norm and row["complete"]
        )
        x, y, spread = zip(*points, strict=True)
        axis.errorbar(x, y, spread, color=COLOURS[norm], marker="o", markersize=3.5, capsize=2, label=norm)
    sizes = sorted(part["config"]["batch_size"] for part in result["variants"].values())
    axis.set(xscale="log", xlabel="batch size, at equal numbers of images", ylabel="test accuracy, %")
    axis.minorticks_off()
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.legend(frameon=False)
    save(figure, DOCS / "normprop" / "batch-sizes.png")


def save(figure: plt.Figure, path: Path) -> None:
    """Write one picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    print(f"written: {path}")


if __name__ == "__main__":
    optimizers()
    batch_sizes()
