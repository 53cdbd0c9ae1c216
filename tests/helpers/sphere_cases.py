"""Weights, gradients and the two optimizers with their references, for all optimizer tests."""

import torch

from flexnorm.optim import SGDG, AdamG, ReferenceAdamG, ReferenceSGDG

PAIRS = {"sgdg": (SGDG, ReferenceSGDG), "adamg": (AdamG, ReferenceAdamG)}

# Two of one shape and two of one row length (packed together), wide, tall, one row, and one beyond the chunk size.
SHAPES = [(6, 4, 3, 3), (6, 4, 3, 3), (8, 36), (3, 50), (5, 2, 3), (1, 9), (2, 140_000)]
SMALL = SHAPES[:-1]


def parameters(shapes=SMALL, dtype=torch.float32, seed=0, unit=True):
    generator = torch.Generator().manual_seed(seed)
    out = []
    for shape in shapes:
        p = torch.randn(shape, generator=generator, dtype=torch.float64)
        if unit:
            p = p / p.flatten(1).norm(dim=1).view(-1, *[1] * (p.ndim - 1))
        out.append(torch.nn.Parameter(p.to(dtype)))
    return out


def gradients(params, step, scale=0.05, dtype=None):
    generator = torch.Generator().manual_seed(100 + step)
    out = []
    for p in params:
        g = scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        # Part of the gradients is long enough to be clipped, part is not.
        g *= torch.linspace(0.05, 1, len(p), dtype=torch.float64).view(-1, *[1] * (p.ndim - 1))
        out.append(g.to(dtype or p.dtype))
    return out


def drive(optimizer, params, steps, start=0, **kwargs):
    for step in range(start, start + steps):
        for p, g in zip(params, gradients(params, step, **kwargs), strict=True):
            p.grad = g
        optimizer.step()
