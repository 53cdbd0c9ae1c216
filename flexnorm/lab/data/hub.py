"""Images from the Hugging Face hub by name; the ``datasets`` package is an optional extra."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from flexnorm._messages import optional
from flexnorm.lab.data.images import ImageData, from_arrays


def load_hub(spec: str, limit: int | None = None, seed: int = 0) -> ImageData:
    """Load ``hf:NAME`` or ``hf:NAME:CONFIG`` (``hf:ylecun/mnist``, ``hf:uoft-cs/cifar100:cifar100``).

    The image column is the first of type ``Image``, the label column the first of type ``ClassLabel``; the test images
    are the split ``test``, or ``validation`` or ``valid`` where there is none.

    Raises:
        ImportError: If ``datasets`` is not installed.
        ValueError: If the data set cannot be found or lacks a split, images or labels.
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
    arrays: list[npt.NDArray[np.generic]] = []
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
