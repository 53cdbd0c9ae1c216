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

from flexnorm.lab.report import picture
from flexnorm.lab.run import load_variants
from flexnorm.lab.run.files import read_rows

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
    recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))
    found = sorted(folder.glob("*/results.json"), key=lambda path: path.stat().st_mtime)
    parts = {path.parent.name: _read(path) for path in found} or {"": _read(folder / "results.json")}
    first = next(iter(parts.values()))
    data = first["config"]["data"]
    result = {
        "recipe": name,
        "scale": scale,
        "paper": recipe["paper"],
        "figure": recipe["figure"],
        "published": recipe["published"],
        "command": f"flexnorm recipe run {name}" + (f" --scale {scale} --data {data}" if scale else ""),
        "environment": first["environment"],
        "total_seconds": sum(part["total_seconds"] for part in parts.values()),
    }
    for variant, part in parts.items():
        for row in part["table"]:
            row["curves"] = curves([folder / variant / run["path"] for run in _runs(part, row)])
    if "" in parts:
        return {**result, "config": first["config"], "table": first["table"]}
    variants = {variant: {"config": part["config"], "table": part["table"]} for variant, part in parts.items()}
    order = list(load_variants(ROOT / "recipes" / f"{name}.yaml", scale))
    return {**result, "variants": {variant: variants[variant] for variant in order if variant in variants}}


def curves(runs: list[Path]) -> dict[str, list[float]]:
    """Return the mean over the runs of training loss and test accuracy, epoch by epoch."""
    tables = [read_rows(run / "metrics.csv") for run in runs]
    return {
        column: [round(sum(float(row[column]) for row in rows) / len(rows), 5) for rows in zip(*tables, strict=True)]
        for column in ("train_loss", "test_accuracy")
    }


def _runs(part: dict[str, Any], row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the complete runs of one row."""
    cell = (row["norm"], row["optim"])
    return [run for run in part["runs"] if run["status"] == "complete" and (run["norm"], run["optim"]) == cell]


def _read(path: Path) -> dict[str, Any]:
    results = json.loads(path.read_text(encoding="utf-8"))
    results["config"]["data"] = Path(str(results["config"]["data"])).name
    return results


def _cell(value: dict[str, Any] | None, scale: float = 1.0, digits: int = 2, sign: str = "") -> str:
    if value is None or value.get("mean") is None:
        return "–"
    spread = value.get("std")
    text = f"{scale * value['mean']:{sign}.{digits}f}"
    return text if spread is None else f"{text} ± {scale * spread:.{digits}f}"


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
            texts.append("" if row is None else _cell(row["test_accuracy"], 100) + share if row["complete"] else bad)
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
            _cell(row["test_accuracy"], 100),
            _cell(row["difference"], 100, sign="+"),
            _cell(row["shift_w1"], digits=3),
            _cell(row["shift_relative"], digits=4),
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
