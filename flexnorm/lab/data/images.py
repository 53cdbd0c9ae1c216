"""One type for images, the checks that every source has to pass to become one, and stratified subsets."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class ImageData:
    """A data set of labelled images, standardized per channel.

    Attributes:
        name: What the user asked for (``"digits"``, a path, ``"hf:NAME"``).
        x_train: (N, C, H, W) float32; each channel has mean 0 and standard deviation 1 over the training images.
        y_train: (N,) int64 labels, 0 to ``len(classes) - 1``.
        x_test: (M, C, H, W) float32, standardized by the statistics of the training images.
        y_test: (M,) int64.
        classes: Label names.
        mean: (C,) float32, the training mean of each channel before standardization, in pixel values scaled to [0, 1].
        std: (C,) float32, the training standard deviation, same unit; 1 for a constant channel.
        digest: SHA-256 of pixels and labels: two data sets with equal digests are the same data.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: tuple[str, ...]
    mean: Tensor
    std: Tensor
    digest: str

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one image."""
        c, h, w = self.x_train.shape[1:]
        return c, h, w

    def describe(self) -> str:
        """Return one line in words: size, shape and classes."""
        c, h, w = self.shape
        return (
            f"{self.name}: {len(self.x_train)} train + {len(self.x_test)} test images, "
            f"{c} channel{'s' if c > 1 else ''}, {h}x{w}, {self.num_classes} classes"
        )


def from_arrays(
    name: str,
    x_train: Array,
    y_train: Array,
    x_test: Array,
    y_test: Array,
    *,
    classes: Sequence[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    white: float = 255.0,
) -> ImageData:
    """Check four arrays, ValueError for what is unusable, and turn them into standardized tensors.

    Args:
        name: Name of the data set, for messages and reports.
        x_train: (N, H, W) or (N, H, W, C) pixels, uint8 or floating point.
        y_train: (N,) integer labels from 0.
        x_test: (M, H, W) or (M, H, W, C) pixels.
        y_test: (M,) integer labels from 0.
        classes: Label names; by default the numbers 0 to the largest label.
        limit: Keep a stratified subset of at most this many training and at most this many test images.
        seed: Which subset.
        white: Value of a uint8 pixel that stands for 1.0; floating-point pixels are taken as they are.
    """
    x_train, x_test = _pixels(name, "x_train", x_train), _pixels(name, "x_test", x_test)
    if x_train.shape[1:] != x_test.shape[1:]:
        raise ValueError(
            f"{name}: training images are (height, width, channels) = {x_train.shape[1:]} but test images are "
            f"{x_test.shape[1:]}; both must have the same shape"
        )
    if x_train.dtype != x_test.dtype:
        raise ValueError(
            f"{name}: x_train is {x_train.dtype} but x_test is {x_test.dtype}; both must have the same type"
        )
    y_train = _labels(name, "y_train", y_train, len(x_train))
    y_test = _labels(name, "y_test", y_test, len(x_test))
    names = tuple(map(str, range(int(max(y_train.max(), y_test.max())) + 1) if classes is None else classes))
    for key, y in (("y_train", y_train), ("y_test", y_test)):
        if y.max() >= len(names):
            raise ValueError(
                f"{name}: {key} holds label {y.max()}, but there are {len(names)} classes (0 to {len(names) - 1})"
            )
    present = np.unique(y_train)
    if len(present) < 2:
        raise ValueError(f"{name}: all training images have label {y_train[0]}; training needs at least two classes")
    if unseen := sorted(set(np.unique(y_test).tolist()) - set(present.tolist())):
        raise ValueError(
            f"{name}: y_test holds label {unseen[0]}, which no training image has; its labels are {present.min()} to "
            f"{present.max()}"
        )
    if classes is None and (gaps := sorted(set(range(int(y_train.max()) + 1)) - set(present.tolist()))):
        raise ValueError(
            f"{name}: labels go up to {y_train.max()}, but no training image has label {gaps[0]} ({len(gaps)} such "
            f"labels); number the classes from 0 without gaps, or give the names of all as `classes`"
        )
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 image, not {limit}")
    if limit is not None:
        kept, tested = (stratified(y, min(limit, len(y)), seed) for y in (y_train, y_test))
        x_train, y_train, x_test, y_test = x_train[kept], y_train[kept], x_test[tested], y_test[tested]
    sha = hashlib.sha256()
    for a in (x_train, y_train, x_test, y_test):
        sha.update(f"{a.shape}{a.dtype.str}".encode())
        sha.update(np.ascontiguousarray(a).data)
    train, test = _to_tensor(x_train, white), _to_tensor(x_test, white)
    # float64 accumulators: 5e7 pixels summed in float32 would lose the last digits of the mean.
    mean = train.mean(dim=(0, 2, 3), dtype=torch.float64)
    std = torch.stack([train[:, c].double().std(correction=0) for c in range(train.shape[1])])
    std = torch.where(std > 0, std, torch.ones_like(std))
    mean, std = mean.float(), std.float()
    for images in (train, test):
        images.sub_(mean[:, None, None]).div_(std[:, None, None])
    labels = [torch.from_numpy(y.astype(np.int64)) for y in (y_train, y_test)]
    return ImageData(name, train, labels[0], test, labels[1], names, mean, std, sha.hexdigest())


def _pixels(name: str, key: str, x: Array) -> Array:
    """Check one array of images and return it as (N, H, W, C)."""
    if x.ndim not in (3, 4):
        raise ValueError(
            f"{name}: {key} has shape {x.shape}; expected (images, height, width) or (images, height, width, channels)"
        )
    if x.shape[0] == 0:
        raise ValueError(f"{name}: {key} is empty (shape {x.shape}); at least one image is needed")
    if 0 in x.shape:
        raise ValueError(f"{name}: the images of {key} have no pixels (shape {x.shape})")
    x = x[..., None] if x.ndim == 3 else x
    if x.shape[1] <= 4 < x.shape[3]:
        raise ValueError(
            f"{name}: {key} has shape {x.shape}, which looks like channels first; "
            f"store images channel-last, (images, height, width, channels), e.g. with x.transpose(0, 2, 3, 1)"
        )
    if x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"{name}: {key} has type {x.dtype}; pixels must be uint8 (0 to 255) or floating point")
    if np.issubdtype(x.dtype, np.floating) and not np.isfinite(x).all():
        raise ValueError(f"{name}: {key} holds NaN or infinite pixels")
    return x


def _labels(name: str, key: str, y: Array, count: int) -> npt.NDArray[np.int64]:
    """Check one array of labels and return it as int64."""
    if y.ndim != 1:
        raise ValueError(f"{name}: {key} has shape {y.shape}; expected one integer label per image, shape ({count},)")
    if not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"{name}: {key} has type {y.dtype}; labels must be integers from 0")
    if len(y) != count:
        images = f"x_{key.removeprefix('y_')} has {count} images"
        raise ValueError(f"{name}: {key} has {len(y)} labels but {images}; each image needs one label")
    if y.min() < 0:
        raise ValueError(f"{name}: {key} holds the negative label {y.min()}; labels must be integers from 0")
    return y.astype(np.int64)


def _to_tensor(x: Array, white: float) -> Tensor:
    """Turn (N, H, W, C) pixels into a contiguous (N, C, H, W) float32 tensor; uint8 is divided by `white`."""
    images = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)).astype(np.float32))
    return images.div_(white) if x.dtype == np.uint8 else images


def shares(sizes: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Return how many of `count` draws each class gets: proportional to its size, by the largest-remainder rule.

    (K,) sizes give (K,) integers that sum to `count`, at most their sum; none exceeds the size of its class.
    """
    exact = sizes * (count / sizes.sum())
    given: npt.NDArray[np.int64] = np.floor(exact).astype(np.int64)
    # A stable sort breaks ties by class number, so that the result does not depend on the platform's sort.
    order = np.argsort(-(exact - given), kind="stable")
    given[order[: count - given.sum()]] += 1
    return given


def stratified(labels: npt.ArrayLike, count: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Return the indices of a subset in which every class keeps its share.

    Args:
        labels: (N,) integer labels.
        count: Size of the subset, 1 to N.
        seed: Which of the subsets. The stream behind it (NumPy's legacy generator) never changes between versions.

    Returns:
        (count,) indices in ascending order.

    Raises:
        ValueError: If `count` is not between 1 and the number of labels.

    Examples:
        >>> stratified([0, 0, 1, 1, 1, 1], 3).tolist()
        [1, 2, 4]
    """
    y = np.asarray(labels)
    if not 1 <= count <= len(y):
        raise ValueError(f"a subset of {len(y)} images must have between 1 and {len(y)} images, not {count}")
    rng = np.random.RandomState(seed)  # its stream is frozen by NumPy's compatibility policy
    classes, sizes = np.unique(y, return_counts=True)
    chosen = [
        np.flatnonzero(y == label)[rng.permutation(size)[:share]]
        for label, size, share in zip(classes, sizes, shares(sizes, count), strict=True)
    ]
    return np.sort(np.concatenate(chosen)).astype(np.int64)
