"""Randomness as a function of (seed, epoch): a resumed run draws what an uninterrupted one would."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def mixed(seed: int, epoch: int, purpose: str) -> int:
    """Return a 63-bit seed for one purpose in one epoch; different arguments give unrelated streams."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """Return a private CPU generator; drawing from it leaves torch's global generator alone."""
    return torch.Generator().manual_seed(mixed(seed, epoch, purpose))


def order(count: int, seed: int, epoch: int) -> Tensor:
    """Return the order of the training images in one epoch, (count,) int64: the same for every norm and optimizer."""
    return torch.randperm(count, generator=generator(seed, epoch, "order"))


def augment(x: Tensor, kinds: Sequence[str], pixels: int, generator: torch.Generator) -> Tensor:
    """Return a randomly displaced and mirrored copy of a batch ``x`` (N, C, H, W), in one gather.

    Args:
        x: Standardized images, so that zero is the mean grey.
        kinds: Any of ``flip`` (each image is mirrored with probability 1/2), ``shift`` (moved by up to `pixels` in each
            direction, zero fill) and ``crop`` (the same with a reflected border, ValueError where it is as wide as the
            image); none returns `x` itself.
        pixels: Largest displacement.
        generator: Private CPU generator.
    """
    if not kinds:
        return x
    n, _, h, w = x.shape
    rows = torch.arange(h).expand(n, h)
    columns = torch.arange(w).expand(n, w)
    if "shift" in kinds or "crop" in kinds:
        if "crop" in kinds and pixels >= min(h, w):
            raise ValueError(f"augment: crop reflects a border of {pixels} pixels, too wide for images of {h}x{w}")
        x = F.pad(x, (pixels,) * 4, mode="reflect" if "crop" in kinds else "constant")
        move = torch.randint(0, 2 * pixels + 1, (2, n, 1), generator=generator)
        rows, columns = rows + move[0], columns + move[1]
    if "flip" in kinds:
        mirrored = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    rows, columns = rows.to(x.device), columns.to(x.device)
    which = torch.arange(n, device=x.device)[:, None, None]
    return x.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
