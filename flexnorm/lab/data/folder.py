"""Images from a folder: ``train/CLASS/*.png`` and ``val/CLASS/*.png`` (or ``test/``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from flexnorm.lab.data.images import ImageData, from_arrays

T = TypeVar("T")
_GREY = ("1", "L", "I;16", "I", "LA")
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".webp", ".tif", ".tiff"}


def load_folder(path: Path, limit: int | None = None, seed: int = 0) -> ImageData:
    """Load an image folder; images become RGB unless all of them are greyscale.

    The folder holds ``train`` and one of ``val``, ``valid``, ``validation``, ``test``. All images must have the same
    size. The classes are the folder names under ``train/`` in sorted order.

    Raises:
        ValueError: If a folder is missing or empty, the classes differ, an image cannot be read or sizes differ.
        ImportError: If Pillow is missing.
    """
    train = path / "train"
    test = next((path / n for n in ("val", "valid", "validation", "test") if (path / n).is_dir()), None)
    if not train.is_dir() or test is None:
        found = ", ".join(sorted(p.name + "/" * p.is_dir() for p in path.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"{path} is not an image folder: expected train/CLASS/*.png and val/CLASS/*.png (or test/); "
            f"it holds: {found}"
        )
    classes = _classes(train)
    extra = sorted(set(_classes(test)) - set(classes))
    if extra:
        raise ValueError(
            f"{test} holds the classes {', '.join(extra[:5])}, which {train} does not; both need the same class folders"
        )
    files = {part: _files(part, classes) for part in (train, test)}
    grey = all(_open(file, lambda image: image.mode in _GREY) for listed in files.values() for file, _ in listed)
    size: tuple[int, int] | None = None
    arrays: list[npt.NDArray[np.generic]] = []
    for part in (train, test):
        images = []
        for file, _ in files[part]:
            image = _open(file, lambda opened: np.asarray(opened.convert("L" if grey else "RGB"), dtype=np.uint8))
            size = size or image.shape[:2]
            if image.shape[:2] != size:
                raise ValueError(
                    f"{file} is {image.shape[1]}x{image.shape[0]} pixels, the images before it {size[1]}x{size[0]}; "
                    f"all images must have one size: resize them first"
                )
            images.append(image)
        arrays += [np.stack(images), np.array([label for _, label in files[part]], dtype=np.int64)]
    return from_arrays(str(path), *arrays, classes=classes, limit=limit, seed=seed)


def _classes(part: Path) -> list[str]:
    """Return the class folders of one part, sorted."""
    names = sorted(p.name for p in part.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise ValueError(f"{part} holds no class folders; expected {part}/CLASS/*.png")
    return names


def _files(part: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """Return (file, label) for every image of one part, in a fixed order."""
    listed = [
        (file, label)
        for label, name in enumerate(classes)
        if (part / name).is_dir()
        # Some data sets nest one level deeper (CLASS/images/*.JPEG).
        for file in sorted((part / name).rglob("*"))
        if file.suffix.lower() in SUFFIXES
    ]
    if not listed:
        raise ValueError(f"{part} holds no images; looked for {', '.join(sorted(SUFFIXES))} under {part}/CLASS/")
    return listed


def _open(file: Path, use: Callable[[Any], T]) -> T:
    """Return what `use` makes of an opened image."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return use(image)
    except OSError as error:
        raise ValueError(f"{file} is damaged or not an image ({error}); copy it again or remove it") from error
