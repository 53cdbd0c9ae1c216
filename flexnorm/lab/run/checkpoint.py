"""The state of a run at the end of an epoch: tensors, numbers and strings only, so that loading it never runs code."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from flexnorm.lab.files import atomic_write, writing

FORMAT = 2


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` atomically.

    Raises:
        WriteError: If the disk does not take it; the previous checkpoint is then still there.
    """
    # Through memory: torch.save reports a full disk as a RuntimeError of its archive writer.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    atomic_write(path, buffer.getvalue())


def load_checkpoint(path: Path, run: str) -> dict[str, Any]:
    """Read a checkpoint of the run with that fingerprint.

    Raises:
        ValueError: If the file is damaged, holds anything but plain data, or belongs to another run.
    """
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
    """Cut a growing file back to what it was at a checkpoint.

    Raises:
        ValueError: If it is shorter than that.
    """
    found = path.stat().st_size if path.exists() else 0
    if found < size:
        raise ValueError(
            f"{path} has {found} bytes, fewer than the {size} at the last checkpoint; "
            f"delete {path.parent} to train this run again from its start"
        )
    if found > size:
        with writing(path), path.open("r+b") as file:
            file.truncate(size)
