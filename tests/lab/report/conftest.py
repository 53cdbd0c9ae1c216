"""Run folders as `flexnorm compare` leaves them, made up: the numbers are drawn, the files are real."""

import csv
import json
import math
import os
import random
import statistics

import pytest

LAYERS = ("0.1", "1.1", "2.1")
SHIFT = ("lower", "w1", "upper", "spread", "relative_lower", "relative", "relative_upper")


def write_csv(path, header, rows):
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])


def make_run(out, norm, optim, seed, *, epochs=4, layers=LAYERS, zero=False, status="complete", reason=None, **changes):
    """Write one run and return its summary. ``zero`` makes every shift 0; keywords replace parts of the result."""
    draw = random.Random(f"{norm}/{optim}/{seed}")
    quality = random.Random(f"{norm}/{optim}").uniform(0.6, 1.6)
    folder = out / "runs" / norm.replace("/", "_") / optim.replace("/", "_") / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    metrics, shifts = [], []
    for epoch in range(1, epochs + 1):
        loss = (0.03 / quality + 2.3 * math.exp(-quality * epoch)) * draw.uniform(0.9, 1.1)
        error = (
            round(360 * min(0.9, (0.025 / quality + 0.5 * math.exp(-quality * epoch)) * draw.uniform(0.8, 1.2))) / 360
        )
        step = 22 * epoch
        metrics.append(
            [epoch, step, loss, loss * 1.2, 1 - error, 0.1, 3 * quality * draw.uniform(0.9, 1.1), epoch * 0.2]
        )
        for depth, layer in enumerate(layers):
            w1 = (
                0.0 if zero else 0.2 * (depth + 1) * math.exp(-0.3 * epoch * quality) * draw.uniform(0.8, 1.2) / quality
            )
            low, high = 0.7 * w1, 1.1 * w1
            shifts.append([epoch, step, layer, low, w1, high, 5.0, low / 5, w1 / 5, high / 5])
    means = {}
    for layer in layers:
        rows = [row for row in shifts if row[2] == layer]
        means[layer] = {
            name: statistics.fmean(row[3 + i] for row in rows) for i, name in enumerate(SHIFT) if name != "spread"
        }
    if status == "refused":
        metrics, shifts, means = [], [], {}
    write_csv(
        folder / "metrics.csv",
        ["epoch", "step", "train_loss", "test_loss", "test_accuracy", "lr", "step_ms", "seconds"],
        metrics,
    )
    write_csv(folder / "shift.csv", ["epoch", "step", "layer", *SHIFT], shifts)
    last = metrics[-1] if metrics else [math.nan] * 8
    result = {
        "train_loss": last[2],
        "test_loss": last[3],
        "test_accuracy": last[4],
        "best_test_accuracy": max((row[4] for row in metrics), default=math.nan),
        "shift": means,
        "shift_w1": statistics.fmean(m["w1"] for m in means.values()) if means else math.nan,
        "shift_relative": statistics.fmean(m["relative"] for m in means.values()) if means else math.nan,
    }
    summary = {
        "format": 1,
        "status": status,
        "reason": reason,
        "notes": [],
        "norm": norm,
        "optim": optim,
        "seed": seed,
        "epochs": epochs,
        "steps": 22 * epochs,
        "parameters": 23946,
        "result": {**result, **changes},
        "timing": {"step_ms": 3 * quality * draw.uniform(0.9, 1.1), "wall_s": 0.5},
        "environment": {"flexnorm": "0.1", "torch": "2.13.0", "python": "3.11.7", "device": "cpu", "threads": 1},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return {**summary, "path": folder.relative_to(out).as_posix()}


def make_study(out, norms=("none", "batch", "group"), optims=("sgd", "sgdg"), seeds=3, *, results=True, **options):
    """Write a whole comparison; ``options`` go to every run."""
    out.mkdir(parents=True, exist_ok=True)
    config = {
        "data": "digits",
        "model": "convnet",
        "norms": list(norms),
        "optims": {optim: {} for optim in optims},
        "baseline": "batch",
        "epochs": options.get("epochs", 4),
        "seeds": list(range(seeds)),
    }
    command = f"flexnorm compare --norm {','.join(norms)} --optim {','.join(optims)}"
    (out / "experiment.json").write_text(
        json.dumps({"format": 1, "fingerprint": "0", "config": config, "command": command})
    )
    runs = [make_run(out, n, o, s, **options) for s in range(seeds) for o in optims for n in norms]
    if results:
        finish(out, config, command, runs)
    return runs


def finish(out, config, command, runs):
    """Write results.json."""
    times = {(r["optim"], r["seed"]): r["timing"]["step_ms"] for r in runs if r["norm"] == "batch"}
    for run in runs:
        base = times.get((run["optim"], run["seed"]))
        run["step_ratio"] = run["timing"]["step_ms"] / base if base else None
    results = {
        "format": 1,
        "command": command,
        "config": config,
        "environment": runs[0]["environment"],
        "baseline": "batch",
        "total_seconds": 123.4,
        "runs": runs,
        "table": [],
    }
    (out / "results.json").write_text(json.dumps(results))


@pytest.fixture
def study(tmp_path):
    """A folder and the two functions that fill it."""

    class Factory:
        out = tmp_path / "study"

        @classmethod
        def make(cls, *args, **options):
            return make_study(cls.out, *args, **options)

        @classmethod
        def run(cls, *args, **options):
            return make_run(cls.out, *args, **options)

    return Factory


@pytest.fixture
def chromium():
    """A browser class and the path of a Chromium. Without one a test is skipped, or fails where CI is "true"."""
    import importlib.util
    from pathlib import Path

    spec = importlib.util.spec_from_file_location("report_chromium", Path(__file__).with_name("chromium.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    program = module.find()
    if program is None:
        message = (
            f"no Chromium found (looked for $CHROMIUM, {', '.join(module.NAMES)}): the page was not tried in a browser"
        )
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return module.Browser, program
