"""The backward of tokens that are normalized by moments of their own, as layer and RMS normalization are, in one pass.

A rule stands between the sums over a token and its gradient; but if what it makes of the moments of a token is made of
nothing else, the derivatives are numbers of that token too, known before any gradient comes: then the kernel needs no
rule.
"""

from __future__ import annotations

import functools
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexnorm.kernels.build import declare, library, threads
from flexnorm.kernels.layout import Layout, table_dtype
from flexnorm.kernels.normalization import SUFFIXES
from flexnorm.kernels.tokens import Terms

_SOURCE = Path(__file__).with_name("rowwise.c")


class Slopes(NamedTuple):
    """Derivatives (R, 1) of the factor r of the scale and q of the shift by mean and variance; ``None`` for zero."""

    r_mean: Tensor | None
    r_var: Tensor | None
    q_mean: Tensor | None
    q_var: Tensor | None


@functools.cache
def load() -> dict[tuple[str, torch.dtype], Any] | None:
    """Return the kernels by memory order and type, building them if this machine has not yet; ``None`` if not."""
    found = library(_SOURCE, "rowwise")
    if found is None:
        return None
    return {
        (order, dtype): declare(kernel, "p")
        for order in ("rows", "cols")
        for dtype, suffix in SUFFIXES.items()
        if (kernel := getattr(found[0], f"rowwise_{order}_{suffix}", None)) is not None
    }


def fits(x: Tensor, scale: Terms, shift: Terms, layout: Layout) -> bool:
    """Whether ``y = k (r x + q) + b`` with one number r and q for each token, and there is a kernel for it."""
    if layout.backend != "c" or len(scale) != 1:
        return False
    (r, k), with_row = scale[0], [term for term in shift if term[0] is not None]
    if r is None or r.shape[1] != 1 or len(with_row) > 1:
        return False
    if with_row and (with_row[0][1] is not k or with_row[0][0].shape[1] != 1):  # type: ignore[union-attr]
        return False
    kernels = load()
    return kernels is not None and (layout.order, x.dtype) in kernels


def backward(
    g: Tensor, x: Tensor, mean: Tensor | None, scale: Terms, shift: Terms, slopes: Slopes, needed: bool, layout: Layout
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradient of ``x``, and, where ``needed``, (C,) for k and for b.

    Args:
        g: Gradient of the result, strides of ``x``.
        x: Tokens.
        mean: (R, 1) of each token; ``None`` for moments about zero.
        scale: As :func:`fits` asks for.
        shift: As :func:`fits` asks for.
        slopes: Derivatives of r and q.
        needed: Whether there is anything to be learned for each channel.
        layout: That of ``x``.
    """
    kernels = load()
    assert kernels is not None
    (r, k), (samples, channels, positions) = scale[0], layout.size
    q = next((row for row, _ in shift if row is not None), None)
    sums = torch.empty((2, channels), dtype=table_dtype(x.dtype)) if needed else None
    dx = torch.empty_like(x)
    tables = [None if t is None else t.contiguous() for t in (mean, r, q, k, *slopes)]
    of_k, of_b = (None, None) if sums is None else (sums[0], sums[1])
    words = [0 if t is None else t.data_ptr() for t in (g, x, dx, *tables, of_k, of_b)]
    words += [samples * positions, channels, positions, threads(x.numel())]
    kernels[layout.order, x.dtype](struct.pack("17q", *words))
    return dx, of_k, of_b
