"""Per-channel and per-sample elementwise steps of the forward pass."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNITIZE_EPS = 1e-6
"""Added to a sample's mean square, so that an all-zero sample stays zero."""


def per_channel(table: Tensor, spatial: int, like: Tensor) -> Tensor:
    """Return a (C,) table shaped to broadcast over ``spatial`` trailing axes, in the dtype of ``like``."""
    return table.to(like.dtype).reshape(-1, *(1,) * spatial)


def channel_affine(x: Tensor, scale: Tensor, shift: Tensor, spatial: int) -> Tensor:
    """``scale[c] * x[n, c, ...] + shift[c]``.

    In eager mode this is the native evaluation-mode batch norm kernel: one pass forward, and a backward that yields
    the gradients of x, scale and shift together, where a separate multiply and add take twice as many passes.
    Compilers get the plain expression to fuse.

    Args:
        x: ``(N, C, *spatial)``, ``(C, *spatial)``, or ``(*, C)`` where ``spatial`` is 0.
        scale: ``(C,)``.
        shift: ``(C,)``.
        spatial: Number of axes after the channels.
    """
    native = x.dim() == 2 + spatial and x.numel() > 0 and torch.promote_types(x.dtype, scale.dtype) == scale.dtype
    if torch.compiler.is_compiling() or not native:
        return x * per_channel(scale, spatial, x) + per_channel(shift, spatial, x)
    zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
    return F.batch_norm(x, zeros, ones, scale, shift, training=False, eps=0.0)


def unitize_samples(x: Tensor, sample_dims: int, eps: float = UNITIZE_EPS) -> Tensor:
    """Divide every sample by its root mean square over its last ``sample_dims`` axes: ``x / sqrt(mean(x^2) + eps)``.

    The norm of a sample then cannot run away with depth, whatever gamma and bias are: the next layer's
    pre-activations have variance gamma^2 over the filters by construction. This is the idea of unitization (Huang and
    Yu, CVPR 2020, arXiv 2001.02814) with the root mean square as the norm, and without any statistics of the batch.

    Args:
        x: ``(..., *sample)``.
        sample_dims: Number of trailing axes that form a sample (1 for feature vectors, 1 + spatial axes for feature
            maps).
        eps: Added to the mean square.

    Returns:
        A tensor like ``x``; the norm is accumulated in float32 where ``x`` has half precision.
    """
    dims = tuple(range(-sample_dims, 0))
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    size = max(1, math.prod(x.shape[-sample_dims:]))
    # The norm, not x.square().mean(): one pass and no temporary of the size of x.
    mean_square = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=dtype).square() / size
    return x * torch.rsqrt(mean_square + eps).to(x.dtype)


class UnitizeSamples(nn.Module):
    """:func:`unitize_samples` as a module: each sample divided by its root mean square.

    Args:
        sample_dims: Number of trailing axes that form a sample.
        eps: Added to the mean square.
    """

    def __init__(self, sample_dims: int, eps: float = UNITIZE_EPS) -> None:
        super().__init__()
        self.sample_dims = sample_dims
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with every sample at unit mean square."""
        return unitize_samples(x, self.sample_dims, self.eps)

    def extra_repr(self) -> str:
        """Arguments as given."""
        return f"sample_dims={self.sample_dims}, eps={self.eps}"
