"""Run recipes and keep what they gave: results/NAME.json, and for the demo the README's table and picture.

    python -m benchmarks.results demo
    python -m benchmarks.results unitization_cifar10 --scale small --data path/to/cifar10.npz

Interrupted, the same command resumes. The environment, the seeds and the command are part of the result.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from flexnorm.lab.files import plain, read_json, read_rows
from flexnorm.lab.records import Cell, EpochRow, Study
from flexnorm.lab.replicates import mean, plus_minus
from flexnorm.lab.report import picture
from flexnorm.lab.run import load_variants

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results of the demo -->", "<!-- end of the results -->"


def run(name: str, scale: str | None, data: str | None, folder: Path) -> None:
    """Run one recipe in its folder."""
    command = [sys.executable, "-m", "flexnorm", "recipe", "run", name, "--out", str(folder)]
    command += ["--scale", scale] if scale else []
    command += ["--data", data] if data else []
    subprocess.run(command, check=True, cwd=ROOT)


def condense(name: str, scale: str | None, folder: Path) -> dict[str, Any]:
    """Return the result of a run without what depends on where it was run; of all its variants, if it has such."""
    path = ROOT / "recipes" / f"{name}.yaml"
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    found = sorted(folder.glob("*/results.json"), key=lambda path: path.stat().st_mtime)
    parts = {path.parent.name: Study.read(read_json(path)) for path in found}
    parts = parts or {"": Study.read(read_json(folder / "results.json"))}
    first = next(iter(parts.values()))
    data = Path(str(first.config["data"])).name
    result = {
        "recipe": name,
        "scale": scale,
        "paper": recipe["paper"],
        "figure": recipe["figure"],
        "published": recipe["published"],
        "command": f"flexnorm recipe run {name}" + (f" --scale {scale} --data {data}" if scale else ""),
        "environment": first.environment,
        "total_seconds": sum(part.total_seconds for part in parts.values()),
    }
    tables = {
        variant: {
            "config": {**part.config, "data": Path(str(part.config["data"])).name},
            "table": [cell.asdict() | {"curves": curves(folder / variant, cell)} for cell in part.cells],
        }
        for variant, part in parts.items()
    }
    if "" in parts:
        return plain({**result, **tables[""]})
    return plain({**result, "variants": {name: tables[name] for name in load_variants(path, scale) if name in tables}})


def curves(folder: Path, cell: Cell) -> dict[str, list[float]]:
    """Return the mean over the complete runs of training loss and test accuracy, epoch by epoch."""
    tables = [[EpochRow.read(row) for row in read_rows(folder / run.path / "metrics.csv")] for run in cell.complete]
    return {
        column: [round(mean([getattr(row, column) for row in rows]), 5) for rows in zip(*tables, strict=True)]
        for column in ("train_loss", "test_accuracy")
    }


def _cell(value: dict[str, Any] | None, form: str, scale: float = 1.0) -> str:
    return plus_minus(value and value["mean"], value and value["std"], form, scale, missing="–")


def variants_markdown(result: dict[str, Any]) -> str:
    """Return the test accuracies of a result with variants: a row per variant, a column per norm and optimizer."""
    cells = list(dict.fromkeys((row["norm"], row["optim"]) for v in result["variants"].values() for row in v["table"]))
    heads = [" ".join(part for part in (norm, optim) if part) for norm, optim in cells]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(cells) + 1) + "|"]
    for variant, part in result["variants"].items():
        rows = {(row["norm"], row["optim"]): row for row in part["table"]}
        texts = []
        for cell in cells:
            row = rows.get(cell)
            bad = "" if row is None else "diverged" if row["diverged"] else "refused" if row["refused"] else ""
            share = (
                f" ({row['diverged']} of {row['seeds']} diverged)"
                if row and row["diverged"] and row["complete"]
                else ""
            )
            texts.append(
                "" if row is None else _cell(row["test_accuracy"], ".2f", 100) + share if row["complete"] else bad
            )
        lines.append(f"| {variant} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def markdown(result: dict[str, Any]) -> str:
    """Return the table of a result."""
    if "variants" in result:
        return variants_markdown(result)
    lines = [
        "| norm | optimizer | test accuracy % | against batch | shift W1 a step | relative shift | step time / batch |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["table"]:
        ratio = row["step_ratio"]
        cells = [
            row["norm"],
            row["optim"],
            _cell(row["test_accuracy"], ".2f", 100),
            _cell(row["difference"], "+.2f", 100),
            _cell(row["shift_w1"], ".3f"),
            _cell(row["shift_relative"], ".4f"),
            "–" if ratio is None else f"{ratio:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    seeds = len(result["config"]["seeds"])
    lines += ["", f"Mean ± standard deviation over {seeds} seeds; differences are paired by seed and optimizer."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--scale")
    parser.add_argument("--data")
    parser.add_argument("--condense", action="store_true", help="only write what is there; run nothing")
    options = parser.parse_args()
    folder = ROOT / "runs" / (f"{options.name}-{options.scale}" if options.scale else options.name)
    if not options.condense:
        run(options.name, options.scale, options.data, folder)
    result = condense(options.name, options.scale, folder)
    target = ROOT / "results" / f"{options.name}.json"
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(markdown(result))
    print(f"written: {target}")
    if options.name == "demo":
        picture(folder, ROOT / "docs" / "demo.svg")
        readme = ROOT / "README.md"
        before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
        after = rest.split(END)[1]
        readme.write_text(f"{before}{BEGIN}\n{markdown(result)}\n{END}{after}", encoding="utf-8")
        print("README.md: table and picture renewed")


if __name__ == "__main__":
    main()
