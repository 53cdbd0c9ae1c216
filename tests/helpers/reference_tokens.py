"""The passes over tokens as their docstrings say them, by plain operations on float64 matrices (R, C)."""

from __future__ import annotations

import torch
from torch import Tensor

from flexnorm.kernels.layout import Layout
from flexnorm.kernels.tokens import Factor, Source, Terms


def matrix(x: Tensor, layout: Layout) -> Tensor:
    samples, channels, positions = layout.size
    if layout.order == "cols":
        return x.double().reshape(samples * positions, channels)
    return x.double().reshape(samples, channels, positions).movedim(1, 2).reshape(samples * positions, channels)


def _table(terms: Terms, channels: int) -> Tensor | float:
    total: Tensor | float = 0.0
    for row, column in terms:
        wide = 1.0 if row is None else row.double().repeat_interleave(channels // row.shape[1], 1)
        total = total + wide * (1.0 if column is None else column.double().view(1, -1))
    return total


def row_moments(x: Tensor, layout: Layout, groups: int = 1) -> tuple[Tensor, Tensor]:
    values = matrix(x, layout).unflatten(1, (groups, -1))
    return values.mean(2), values.var(2, correction=0)


def column_moments(x: Tensor, layout: Layout, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    values = matrix(x, layout)
    weights = torch.ones(len(values)) if weights is None else weights
    used = weights > 0
    values, share = values[used], (weights[used].double() / weights.double().sum()).unsqueeze(1)
    mean = (share * values).sum(0, keepdim=True)
    return mean, (share * (values - mean) ** 2).sum(0, keepdim=True)


def affine(x: Tensor, scale: Terms, shift: Terms, layout: Layout) -> Tensor:
    return matrix(x, layout) * _table(scale, layout.size[1]) + _table(shift, layout.size[1])


def sums(g: Tensor, x: Tensor, scale: Terms, shift: Terms, layout: Layout) -> tuple[list[Factor], list[Factor]]:
    """By automatic differentiation."""
    incoming = matrix(g, layout)
    factors = [[None if t is None else t.double().clone().requires_grad_() for t in term] for term in (*scale, *shift)]
    terms = tuple((row, column) for row, column in factors)
    y = affine(x, terms[: len(scale)], terms[len(scale) :], layout)
    leaves = [t for term in factors for t in term if t is not None]
    found = iter(torch.autograd.grad(y.expand(incoming.shape), leaves, incoming))
    grads = [(None if r is None else next(found), None if c is None else next(found)) for r, c in terms]
    return grads[: len(scale)], grads[len(scale) :]


def combine(
    g: Tensor, x: Tensor, scale: Terms | None, rows: Source | None, columns: Source | None, layout: Layout
) -> Tensor:
    values, channels = matrix(x, layout), layout.size[1]
    dx = matrix(g, layout) * (1.0 if scale is None else _table(scale, channels))
    for source in (rows, columns):
        if source is None:
            continue
        tables = [torch.zeros_like(source.mean) if t is None else t for t in (source.mean, source.dmean, source.dvar)]
        if source is rows:
            tables = [t.repeat_interleave(channels // t.shape[1], 1) for t in tables]
        mean, dmean, dvar = (t.double() for t in tables)
        weights = torch.ones(len(values)) if source.weights is None else source.weights
        used = weights > 0
        part = (dmean + 2 * dvar * (values - mean)) / source.size
        dx = dx + torch.where(used.unsqueeze(1), weights.double().unsqueeze(1) * part, 0)
    return dx
