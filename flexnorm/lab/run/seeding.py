"""Randomness as a function of (seed, epoch): a resumed run draws what an uninterrupted one would."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


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
