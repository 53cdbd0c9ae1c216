"""Images from a local ``.npz`` archive, read without pickle."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flexnorm.lab.data.images import ImageData, from_arrays

KEYS = ("x_train", "y_train", "x_test", "y_test")


def load_npz(path: Path, limit: int | None = None, seed: int = 0) -> ImageData:
    """Load ``x_train, y_train, x_test, y_test`` and, if present, ``classes`` (label names) from a ``.npz`` archive.

    It may have any compression that :mod:`zipfile` reads; other members are ignored.

    Raises:
        ValueError: If the file is no ``.npz`` archive, is damaged, lacks a key or holds unusable arrays.
    """
    _check_archive(path)
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    try:
        # Opened here, because np.load leaves its own file open where the archive is damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            missing = [key for key in KEYS if key not in archive.files]
            if missing:
                raise ValueError(
                    f"{path} lacks {', '.join(missing)}; it holds: {', '.join(archive.files) or 'nothing'}. "
                    f"Needed: {', '.join(KEYS)} (and optionally classes)"
                )
            # Every access of an archive member decompresses it again: read each once.
            for key in (*KEYS, "classes"):
                if key in archive.files:
                    arrays[key] = _member(path, archive, key)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}); copy or download it again") from error
    classes = [str(c) for c in arrays["classes"]] if "classes" in arrays else None
    return from_arrays(str(path), *(arrays[key] for key in KEYS), classes=classes, limit=limit, seed=seed)


def _check_archive(path: Path) -> None:
    """Refuse a file that is no zip archive, and say what it seems to be."""
    if zipfile.is_zipfile(path):
        return
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(6)
    if size == 0:
        raise ValueError(f"{path} is empty (0 bytes); copy or download it again")
    if head.startswith(b"PK"):
        raise ValueError(
            f"{path} ({size:,} bytes) is damaged or incomplete: its end is missing; copy or download it again"
        )
    if head == b"\x93NUMPY":
        raise ValueError(
            f"{path} is a single array, not a .npz archive; "
            f"save it with np.savez_compressed(path, x_train=..., y_train=..., x_test=..., y_test=...)"
        )
    raise ValueError(f"{path} ({size:,} bytes) is not a .npz archive: it does not begin like a zip file")


def _member(path: Path, archive: np.lib.npyio.NpzFile, key: str) -> npt.NDArray[np.generic]:
    """Read one array; an array of Python objects is refused with its name."""
    try:
        array: npt.NDArray[np.generic] = archive[key]
    except MemoryError:
        raise
    except Exception as error:  # a damaged member raises whatever its decompressor or NumPy's header parser does
        if "allow_pickle" in str(error):
            raise ValueError(
                f"{path}: {key} holds Python objects, which are never loaded; store plain numbers (or text for classes)"
            ) from error
        raise ValueError(f"{path}: {key} is damaged ({error}); copy or download the file again") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path}: {key} is not an array")  # a zip member that is no .npy file comes back as bytes
    return array
