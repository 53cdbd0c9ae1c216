"""One function from what a user writes to tensors."""

from __future__ import annotations

from pathlib import Path

from flexnorm._messages import unknown_name
from flexnorm.lab.data.digits import load_digits
from flexnorm.lab.data.folder import load_folder
from flexnorm.lab.data.hub import load_hub
from flexnorm.lab.data.images import ImageData
from flexnorm.lab.data.npz import load_npz

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
