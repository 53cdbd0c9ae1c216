r"""The lower bound from moments that a normalizer leaves free (Huang & Yu, arXiv 2001.02814).

$f(t) = \min(|t|, B)^k / (k B^{k-1})$ has slope at most 1, so by Kantorovich-Rubinstein duality
$|E f(X) - E f(Y)| \le W_1(X, Y)$: unequal moments of order k > 2 keep W_1 away from 0 however well the first two agree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexnorm.transport._samples import check_order, check_sample


def truncated_moment(size: Tensor, order: float, limit: Tensor) -> Tensor:
    r"""The 1-Lipschitz function $\min(s, B)^k / (k B^{k-1})$ of absolute values s.

    Args:
        size: (n, d) absolute values.
        order: The order k, at least 1.
        limit: (d,) truncation B of each coordinate, not negative; where it is 0 the function is 0.

    Returns:
        (n, d), in the units of ``size``.
    """
    safe = torch.where(limit > 0, limit, torch.ones_like(limit))
    return torch.minimum(size, limit).div(safe).pow(order) * limit / order


def moment_lower_bound(x: Tensor, y: Tensor, order: float = 4, limit: Tensor | float | None = None) -> Tensor:
    r"""Lower bound of W_1 of every coordinate from truncated absolute moments about 0.

    $W_1(X_c, Y_c) \ge |E \min(|X_c|, B)^k - E \min(|Y_c|, B)^k| / (k B^{k-1})$. The Euclidean norm of the result is a
    lower bound of W_1 of the vectors. The smaller B is, while still reaching beyond where the two distributions differ,
    the tighter the bound.

    Args:
        x: (n, d) sample; centre it first if moments about the mean are meant.
        y: (m, d) sample.
        order: The order k, at least 1.
        limit: The truncation B, one positive number or (d,); ``None`` for the largest absolute value of each coordinate
            in both samples.

    Returns:
        (d,) in the units of the samples.

    Raises:
        TypeError: A sample is not a floating-point tensor.
        ValueError: Shapes or devices that do not fit, ``order`` below 1, or a limit that is not positive.

    Examples:
        >>> x = torch.tensor([[-1.0], [1.0]])
        >>> moment_lower_bound(x, 2 * x, order=4, limit=2.0)
        tensor([0.4688])
    """
    order = check_order(order)
    check_sample("x", x)
    check_sample("y", y)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or x.device != y.device or 0 in (len(x), len(y)):
        raise ValueError(
            f"x and y must be (n, d) and (m, d) with n and m at least 1 on one device, got {tuple(x.shape)} on "
            f"{x.device} and {tuple(y.shape)} on {y.device}"
        )
    x, y = x.abs(), y.abs()
    if limit is None:
        bound = torch.maximum(x.amax(0), y.amax(0))
    else:
        bound = torch.as_tensor(limit, dtype=x.dtype, device=x.device).expand(x.shape[-1:])
        if not bool((bound > 0).all()):
            raise ValueError(f"limit must be positive, got {limit!r}")
    return (truncated_moment(x, order, bound).mean(0) - truncated_moment(y, order, bound).mean(0)).abs()
