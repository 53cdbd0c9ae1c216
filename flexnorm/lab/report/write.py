"""Writing the report: in one step, so that a reader never finds half a page."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from flexnorm.lab.report.load import load
from flexnorm.lab.report.page import page


def write_report(out_dir: str | Path) -> Path:
    """Write ``report.html`` into the folder of a comparison, recomputed from the files in that folder.

    It works on a folder at any stage: runs that are missing, unfinished, diverged or unreadable are named in the
    report. The page is one file without links to others and opens offline.

    Args:
        out_dir: The folder that ``flexnorm compare --out`` wrote: ``results.json`` and ``experiment.json`` where they
            exist, and ``runs/NORM/OPTIM/seedK/{summary.json, metrics.csv, shift.csv}``.

    Returns:
        The path of the report.

    Raises:
        FileNotFoundError: If the folder does not exist or holds nothing of a comparison.
        OSError: If the report cannot be written (a full or read-only disk); an older one stays as it was.

    Examples:
        >>> write_report("runs/digits")  # doctest: +SKIP
        PosixPath('runs/digits/report.html')
    """
    return write_text(Path(out_dir) / "report.html", page(load(out_dir)))


def write_text(path: Path, content: str) -> Path:
    """Write a text file in one step: a temporary file beside it, then a rename.

    Args:
        path: The file; its folder must exist.
        content: What it shall contain, written as UTF-8.

    Returns:
        The path.

    Raises:
        OSError: If it cannot be written; nothing is left behind and an older file stays.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes files private; a report is as readable as any new file.
        mask = os.umask(0)
        os.umask(mask)
        Path(temporary).chmod(0o666 & ~mask)
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise
    return path
