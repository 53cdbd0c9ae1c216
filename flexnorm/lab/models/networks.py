"""The plain convolutional networks of the papers, each for any normalization, number of input channels and classes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from flexnorm.lab.models.blocks import Blocks, initialized


def watched_layers(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers whose outputs the normalized linear maps of a reference network read.

    A BatchNorm stands before its activation, a layer of Normalization Propagation ends after it, and a network without
    normalization has neither: their outputs are no like quantities. What the next linear map reads is, so that is what
    a comparison of normalizations watches. The reference networks have equally many such places under every
    normalization, in the same order.

    Args:
        model: A network of :func:`flexnorm.lab.models.build`; any other has none.
    """
    return tuple(getattr(model, "watched", ()))


def convnet(blocks: Blocks, *, widths: Sequence[int] = (16, 32, 64)) -> nn.Sequential:
    """Plain network of 3x3 convolutions: the first keeps the size, each further one halves it; mean over positions.

    Args:
        blocks: Normalization, channels of the images and number of classes.
        widths: Channels of each convolution.
    """
    if not widths:
        raise ValueError("widths must name at least one layer, got an empty sequence")
    sizes = (blocks.in_channels, *widths)
    layers = [
        (f"layer{number}", blocks.conv(sizes[number - 1], sizes[number], stride=1 if number == 1 else 2))
        for number in range(1, len(sizes))
    ]
    return blocks.network(layers, sizes[-1], [name for name, _ in layers])


def vgg(blocks: Blocks, *, stages: Sequence[Sequence[int]], width: int | None = None) -> nn.Sequential:
    """VGG-style network: stages of 3x3 convolutions, each followed by 2x2 max-pooling; mean over positions.

    Args:
        blocks: Normalization, channels of the images and number of classes.
        stages: Widths of the convolutions of each stage; images must have at least ``2**len(stages)`` pixels a side.
        width: Channels of the first convolution, in place of those of ``stages``; all others scale with it.

    Raises:
        ValueError: If ``width`` is below 1.
    """
    if width is not None and width < 1:
        raise ValueError(f"width must be at least 1 channel, got {width}")
    first, channels = stages[0][0], blocks.in_channels
    layers: list[tuple[str, nn.Module]] = []
    for stage, widths in enumerate(stages, 1):
        for index, planned in enumerate(widths, 1):
            out = planned if width is None else max(1, planned * width // first)
            layers.append((f"stage{stage}_layer{index}", blocks.conv(channels, out)))
            channels = out
        layers.append((f"stage{stage}_pool", nn.MaxPool2d(2)))
    return blocks.network(layers, channels, [name for name, _ in layers if "_layer" in name])


def nin(blocks: Blocks, *, width: int = 192) -> nn.Sequential:
    """Network in network of the Normalization Propagation paper (Arpit et al. 2016, sec. 5): nine convolutions.

    C(192,5) C(160,1) maxpool(3,2) C(96,1) C(192,5) C(192,1) avgpool(3,2) C(192,1) C(192,5) C(192,1) C(classes,1), mean.
    The paper pads the last 1x1 instead of the last 5x5 convolution (sizes 8, 4, 8), which reads like swapped entries;
    here the 5x5 is padded, so that the size stays 8.

    Args:
        blocks: Normalization, channels of the images and number of classes.
        width: 192 in the paper; the other widths scale with it.
    """
    head = [("head", initialized(nn.Conv2d(width, blocks.num_classes, 1), width))]
    outs = (width, max(1, width * 160 // 192), max(1, width // 2), *[width] * 5)
    kernels = (5, 1, 1, 5, 1, 1, 5, 1)
    pools = {2: ("pool1", nn.MaxPool2d(3, 2, 1)), 5: ("pool2", nn.AvgPool2d(3, 2, 1))}
    layers: list[tuple[str, nn.Module]] = []
    channels = blocks.in_channels
    for number, (out, kernel) in enumerate(zip(outs, kernels, strict=True), start=1):
        layers.append((f"layer{number}", blocks.conv(channels, out, kernel)))
        if number in pools:
            layers.append(pools[number])
        channels = out
    return blocks.network(layers, channels, [f"layer{number}" for number in range(1, 9)], head)
