"""The pictures of the documentation: from results/*.json, the tutorial's by its own code, those of the theory.

python -m benchmarks.pictures                 # all that take seconds
python -m benchmarks.pictures theory          # those of the formulas and simulations: minutes
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from flexnorm.lab import figures
from flexnorm.lab.charts import Chart, Series, hues, linear, logarithmic, save
from flexnorm.lab.charts.numbers import percent

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
LABELS = {"sgd": "SGD", "sgdg": "SGD-G", "adamg": "Adam-G"}
Row = dict[str, Any]


def read(name: str) -> Row:
    """Return a result."""
    content: Row = json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return content


def lines(rows: Sequence[Row], norms: Sequence[str], x: str, y: str, **style: Any) -> list[Series]:
    """Return a line for each norm of a table."""
    return [
        Series(norm, [r[x] for r in own], [r[y] for r in own], hue=hue, **style)
        for hue, norm in enumerate(norms)
        if (own := [row for row in rows if row["norm"] == norm])
    ]


def measured(label: str, hue: int, rows: Iterable[tuple[float, Row]]) -> list[Series]:
    """Return the mean test accuracies of some cells as a line, and their standard deviations as whiskers."""
    found = sorted((x, cell["mean"], cell["std"] or 0.0) for x, cell in rows)
    x, y, std = zip(*found, strict=True)
    low, high = ([v + sign * s for v, s in zip(y, std, strict=True)] for sign in (-1, 1))
    return [Series(label, x, y, hue=hue, kind="curve"), Series(label, x, y, low, high, kind="points", hue=hue)]


def accuracies(title: str, x: Any, series: Sequence[Series], **words: Any) -> Chart:
    """Return a chart of test accuracies."""
    y = linear([v for s in series for v in (*s.y, *s.low, *s.high)], percent=True)
    return Chart(title, x, y, series, y_label="test accuracy", write=lambda v: percent(v, 2), **words)


def optimizers() -> Path:
    """Training loss and test accuracy across the drops of the learning rate, and accuracy against the rate."""
    vgg, rates = read("riemannian_cifar10"), read("riemannian_rates_cifar10")
    curves: dict[str, list[Series]] = {"train_loss": [], "test_accuracy": []}
    for hue, row in enumerate(vgg["table"]):
        for column, series in curves.items():
            values = row["curves"][column]
            series.append(Series(LABELS[row["optim"]], range(1, len(values) + 1), values, hue=hue))
    epochs = linear(curves["train_loss"][0].x, integer=True, tight=True)
    axis: Row = {"x_label": "epoch", "references": [drop + 0.5 for drop in vgg["config"]["schedule_args"]["drops"]]}
    factors = {name: float(name.removeprefix("times-")) for name in rates["variants"]}
    by_rate: list[Series] = []
    for hue, (optim, label) in enumerate(LABELS.items()):
        parts = [(factors[n], row) for n, part in rates["variants"].items() for row in part["table"]]
        shown = [(x, row["test_accuracy"]) for x, row in parts if row["optim"] == optim and row["complete"]]
        by_rate += measured(label, hue, shown)
    losses = [v for s in curves["train_loss"] for v in s.y]
    charts = [
        Chart(
            "Training loss", epochs, linear(losses, zero=True), curves["train_loss"], y_label="training loss", **axis
        ),
        accuracies("Test accuracy", epochs, curves["test_accuracy"], **axis),
        accuracies(
            "Test accuracy against the rate",
            logarithmic(factors.values(), at=sorted(factors.values())),
            by_rate,
            x_label="learning rates, times those of the paper",
        ),
    ]
    return save(
        DOCS / "optim" / "recipes.svg",
        charts,
        title="Optimizers on the sphere: VGG on CIFAR-10",
        hues=hues(("sgd", "unitized", "population"), "sgd"),
        note="dotted: rates times 0.2",
    )


def batch_sizes() -> Path:
    """Test accuracy against the batch size."""
    parts = read("normprop_batch_sizes_cifar10")["variants"].values()
    norms = list(dict.fromkeys(row["norm"] for part in parts for row in part["table"]))
    sizes = sorted(part["config"]["batch_size"] for part in parts)
    series: list[Series] = []
    for hue, norm in enumerate(norms):
        cells = [(part["config"]["batch_size"], row) for part in parts for row in part["table"] if row["norm"] == norm]
        series += measured(norm, hue, [(size, row["test_accuracy"]) for size, row in cells if row["complete"]])
    x = logarithmic(sizes, at=sizes)
    words = {"x_label": "batch size, at equal numbers of images", "width": 560.0, "height": 340.0}
    chart = accuracies("Test accuracy against the batch size", x, series, **words)
    return save(DOCS / "normprop" / "batch-sizes.svg", [chart], title=chart.title, hues=hues(norms, "batch"))


def claims() -> Path:
    """Absolute shift above, relative shift below: against width, against noise, through the layers."""
    width, noise, training = (read(f"claims_{name}") for name in ("width", "noise", "training"))
    widths, levels = [16, 64, 256, 1024], [0.03, 0.1, 0.3, 1.0]
    norms = list(dict.fromkeys(row["norm"] for row in (*width["table"], *noise["table"], *training["rows"])))
    charts = []
    for column, label in (("w1", "W₁ of one update"), ("relative", "W₁ ÷ spread")):
        for rows, key, axis, title in (
            (width["table"], "width", logarithmic([16, 1024], at=widths), "width d of the layer"),
            (noise["table"], "level", logarithmic([0.0, *levels], at=levels), "noise of the moments (in std)"),
            (training["rows"], "depth", linear([1, 4], integer=True, tight=True), "layer, CIFAR-10 training"),
        ):
            series = lines(rows, norms, key, column)
            if column == "w1" and key != "depth":
                series += lines(rows, norms, key, "bound", kind="curve", style=1)
            y = logarithmic([v for s in series for v in s.y], count=5)
            charts.append(Chart(f"{label} against {title}", axis, y, series, x_label=title, y_label=label))
    legend = [Series(norm, (), (), hue=hue) for hue, norm in enumerate(norms)]
    bound = Series("bound", (), (), kind="curve", style=1, hue=-1)
    title = "Shift of one update: absolute above, relative below"
    words: Row = {"title": title, "hues": hues(norms, "batch"), "legend": [*legend, bound], "columns": 3}
    return save(DOCS / "shift" / "claims.svg", charts, **words)


def figure(panel: Row) -> figures.Figure:
    """Return a panel of a result as the figure that it was written from."""
    return figures.Figure(**{**panel, "curves": tuple(figures.Curve(**curve) for curve in panel["curves"])})


def trained() -> list[Path]:
    """Fig. 2 of Luo et al. and the growth of norms, from what `benchmarks.luo_figures` and `luo_norm` wrote."""
    names = {f"luo_2{letter}": f"figure-2{letter}" for letter in "abcdef"} | {"luo_norm": "parameter-norm"}
    return [figures.plot(list(map(figure, read(k)["panels"])), DOCS / "theory" / f"{v}.svg") for k, v in names.items()]


def tutorial() -> Path:
    """Run the first code of docs/shift.md, which saves its picture."""
    text = (DOCS / "shift.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    path = DOCS / "shift" / "tutorial.svg"
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(code, "docs/shift.md", "exec"), {})
        path.write_bytes(Path("shift.svg").read_bytes())
    return path


def theory() -> list[Path]:
    """The figures of the formulas and simulations, as `flexnorm theory` draws them."""
    made = {
        "figure-1a": figures.figure_1a,
        "figure-1b": figures.figure_1b,
        "regularization": figures.regularization_figure,
        "dynamics-error": figures.dynamics_figure,
        "dynamics-gamma": lambda: figures.dynamics_figure(quantity="gamma"),
        "dynamics-effective-lr": lambda: figures.dynamics_figure(quantity="effective_lr", lr=2.5, times=30),
    }
    return [figures.plot(make(), DOCS / "theory" / f"{name}.svg") for name, make in made.items()]


if __name__ == "__main__":
    made = theory() if sys.argv[1:] == ["theory"] else [optimizers(), batch_sizes(), claims(), *trained(), tutorial()]
    print(*(os.path.relpath(path, ROOT) for path in made), sep="\n")
