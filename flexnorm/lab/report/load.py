"""Read the folder of a comparison. A missing or broken file costs its own numbers and a note, never the report."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flexnorm.lab.records import (
    MISSING_RUN,
    UNFINISHED,
    EpochRow,
    Run,
    ShiftRow,
    Study,
    number,
    renamed,
    renamed_command,
)

_RUN = re.compile(r"runs/(?P<norm>[^/]+)/(?P<optim>[^/]+)/seed(?P<seed>-?\d+)")


def load(out_dir: str | Path) -> Study:
    """Return what a comparison left in its folder.

    The summaries of the single runs are read wherever they are; ``results.json`` adds what only the comparison knows
    (command, total time, step time ratios) and runs whose own folder is gone.

    Args:
        out_dir: The folder that ``flexnorm compare --out`` wrote.

    Raises:
        FileNotFoundError: If the folder does not exist or holds neither a results.json nor a run.
    """
    out = Path(out_dir)
    if not out.is_dir():
        raise FileNotFoundError(f"there is no folder {str(out)!r}; give the folder that `flexnorm compare --out` wrote")
    notes: list[str] = []
    experiment, results = _json(out, "experiment.json", notes), _json(out, "results.json", notes)
    config = _mapping(results.get("config")) or _mapping(experiment.get("config"))

    runs: dict[tuple[str, str, int], Run] = {}
    environment = _mapping(results.get("environment"))
    listed = results.get("runs")
    recorded = {str(r.get("path", "")): r for r in listed if isinstance(r, dict)} if isinstance(listed, list) else {}
    folders = sorted({p.parent.relative_to(out).as_posix() for p in out.glob("runs/*/*/seed*/*") if p.is_file()})
    for path in dict.fromkeys([*recorded, *folders]):
        place = _RUN.fullmatch(path)
        if place is None or ".." in path.split("/"):
            continue
        summary = _json(out, f"{path}/summary.json", notes)
        named = {"norm": place["norm"], "optim": place["optim"], "seed": int(place["seed"])}
        run = _run(out, path, {**named, **recorded.get(path, {}), **summary}, notes)
        runs[run.norm, run.optim, run.seed] = run
        environment = environment or _mapping(summary.get("environment"))
    if not runs and not results:
        raise FileNotFoundError(
            f"{str(out)!r} holds neither a results.json nor a run (runs/NORM/OPTIM/seedK); "
            "give the folder that `flexnorm compare --out` wrote"
        )

    baseline = results.get("baseline", config.get("baseline"))
    baseline = baseline if isinstance(baseline, str) else "batch"
    norms = list(dict.fromkeys([*_names(config, "norm", "norms"), *(key[0] for key in runs)]))
    optims = _names(config, "optim", "optims", "optimizer", "optimizers")
    optims = list(dict.fromkeys([*optims, *(key[1] for key in runs)]))
    seeds = _seeds(config) or sorted({key[2] for key in runs})
    for norm in norms:
        for optim in optims:
            for seed in seeds:
                absent = Run(norm, optim, seed, MISSING_RUN, path=f"runs/{norm}/{optim}/seed{seed}")
                runs.setdefault((norm, optim, seed), absent)
    norms = [n for n in norms if n == baseline] + [n for n in norms if n != baseline]
    ordered = sorted(runs.values(), key=lambda r: (norms.index(r.norm), optims.index(r.optim), r.seed))
    return Study(
        name=out.resolve().name,
        runs=tuple(ordered),
        norms=tuple(norms),
        optims=tuple(optims),
        baseline=baseline,
        data=str(results.get("data") or experiment.get("data") or ""),
        command=renamed_command(results) or renamed_command(experiment),
        config=config,
        environment=renamed(environment),
        total_seconds=number(results.get("total_seconds")),
        notes=tuple(notes),
    )


def _run(out: Path, path: str, summary: Mapping[str, object], notes: list[str]) -> Run:
    """Return one run from its summary and its two tables."""
    epochs = tuple(map(EpochRow.read, _csv(out, f"{path}/metrics.csv", notes)))
    shifts = tuple(map(ShiftRow.read, _csv(out, f"{path}/shift.csv", notes)))
    run = Run.read(summary, path=path, epochs=epochs, shifts=shifts)
    if run.status == UNFINISHED and epochs:
        run = dataclasses.replace(run, reason=f"stopped after epoch {epochs[-1].epoch:g}; the same command resumes it")
    return run


def _json(out: Path, name: str, notes: list[str]) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one, and a note, where it cannot be read."""
    value = _parsed(out, name, notes, json.loads, "what it says is left out")
    if value is not None and not isinstance(value, dict):
        notes.append(f"{name} holds no JSON object; what it says is left out")
    return _mapping(value)


def _csv(out: Path, name: str, notes: list[str]) -> list[dict[str, str]]:
    """Return the rows of a CSV file; none where it is missing, and a note where it cannot be read."""
    rows = _parsed(out, name, notes, lambda text: list(csv.DictReader(io.StringIO(text))), "its curves are left out")
    return [{k: v for k, v in row.items() if isinstance(v, str)} for row in rows or ()]


def _parsed(out: Path, name: str, notes: list[str], parse: Callable[[str], Any], lost: str) -> Any:
    """Return the content of a file; None where it is missing, or, with a note, where it cannot be read."""
    try:
        return parse((out / name).read_text(encoding="utf-8")) if (out / name).is_file() else None
    except (OSError, ValueError, csv.Error) as error:
        notes.append(f"{name} could not be read ({error}); {lost}")
        return None


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _names(config: Mapping[str, object], *keys: str) -> list[str]:
    """Return names from a configuration, given there as a list, as keys or separated by commas."""
    value = next((config[key] for key in keys if key in config), None)
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [str(part) for part in value] if isinstance(value, list | tuple | dict) else []


def _seeds(config: Mapping[str, object]) -> list[int]:
    """Return the seeds that a configuration asks for: a list, or a count that means 0, 1, ..."""
    value, first = config.get("seeds", config.get("seed_list")), config.get("seed", 0)
    if type(value) is int:
        first = first if type(first) is int else 0
        return list(range(first, first + min(value, 1000)))
    return [v for v in value if type(v) is int] if isinstance(value, list | tuple) else []
