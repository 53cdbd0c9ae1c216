"""Deterministic stratified subsets: the same labels, count and seed always give the same indices."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


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
