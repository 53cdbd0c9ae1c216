"""Sums and concatenations of branches that keep unit variance."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from flexnorm.nn.normprop.elementwise import per_channel


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
        inverse = torch.as_tensor(a * a + b * b + 2 * correlation * a * b).rsqrt()
        return x * (a * inverse) + fx * (b * inverse)
    norm = 1.0 / math.sqrt(a * a + b * b + 2 * correlation * a * b)
    # One fused pass where the first weight is left to the sum's scale.
    return torch.add(x * (a * norm), fx, alpha=b * norm)


class NormPropResidual(nn.Module):
    """``(a S(x) + b f(x)) / sqrt(a^2 + b^2 + 2 a b correlation)``: a residual block that keeps unit variance.

    Args:
        branch: f, a module whose output, of the shape of the block's, has zero mean and unit variance, such as a
            sequence of NormProp layers.
        shortcut: S, a module for skips that change shape (``NormPropConv2d(..., kernel_size=1, stride=2,
            activation="identity")``); None for the identity.
        a: Weight of the skip.
        b: Weight of the branch. Of ``L`` blocks with ``b = 1``, ``a = 1`` each halves the share of what came before;
            ``b/a`` of about ``1/sqrt(L)`` keeps the input visible at the end and bounds the gradient's growth.
        correlation: Assumed correlation of the two, above -1 and at most 1.
        trainable: Make ``a`` and ``b`` parameters; the denominator follows them.

    Raises:
        ValueError: If both weights vanish, are not finite, or the variance of the sum is not positive.

    Examples:
        >>> from flexnorm.nn.normprop import NormPropLinear
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
        a, b = (float(w.detach()) if isinstance(w, Tensor) else w for w in (self.a, self.b))
        return f"a={a:g}, b={b:g}, correlation={self.correlation:g}, trainable={self.trainable}"


class NormPropAdd(nn.Module):
    """``(a x + b y) / sqrt(a^2 + b^2 + 2 a b correlation)`` with weights per channel: a sum that keeps unit variance.

    Args:
        channels: Number of channels C.
        spatial: Number of axes after the channels.
        device: Of the weights.
        dtype: Of the weights.

    Attributes:
        a: ``(C,)``, weights of the first branch, initially 1.
        b: ``(C,)``, weights of the second, initially 1.
        correlation: Buffer ``(C,)``: assumed correlation of the branches, initially 0.

    Examples:
        >>> NormPropAdd(4)(torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)).shape
        torch.Size([2, 4, 8, 8])
    """

    correlation: Tensor

    def __init__(
        self,
        channels: int,
        *,
        spatial: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spatial = spatial
        self.a = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))
        self.register_buffer("correlation", torch.zeros(channels, device=device, dtype=dtype))

    def variance(self) -> Tensor:
        """``a^2 + b^2 + 2 a b correlation``, ``(C,)``: by whose root the sum is divided."""
        return self.a.square() + self.b.square() + 2 * self.correlation * self.a * self.b

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the weighted sum of ``x`` and ``y``, both ``(N, C, *spatial)``."""
        inverse = self.variance().clamp_min(torch.finfo(self.a.dtype).tiny).rsqrt()
        a, b = (per_channel(table * inverse, self.spatial, x) for table in (self.a, self.b))
        return torch.addcmul(x * a, y, b)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.a.numel()}, spatial={self.spatial}"


class NormPropConcat(nn.Module):
    """Concatenate branches that see the same input: ``cat([f(x) for f in branches], dim)``.

    Concatenated units of zero mean and unit variance need no correction: the next layer's unit filters reach over all
    of them. But a branch with more units then has a larger share of the next pre-activation's variance;
    ``balance=True`` scales each branch by ``sqrt(C / (n C_i))`` (n branches, C units in all, C_i in branch i), so
    that all have the same share and the mean square over units stays 1.

    Args:
        branches: Modules whose outputs agree in all axes but ``dim``; ``nn.Identity()`` for a dense skip.
        dim: Axis along which to concatenate.
        balance: Give all branches the same share.

    Raises:
        ValueError: If there are no branches.

    Examples:
        >>> from flexnorm.nn.normprop import NormPropLinear
        >>> NormPropConcat([nn.Identity(), NormPropLinear(8, 4)])(torch.randn(2, 8)).shape
        torch.Size([2, 12])
    """

    def __init__(self, branches: Iterable[nn.Module], dim: int = 1, *, balance: bool = False) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        if not len(self.branches):
            raise ValueError("NormPropConcat needs at least one branch")
        self.dim = dim
        self.balance = bool(balance)

    def forward(self, x: Tensor) -> Tensor:
        """Return the concatenated outputs."""
        outputs = [branch(x) for branch in self.branches]
        if self.balance:
            counts = [y.shape[self.dim] for y in outputs]
            share = sum(counts) / len(counts)
            outputs = [y * math.sqrt(share / count) for y, count in zip(outputs, counts, strict=True)]
        return torch.cat(outputs, self.dim)

    def extra_repr(self) -> str:
        """Arguments as given."""
        return f"dim={self.dim}, balance={self.balance}"
