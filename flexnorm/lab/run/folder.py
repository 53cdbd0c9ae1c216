"""The folder of an experiment: one experiment per folder, one process at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexnorm.lab.data import ImageData
from flexnorm.lab.records import renamed_command
from flexnorm.lab.run.config import Config
from flexnorm.lab.run.files import dump_json, exclusive, read_json, writing


def run_path(norm: str, optim: str, seed: int) -> str:
    """Return where a run lies inside the folder of its experiment."""
    return f"runs/{norm}/{optim}/seed{seed}"


@contextmanager
def open_experiment(out: Path, config: Config, data: ImageData, command: str) -> Iterator[None]:
    """Make the folder of an experiment, or enter it again; refuse a folder that holds anything else.

    Raises:
        ValueError: If the folder holds another experiment (the message lists what differs) or foreign files.
        BusyError: If another process is at work in it.
        WriteError: If the disk does not take a file.
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
                raise ValueError(_other_experiment(out, found.get("resolved", {}), resolved, renamed_command(found)))
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


def _other_experiment(out: Path, there: dict[str, Any], here: dict[str, Any], command: str) -> str:
    """Return the message that names every setting in which two experiments differ."""
    lines = [f"  {key}: {a} there, {b} here" for key, a, b in _differences(there, here)]
    return (
        f"{out} holds another experiment; nothing was written. It differs in\n"
        + "\n".join(lines or ["  the version of its format"])
        + "\nChoose another --out, or repeat the settings found there"
        + (f":\n  {command}" if command else ".")
    )


def _differences(there: Any, here: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, old, new) wherever two nested settings differ."""
    for key in sorted({*there, *here}):
        old, new = there.get(key, "absent"), here.get(key, "absent")
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}", old, new
