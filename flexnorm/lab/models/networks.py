"""The networks of the papers, each built from the ``blocks`` of any normalization.

``blocks`` also has the channels of the images and the number of classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn
from torch.nn.utils import parametrizations

from flexnorm.lab.models.blocks import Blocks, initialized
from flexnorm.nn import NoNorm, PopulationNorm2d


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
    """Plain network of 3x3 convolutions of ``widths``: each but the first halves the size; mean over positions."""
    if not widths:
        raise ValueError("widths must name at least one layer, got an empty sequence")
    sizes = (blocks.in_channels, *widths)
    layers = [
        (f"layer{number}", blocks.conv(cin, cout, stride=1 if number == 1 else 2))
        for number, (cin, cout) in enumerate(pairwise(sizes), 1)
    ]
    return blocks.network(layers, sizes[-1], [name for name, _ in layers])


def vgg(blocks: Blocks, *, stages: Sequence[Sequence[int]], width: int | None = None) -> nn.Sequential:
    """VGG-style network: stages of 3x3 convolutions, each followed by 2x2 max-pooling; mean over positions.

    Args:
        blocks: Makes the layers.
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
        blocks: Makes the layers.
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


LAYERS = 5


def conv4fc2(
    blocks: Blocks, *, width: int = 64, only: int | None = None, weight_norm: bool = False, dropout: float = 0.0
) -> nn.Sequential:
    """Conv(w) Conv(w) pool Conv(2w) Conv(2w) pool Dense(4w) Dense(classes); a normalization behind all but the last.

    Args:
        blocks: Normalization, channels of the images (of at least 8 pixels a side) and number of classes.
            ``"instance"`` builds, but cannot train: a dense layer has one position.
        width: Channels of the first two convolutions.
        only: Number of the only layer that is normalized, 1 to 5 (5 is the hidden dense layer); the others are plain
            layers with a bias. By default all are normalized.
        weight_norm: Weight normalization (Salimans & Kingma 2016) of the five layers: ``w = g v / |v|``, g held
            at the norm of the initial v. The scale that is learned is that of the layer behind, the normalization
            or, with ``"none"``, one that only scales: so the scales of all variants are alike, and gamma decay
            finds them. Behind a normalization without a scale g is learned.
        dropout: Share of the activations that is dropped after each pooling and after the hidden layer, 0 to 1.

    Raises:
        ValueError: If ``only`` is no layer, or weight normalization is asked for under ``"normprop"``, whose weights
            have unit norm as they are.
    """
    if only is not None and not 1 <= only <= LAYERS:
        raise ValueError(f"only must be the number of a layer, 1 to {LAYERS}, got {only}")
    plain = Blocks("none")
    if weight_norm and blocks.propagates:
        raise ValueError("weight_norm is for other normalizations: the weights of normprop have unit norm as they are")
    layers: list[tuple[str, nn.Module]] = []
    channels = blocks.in_channels
    for number, out in enumerate((width, width, 2 * width, 2 * width, 4 * width), start=1):
        maker = blocks if only in (None, number) else plain
        dense = number == LAYERS
        if dense:
            layers.append(("pool3", nn.AdaptiveAvgPool2d(2)))
        layer = maker.conv(channels, out, 2 if dense else 3, padding=0 if dense else 1)
        if weight_norm:
            _normalize(layer, out)
        layers.append((f"layer{number}", layer))
        if number in (2, 4):
            layers.append((f"pool{number // 2}", nn.MaxPool2d(2)))
        if dropout > 0 and number in (2, 4, 5):
            layers.append((f"dropout{number}", nn.Dropout(dropout)))
        channels = out
    return blocks.network(layers, channels, [f"layer{number}" for number in range(1, LAYERS + 1)])


def _normalize(layer: nn.Module, channels: int) -> None:
    """Normalize the weights of a block and see to it that a scale per channel follows."""
    convolution = parametrizations.weight_norm(layer.get_submodule("conv"), dim=0)
    if isinstance(layer.norm, NoNorm):
        # With statistics frozen at mean 0 and variance 1, population normalization is a scale; the layer has the shift.
        layer.norm = PopulationNorm2d(channels, eps=0.0, bias=False)
        layer.norm.frozen = True
    if getattr(layer.norm, "weight", None) is not None:
        convolution.get_parameter("parametrizations.weight.original0").requires_grad_(False)


def resnet(blocks: Blocks, *, depth: int, width: int = 16, dropout: float = 0.0) -> nn.Sequential:
    """Pre-activation residual network for small images (He et al. 2016): three stages of ``(depth - 2) / 6`` blocks.

    Args:
        blocks: Makes the layers.
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
        blocks: Makes the layers.
        width: Channels of the first stage; each further one has twice as many.
        dropout: As in :func:`resnet`.
    """
    stages = [(2, width * 2**stage) for stage in range(4)]
    return _stages(stages, blocks, stem=width, after=dropout)


def wide_resnet(blocks: Blocks, *, depth: int, widen: int = 10, dropout: float = 0.0) -> nn.Sequential:
    """Wide residual network (Zagoruyko & Komodakis, arXiv 1605.07146): three stages of ``(depth - 4) / 6`` blocks.

    Args:
        blocks: Makes the layers.
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
    layers: list[tuple[str, nn.Module]] = [("stem", make(blocks.in_channels, stem))]
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
