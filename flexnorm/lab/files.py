"""Writing that survives a crash: a file is either the old one or the new one, never half of one."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class WriteError(OSError):
    """A file could not be written (full or read-only disk, quota, rights); nothing that was there is damaged."""


class BusyError(RuntimeError):
    """Another process is writing to the same folder."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the operating system says about a failed write into one sentence that names the file."""
    try:
        yield
    except OSError as error:
        raise WriteError(error.errno, f"cannot write {path}: {error.strerror or error}") from error


def check_folder(path: Path) -> None:
    """Raise FileNotFoundError if there is no folder for the file ``path``."""
    if not (folder := path.expanduser().absolute().parent).is_dir():
        raise FileNotFoundError(f"there is no folder {folder} to write {path.name} to")


def atomic_write(path: Path, content: bytes) -> None:
    """Write a file in one step: to a neighbour, to the disk, then rename; on a WriteError it is as it was before."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)  # noqa: PTH105  (tests put a failing disk in its place)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def plain(value: Any, *, finite: bool = True) -> Any:
    """Return `value` as dictionaries and lists, with None for numbers that JSON cannot express (``finite``)."""
    if isinstance(value, float):
        return value if math.isfinite(value) or not finite else None
    if isinstance(value, Mapping):
        return {str(key): plain(item, finite=finite) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, finite=finite) for item in value]
    return value


def dump_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinity become null."""
    atomic_write(path, (json.dumps(plain(value), indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that this package wrote; ValueError if the file is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to have it made again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged (not a JSON object); delete it to have it made again")
    return value


def append_rows(path: Path, header: str, rows: list[list[Any]]) -> int:
    """Append rows to a CSV file, with its header if it is new, force them to the disk and return the new size in bytes.

    Floats are written by ``repr``, so that reading gives back the same bits.
    """
    text = "".join(",".join(repr(v) if isinstance(v, float) else str(v) for v in row) + "\n" for row in rows)
    with writing(path), path.open("ab") as file:
        if file.tell() == 0:
            text = header + "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a CSV file written by :func:`append_rows`; an absent file has no rows."""
    if not path.exists():
        return []
    header, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
    return [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a folder for this process, else BusyError; the operating system lets go of it if the process is killed."""
    path = folder / ".lock"
    with writing(path):
        file = path.open("a+")
    with file:
        try:
            import fcntl
        except ImportError:  # pragma: no cover  (no such lock on Windows: two writers are then the user's care)
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise BusyError(
                f"{folder} is in use by another flexnorm process (id {owner}); wait for it or choose another --out"
            ) from None
        with writing(path):
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield
