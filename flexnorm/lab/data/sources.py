"""Images as tensors from what a user writes: digits, a ``.npz`` file, an image folder, the Hugging Face hub.

The digits are real images without a download: 1,797 scans of 8x8 pixels with 17 grey levels (Alpaydin & Kaynak, 1998;
the test part of UCI's "Optical Recognition of Handwritten Digits"). The split is ours, as scikit-learn has none: a
fifth of every digit is held out, always the same.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from flexnorm._messages import optional, unknown_name
from flexnorm.lab.data.images import Array, ImageData, from_arrays, stratified

SOURCES = "'digits', a .npz file, an image folder with train/ and val/ (or test/), or 'hf:NAME'"


def load(spec: str, limit: int | None = None, seed: int = 0) -> ImageData:
    """Load a data set as standardized tensors.

    Args:
        spec: One of

            * ``"digits"``: the 1,797 handwritten 8x8 digits that come with scikit-learn, 1,437 for training and 360 for
              testing (a fixed stratified split); needs no download;
            * a path to a ``.npz`` file with ``x_train, y_train, x_test, y_test`` (images channel-last or without
              channels, uint8 or floating point) and optionally ``classes``; read without pickle;
            * a path to a folder with ``train/CLASS/*.png`` and ``val/CLASS/*.png`` (or ``test/``);
            * ``"hf:NAME"`` or ``"hf:NAME:CONFIG"``: a data set of the Hugging Face hub (needs ``flexnorm[hf]``).
        limit: Keep a stratified subset of at most this many training images and at most this many test images.
        seed: Which subset; the split itself never depends on it.

    Returns:
        The images, standardized per channel by the mean and standard deviation of the training images in use.

    Raises:
        ValueError: If the spec is unknown or the data is damaged or not usable.
        FileNotFoundError: If the path does not exist.
        ImportError: If an optional dependency is missing.

    Examples:
        >>> load("digits").describe()
        'digits: 1437 train + 360 test images, 1 channel, 8x8, 10 classes'
    """
    if spec == "digits":
        return load_digits(limit, seed)
    if spec.startswith("hf:"):
        return load_hub(spec, limit, seed)
    path = Path(spec).expanduser()
    if path.is_dir():
        return load_folder(path, limit, seed)
    if path.is_file():
        if path.suffix != ".npz":
            raise ValueError(
                f"{spec}: a data file must be a .npz archive, not {path.suffix or 'a file without suffix'!r}; "
                f"valid: {SOURCES}"
            )
        return load_npz(path, limit, seed)
    if path.suffix or len(path.parts) > 1:
        raise FileNotFoundError(f"no data at {spec} (looked for {path.absolute()}); valid: {SOURCES}")
    raise ValueError(f"{unknown_name('data set', spec, ['digits'])}; or give {SOURCES}")


def load_digits(limit: int | None = None, seed: int = 0) -> ImageData:
    """Load the digits: 1,437 training and 360 test images of 8x8 pixels, one channel, ten classes."""
    raw = optional("sklearn.datasets", "data 'digits'", "lab").load_digits()
    x, y = raw.images.astype(np.uint8), raw.target.astype(np.int64)
    test = np.zeros(len(y), dtype=bool)
    test[stratified(y, 360, seed=0)] = True
    return from_arrays("digits", x[~test], y[~test], x[test], y[test], limit=limit, seed=seed, white=16.0)


T = TypeVar("T")
_GREY = ("1", "L", "I;16", "I", "LA")
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".webp", ".tif", ".tiff"}


def load_folder(path: Path, limit: int | None = None, seed: int = 0) -> ImageData:
    """Load an image folder; images become RGB unless all of them are greyscale.

    The folder holds ``train`` and one of ``val``, ``valid``, ``validation``, ``test``. All images must have the same
    size. The classes are the folder names under ``train/`` in sorted order.
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
    if extra := sorted(set(_classes(test)) - set(classes)):
        raise ValueError(
            f"{test} holds the classes {', '.join(extra[:5])}, which {train} does not; both need the same class folders"
        )
    files = {part: _files(part, classes) for part in (train, test)}
    grey = all(_open(file, lambda image: image.mode in _GREY) for listed in files.values() for file, _ in listed)
    size: tuple[int, int] | None = None
    arrays: list[Array] = []
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


def load_hub(spec: str, limit: int | None = None, seed: int = 0) -> ImageData:
    """Load ``hf:NAME`` or ``hf:NAME:CONFIG`` (``hf:ylecun/mnist``, ``hf:uoft-cs/cifar100:cifar100``).

    The image column is the first of type ``Image``, the label column the first of type ``ClassLabel``; the test images
    are the split ``test``, or ``validation`` or ``valid`` where there is none.
    """
    name, _, config = spec.removeprefix("hf:").partition(":")
    if not name:
        raise ValueError(f"{spec!r} names no data set; write for example hf:ylecun/mnist or hf:uoft-cs/cifar10")
    datasets = optional("datasets", spec, "hf")
    try:
        splits: Any = datasets.load_dataset(name, config or None)
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise ValueError(f"{spec} could not be loaded from the Hugging Face hub: {error}") from error
    test = next((part for part in ("test", "validation", "valid") if part in splits), None)
    if "train" not in splits or test is None:
        raise ValueError(f"{spec} has the splits {', '.join(splits)}; needed: train, and test or validation")
    features = splits["train"].features
    image = next((key for key, kind in features.items() if type(kind).__name__ == "Image"), None)
    label = next((key for key, kind in features.items() if type(kind).__name__ == "ClassLabel"), None)
    if image is None or label is None:
        kinds = ", ".join(f"{key} ({type(kind).__name__})" for key, kind in features.items())
        raise ValueError(f"{spec} has the columns {kinds}; needed: one of type Image and one of type ClassLabel")
    arrays: list[Array] = []
    modes = {picture.mode for part in ("train", test) for picture in splits[part][image]}
    mode = "L" if modes <= {"1", "L"} else "RGB"
    for part in ("train", test):
        pictures = [np.asarray(picture.convert(mode), dtype=np.uint8) for picture in splits[part][image]]
        if len({picture.shape for picture in pictures}) > 1:
            raise ValueError(
                f"{spec}: the images of {part} differ in size; only data sets of one image size can be used"
            )
        arrays += [np.stack(pictures), np.array(splits[part][label], dtype=np.int64)]
    return from_arrays(spec, *arrays, classes=features[label].names, limit=limit, seed=seed)


KEYS = ("x_train", "y_train", "x_test", "y_test")


def load_npz(path: Path, limit: int | None = None, seed: int = 0) -> ImageData:
    """Load ``x_train, y_train, x_test, y_test`` and, if present, ``classes`` (label names) from a ``.npz`` archive.

    It may have any compression that :mod:`zipfile` reads; other members are ignored.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} {_no_archive(path)}")
    arrays: dict[str, Array] = {}
    try:
        # Opened here, because np.load leaves its own file open where the archive is damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if missing := [key for key in KEYS if key not in archive.files]:
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


def _no_archive(path: Path) -> str:
    """Return what a file that is no zip archive seems to be."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(6)
    if size == 0:
        return "is empty (0 bytes); copy or download it again"
    if head.startswith(b"PK"):
        return f"({size:,} bytes) is damaged or incomplete: its end is missing; copy or download it again"
    if head == b"\x93NUMPY":
        call = "np.savez_compressed(path, x_train=..., y_train=..., x_test=..., y_test=...)"
        return f"is a single array, not a .npz archive; save it with {call}"
    return f"({size:,} bytes) is not a .npz archive: it does not begin like a zip file"


def _member(path: Path, archive: np.lib.npyio.NpzFile, key: str) -> Array:
    """Read one array; an array of Python objects is refused with its name."""
    try:
        array: Array = archive[key]
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
