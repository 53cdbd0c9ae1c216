"""Pre-activation residual networks for small images (He et al. 2016), for any normalization."""

from __future__ import annotations

from typing import Any

from torch import nn

from flexnorm.lab.models.bricks import Bricks, NormSpec
from flexnorm.lab.models.networks import assemble

__all__ = ["resnet", "resnet18"]


def resnet(
    depth: int,
    norm: NormSpec = "batch",
    in_channels: int = 3,
    num_classes: int = 10,
    *,
    width: int = 16,
    dropout: float = 0.0,
    **norm_args: Any,
) -> nn.Sequential:
    """Pre-activation residual network for small images (He et al. 2016): three stages of ``(depth - 2) / 6`` blocks.

    Args:
        depth: Number of weight layers, ``6 n + 2``: 8, 20, 56, 110.
        norm: Name of a normalization or a callable ``channels -> module``.
        in_channels: Channels of the images.
        num_classes: Number of outputs.
        width: Channels of the first stage; the next have twice and four times as many.
        dropout: Share of the activations that is dropped after each block, 0 to 1 (Luo et al. 2019, sec. 5: 0.1).
        **norm_args: Handed to the normalization.

    Returns:
        A module from (N, in_channels, H, W) to logits (N, num_classes).

    Raises:
        ValueError: If ``depth`` is not ``6 n + 2`` with n at least 1.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth must be 6 n + 2 with n >= 1 (8, 14, 20, ...), got {depth}")
    return _stages([(depth - 2) // 6] * 3, Bricks(norm, **norm_args), in_channels, num_classes, width, dropout)


def resnet18(
    norm: NormSpec = "batch",
    in_channels: int = 3,
    num_classes: int = 10,
    *,
    width: int = 64,
    dropout: float = 0.0,
    **norm_args: Any,
) -> nn.Sequential:
    """ResNet-18 as it is used on small images: four stages of two blocks, a 3x3 stem, no max-pooling, pre-activation.

    Args:
        norm: Name of a normalization or a callable ``channels -> module``.
        in_channels: Channels of the images.
        num_classes: Number of outputs.
        width: Channels of the first stage; each further one has twice as many.
        dropout: As in :func:`resnet`.
        **norm_args: Handed to the normalization.

    Returns:
        A module from (N, in_channels, H, W) to logits (N, num_classes).
    """
    return _stages([2] * 4, Bricks(norm, **norm_args), in_channels, num_classes, width, dropout)


def _stages(
    sizes: list[int], bricks: Bricks, in_channels: int, num_classes: int, width: int, dropout: float
) -> nn.Sequential:
    """A stem, stages of so many blocks each, the last normalization and the head."""
    # The stem of a pre-activation network is bare: the first block normalizes. A propagating stem standardizes itself.
    stem = bricks.conv(in_channels, width) if bricks.propagates else bricks.convolution(in_channels, width, 3, 1, 1)
    layers: list[tuple[str, nn.Module]] = [("stem", stem)]
    blocks: list[str] = []
    channels = width
    for stage, size in enumerate(sizes):
        for block in range(size):
            out = width * 2**stage
            blocks.append(f"stage{stage + 1}_block{block + 1}")
            layers.append((blocks[-1], bricks.block(channels, out, 2 if stage and block == 0 else 1)))
            if dropout > 0:
                layers.append((f"{blocks[-1]}_dropout", nn.Dropout(dropout)))
            channels = out
    if bricks.propagates:
        watched = ["stem", *(name for block in blocks for name in (f"{block}.branch.conv1", block))]
    else:
        watched = [*(name for block in blocks for name in (f"{block}.relu1", f"{block}.relu2")), "relu"]
        layers += [("norm", bricks.norm(channels)), ("relu", nn.ReLU(inplace=True))]
    return assemble(layers, channels, num_classes, watched)
