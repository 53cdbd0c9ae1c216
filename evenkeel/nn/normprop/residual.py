"""Sums and concatenations of branches that keep unit variance."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def normprop_add(
    x: Tensor, fx: Tensor, a: float | Tensor = 1.0, b: float | Tensor = 1.0, correlation: float = 0.0
) -> Tensor:
    """``(a x + b f(x)) / sqrt(a^2 + b^2 + 2 a b correlation)``: a weighted sum that keeps unit variance.

    The denominator is the standard deviation of the numerator if both branches have zero mean, unit variance and the
    stated correlation. Branches behind random filters are uncorrelated at initialization.

    Args:
        x: First branch, any shape.
        fx: Second branch, broadcastable with ``x``.
        a: Weight of ``x``, a number or a tensor that broadcasts.
        b: Weight of ``fx``.
        correlation: Assumed correlation of the branches, above -1 and at most 1.
    """
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        variance = a * a + b * b + 2 * correlation * a * b
        norm = variance.rsqrt() if isinstance(variance, Tensor) else variance**-0.5
        return x * (a * norm) + fx * (b * norm)
    norm = 1.0 / math.sqrt(a * a + b * b + 2 * correlation * a * b)
    # One fused pass where the first weight is left to the sum's scale.
    return torch.add(x * (a * norm), fx, alpha=b * norm)


class NormPropResidual(nn.Module):
    """``(a S(x) + b f(x)) / sqrt(a^2 + b^2 + 2 a b correlation)``: a residual block that keeps unit variance.

    Args:
        branch: f, a module whose output has zero mean and unit variance, such as a sequence of NormProp layers.
        shortcut: S, a module for skips that change shape (``NormPropConv2d(..., kernel_size=1, stride=2,
            activation="identity")``); None for the identity.
        a: Weight of the skip.
        b: Weight of the branch. Of ``L`` blocks with ``b = 1``, ``a = 1`` each halves the share of what came before;
            ``b/a`` of about ``1/sqrt(L)`` keeps the input visible at the end and bounds the gradient's growth.
        correlation: Assumed correlation of the two, above -1 and at most 1.
        trainable: Make ``a`` and ``b`` parameters; the denominator follows them.

    Raises:
        ValueError: If both weights vanish, are not finite, or the variance of the sum is not positive.

    Shape:
        Any input that the branch accepts; the output has the branch's shape.

    Example:
        >>> from evenkeel.nn.normprop import NormPropLinear
        >>> block = NormPropResidual(NormPropLinear(16, 16))
        >>> block(torch.randn(4, 16)).shape
        torch.Size([4, 16])
    """

    def __init__(
        self,
        branch: nn.Module,
        shortcut: nn.Module | None = None,
        a: float = 1.0,
        b: float = 1.0,
        *,
        correlation: float = 0.0,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        variance = a * a + b * b + 2 * correlation * a * b
        if not (math.isfinite(variance) and -1 < correlation <= 1 and variance > 0):
            raise ValueError(
                f"the sum of the branches must have a positive variance: got a={a!r}, b={b!r}, "
                f"correlation={correlation!r} (correlation must lie in (-1, 1], and a and b must not both be 0)"
            )
        self.branch = branch
        self.shortcut = shortcut
        self.correlation = float(correlation)
        self.trainable = bool(trainable)
        self.a: float | nn.Parameter = nn.Parameter(torch.tensor(float(a))) if trainable else float(a)
        self.b: float | nn.Parameter = nn.Parameter(torch.tensor(float(b))) if trainable else float(b)

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighted sum of skip and branch."""
        skip = x if self.shortcut is None else self.shortcut(x)
        fx = self.branch(x)
        if skip.shape != fx.shape:
            raise ValueError(
                f"skip of shape {tuple(skip.shape)} and branch of shape {tuple(fx.shape)} do not match; "
                "pass a shortcut that changes the shape, such as a 1x1 NormPropConv2d with activation='identity'"
            )
        return normprop_add(skip, fx, self.a, self.b, self.correlation)

    def extra_repr(self) -> str:
        """The weights."""
        return f"a={float(self.a):g}, b={float(self.b):g}, correlation={self.correlation:g}, trainable={self.trainable}"
