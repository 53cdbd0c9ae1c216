"""The handwritten digits that come with scikit-learn: real images without a download.

1,797 scans of 8x8 pixels with 17 grey levels (Alpaydin & Kaynak, 1998; the test part of UCI's "Optical Recognition of
Handwritten Digits"). The split is ours, as scikit-learn has none: a fifth of every digit is held out, always the same.
"""

from __future__ import annotations

import numpy as np

from flexnorm._messages import optional
from flexnorm.lab.data.images import ImageData, from_arrays
from flexnorm.lab.data.subset import stratified

TEST_IMAGES = 360


def load_digits(limit: int | None = None, seed: int = 0) -> ImageData:
    """Load the digits: 1,437 training and 360 test images of 8x8 pixels, one channel, ten classes."""
    raw = optional("sklearn.datasets", "data 'digits'", "lab").load_digits()
    x, y = raw.images.astype(np.uint8), raw.target.astype(np.int64)
    test = np.zeros(len(y), dtype=bool)
    test[stratified(y, TEST_IMAGES, seed=0)] = True
    return from_arrays("digits", x[~test], y[~test], x[test], y[test], limit=limit, seed=seed, white=16.0)
