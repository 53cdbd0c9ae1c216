"""Pre-activation residual networks for small images, narrow and wide, for any normalization."""

from __future__ import annotations

from torch import nn

from flexnorm.lab.models.blocks import Blocks


def resnet(blocks: Blocks, *, depth: int, width: int = 16, dropout: float = 0.0) -> nn.Sequential:
    """Pre-activation residual network for small images (He et al. 2016): three stages of ``(depth - 2) / 6`` blocks.

    Args:
        blocks: Normalization, channels of the images and number of classes.
        depth: Number of weight layers, ``6 n + 2``: 8, 20, 56, 110.
        width: Channels of the first stage; the next have twice and four times as many.
        dropout: Share of the activations that is dropped after each block, 0 to 1 (Luo et al. 2019, sec. 5: 0.1).

    Raises:
        ValueError: If ``depth`` is not ``6 n + 2`` with n at least 1.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth must be 6 n + 2 with n >= 1 (8, 14, 20, ...), got {depth}")
    stages = [((depth - 2) // 6, width * 2**stage) for stage in range(3)]
    return _stages(stages, blocks, stem=width, after=dropout)


def resnet18(blocks: Blocks, *, width: int = 64, dropout: float = 0.0) -> nn.Sequential:
    """ResNet-18 as it is used on small images: four stages of two blocks, a 3x3 stem, no max-pooling, pre-activation.

    Args:
        blocks: Normalization, channels of the images and number of classes.
        width: Channels of the first stage; each further one has twice as many.
        dropout: As in :func:`resnet`.
    """
    stages = [(2, width * 2**stage) for stage in range(4)]
    return _stages(stages, blocks, stem=width, after=dropout)


def wide_resnet(blocks: Blocks, *, depth: int, widen: int = 10, dropout: float = 0.0) -> nn.Sequential:
    """Wide residual network (Zagoruyko & Komodakis, arXiv 1605.07146): three stages of ``(depth - 4) / 6`` blocks.

    Args:
        blocks: Normalization, channels of the images and number of classes.
        depth: Number of weight layers, ``6 n + 4``: 10, 16, 28, 40.
        widen: The stages have 16, 32 and 64 times this many channels; the first convolution has 16.
        dropout: Share of the activations that is dropped between the two convolutions of a block, 0 to 1.

    Raises:
        ValueError: If ``depth`` is not ``6 n + 4`` with n at least 1.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth must be 6 n + 4 with n >= 1 (10, 16, 28, ...), got {depth}")
    stages = [((depth - 4) // 6, 16 * widen * 2**stage) for stage in range(3)]
    return _stages(stages, blocks, stem=16, inside=dropout, activated=True)


def _stages(
    stages: list[tuple[int, int]],
    blocks: Blocks,
    *,
    stem: int,
    after: float = 0.0,
    inside: float | None = None,
    activated: bool = False,
) -> nn.Sequential:
    """A stem, stages of (number of blocks, channels), the last normalization and the head.

    ``after`` and ``inside``: dropout after and inside of the blocks; ``activated``: what the shortcuts' 1x1 read.
    """
    # The stem of a pre-activation network is bare: the first block normalizes. A propagating stem standardizes itself.
    make = blocks.conv if blocks.propagates else blocks.convolution
    first = make(blocks.in_channels, stem)
    layers: list[tuple[str, nn.Module]] = [("stem", first)]
    names: list[str] = []
    channels = stem
    for stage, (size, out) in enumerate(stages, start=1):
        for block in range(1, size + 1):
            names.append(f"stage{stage}_block{block}")
            stride = 2 if stage > 1 and block == 1 else 1
            layers.append((names[-1], blocks.residual(channels, out, stride, inside, activated)))
            if after > 0:
                layers.append((f"{names[-1]}_dropout", nn.Dropout(after)))
            channels = out
    if blocks.propagates:
        watched = ["stem", *(place for name in names for place in (f"{name}.branch.conv1", name))]
    else:
        watched = [*(place for name in names for place in (f"{name}.relu1", f"{name}.relu2")), "relu"]
        layers += [("norm", blocks.norm(channels)), ("relu", nn.ReLU(inplace=True))]
    return blocks.network(layers, channels, watched)
