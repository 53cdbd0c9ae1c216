"""The folder of an experiment, one process at a time: how it is opened, checkpoints, and the outcome of a run."""

from __future__ import annotations

import dataclasses
import io
import math
import pickle
import statistics
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from flexnorm.lab.data import ImageData
from flexnorm.lab.files import atomic_write, dump_json, exclusive, read_json, read_rows, writing
from flexnorm.lab.records import SHIFT_MEANS, EpochRow, ShiftRow, renamed_command
from flexnorm.lab.replicates import mean
from flexnorm.lab.run.config import Config


def run_path(norm: str, optim: str, seed: int) -> str:
    """Return where a run lies inside the folder of its experiment."""
    return f"runs/{norm}/{optim}/seed{seed}"


def as_begun(out: Path, config: Config) -> Config:
    """Return an experiment as its folder has it: Adam-G of a folder older than its choice goes on with SGD beside it.

    Only where neither the folder nor ``config`` says which; there, SGD was the only one.
    """
    marker = out / "experiment.json"
    found = read_json(marker) if marker.is_file() else {}
    cells = {cell: given for cell, given in found.get("resolved", {}).get("settings", {}).items() if "/adamg" in cell}
    says = any("off_manifold" in given for given in cells.values())
    for source in (found.get("config", {}), config.as_dict()):
        says |= any(
            "off_manifold" in given for key in ("optims", "overrides") for given in source.get(key, {}).values()
        )
    if says or not cells or "adamg" not in config.optims:
        return config
    adamg = {**config.optims["adamg"], "off_manifold": "sgd"}
    return dataclasses.replace(config, optims={**config.optims, "adamg": adamg})


@contextmanager
def open_experiment(out: Path, config: Config, data: ImageData, command: str) -> Iterator[None]:
    """Make the folder of an experiment, or enter it again, with the errors of :func:`flexnorm.lab.run.compare`.

    ValueError if it holds another experiment (the message lists what differs) or foreign files.
    """
    marker = out / "experiment.json"
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; --out needs a folder")
    if out.is_dir() and not marker.exists():
        foreign = sorted(p.name for p in out.iterdir() if p.name not in (".lock", "experiment.json.tmp"))
        if foreign:
            raise ValueError(
                f"{out} is not empty and holds no experiment (found {', '.join(foreign[:5])}"
                f"{', ...' if len(foreign) > 5 else ''}); nothing was written: choose another --out"
            )
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with exclusive(out):
        resolved = {**config.resolved(), "data_digest": data.digest}
        if marker.exists():
            found = read_json(marker)
            if found.get("fingerprint") != config.fingerprint(data.digest):
                theirs, differences = renamed_command(found), _differences(found.get("resolved", {}), resolved)
                lines = [f"  {key}: {a} there, {b} here" for key, a, b in differences]
                raise ValueError(
                    f"{out} holds another experiment; nothing was written. It differs in\n"
                    + "\n".join(lines or ["  the version of its format"])
                    + "\nChoose another --out, or repeat the settings found there"
                    + (f":\n  {theirs}" if theirs else ".")
                )
        else:
            experiment = {
                "format": 1,
                "fingerprint": config.fingerprint(data.digest),
                "config": config.as_dict(),
                "resolved": resolved,
                "data": data.describe(),
                "command": command,
            }
            dump_json(marker, experiment)
        yield


def _differences(there: Any, here: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, old, new) wherever two nested settings differ."""
    for key in sorted({*there, *here}):
        old, new = there.get(key, "absent"), here.get(key, "absent")
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}", old, new


FORMAT = 2


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write the state of a run at the end of an epoch: tensors, numbers and strings, so that loading never runs code.

    If the disk does not take it (WriteError), the previous checkpoint is still there.
    """
    # Through memory: torch.save reports a full disk as a RuntimeError of its archive writer.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    atomic_write(path, buffer.getvalue())


def load_checkpoint(path: Path, run: str) -> dict[str, Any]:
    """Read a checkpoint; ValueError if it is damaged, more than plain data, or of a run with another fingerprint."""
    advice = f"delete {path} to train this run again from its start"
    if not zipfile.is_zipfile(path):  # anything else would go to torch's reader of old pickles
        raise ValueError(f"{path} is damaged or holds more than plain data (no torch archive); {advice}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged or holds more than plain data ({reason}); {advice}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is no checkpoint of this version; {advice}")
    if state["run"] != run:
        raise ValueError(f"{path} belongs to a run with other settings; {advice}")
    return state


def truncate(path: Path, size: int) -> None:
    """Cut a growing file back to what it was at a checkpoint; ValueError if it is shorter than that."""
    found = path.stat().st_size if path.exists() else 0
    if found < size:
        raise ValueError(
            f"{path} has {found} bytes, fewer than the {size} at the last checkpoint; "
            f"delete {path.parent} to train this run again from its start"
        )
    if found > size:
        with writing(path), path.open("r+b") as file:
            file.truncate(size)


def result(folder: Path) -> dict[str, Any]:
    """Return what ``metrics.csv`` and ``shift.csv`` say, named as in :class:`flexnorm.lab.records.Run`.

    Loss and accuracy are those of the last epoch; the shift of a layer is the mean over its measurements, ``shift_w1``
    and ``shift_relative`` are means over the layers; ``shift_holds`` says whether every single measurement satisfied
    lower <= W1 <= upper.
    """
    epochs = [EpochRow.read(row) for row in read_rows(folder / "metrics.csv")]
    layers: dict[str, list[ShiftRow]] = {}
    for row in map(ShiftRow.read, read_rows(folder / "shift.csv")):
        known = layers.setdefault(row.layer, [])
        # A network that diverges has no distribution to measure any more; what was measured before stands.
        if math.isfinite(row.w1):
            known.append(row)
    shift = {
        layer: {name: mean([getattr(row, name) for row in rows]) for name in SHIFT_MEANS}
        for layer, rows in layers.items()
    }
    measured, last = [row for rows in layers.values() for row in rows], epochs[-1] if epochs else None
    return {
        **{name: getattr(last, name, math.nan) for name in ("train_loss", "test_loss", "test_accuracy")},
        "best_test_accuracy": max((row.test_accuracy for row in epochs), default=math.nan),
        "shift": shift,
        "shift_w1": mean([layer["w1"] for layer in shift.values()]),
        "shift_relative": mean([layer["relative"] for layer in shift.values()]),
        "shift_measurements": len(measured),
        "shift_holds": all(row.lower <= row.w1 <= row.upper for row in measured) if measured else None,
    }


def step_ms(times: Sequence[float]) -> float:
    """Return the median time of a step in milliseconds, without the first ones, which pay for warm-up."""
    settled = times[min(5, len(times) // 2) :]
    return statistics.median(settled) * 1e3 if settled else math.nan
