"""The reference networks of the papers, each for any normalization, number of input channels and classes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn

from flexnorm.lab.models.bricks import Bricks, NormSpec

__all__ = ["assemble", "convnet", "nin", "vgg", "watched_layers"]


def _head(features: int, num_classes: int) -> nn.Linear:
    head = nn.Linear(features, num_classes)
    nn.init.normal_(head.weight, std=features**-0.5)
    nn.init.zeros_(head.bias)
    return head


def assemble(
    layers: Sequence[tuple[str, nn.Module]], channels: int, num_classes: int, watched: Sequence[str]
) -> nn.Sequential:
    """Put together the layers by name, the mean over positions and a linear head; note which layers to watch."""
    head = _head(channels, num_classes)
    net = nn.Sequential(
        OrderedDict([*layers, ("mean", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("head", head)])
    )
    return _watching(net, watched)


def _watching(net: nn.Sequential, names: Sequence[str]) -> nn.Sequential:
    """Note on the network which layers' outputs to compare between normalizations; see :func:`watched_layers`."""
    net.watched = tuple(names)  # type: ignore[assignment]
    return net


def watched_layers(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers whose outputs the normalized linear maps of a reference network read.

    A BatchNorm stands before its activation, a layer of Normalization Propagation ends after it, and a network without
    normalization has neither: their outputs are no like quantities. What the next linear map reads is, so that is what
    a comparison of normalizations watches. The networks of this room have equally many such places under every
    normalization, in the same order.

    Args:
        model: A network of :func:`flexnorm.lab.models.build`; any other has none.
    """
    return tuple(getattr(model, "watched", ()))


def convnet(
    norm: NormSpec = "batch",
    in_channels: int = 3,
    num_classes: int = 10,
    *,
    widths: Sequence[int] = (16, 32, 64),
    **norm_args: Any,
) -> nn.Sequential:
    """Plain network of 3x3 convolutions: the first keeps the size, each further one halves it; mean over positions.

    Args:
        norm: Name of a normalization or a callable ``channels -> module``.
        in_channels: Channels of the images.
        num_classes: Number of outputs.
        widths: Channels of each convolution.
        **norm_args: Handed to the normalization.

    Returns:
        A module from (N, in_channels, H, W) to logits (N, num_classes).
    """
    if not widths:
        raise ValueError("widths must name at least one layer, got an empty sequence")
    bricks = Bricks(norm, **norm_args)
    layers: list[tuple[str, nn.Module]] = []
    channels = in_channels
    for index, width in enumerate(widths):
        layers.append((f"layer{index + 1}", bricks.conv(channels, width, stride=2 if index else 1)))
        channels = width
    return assemble(layers, channels, num_classes, [name for name, _ in layers])


def vgg(
    stages: Sequence[Sequence[int]],
    norm: NormSpec = "batch",
    in_channels: int = 3,
    num_classes: int = 10,
    *,
    width: int | None = None,
    **norm_args: Any,
) -> nn.Sequential:
    """VGG-style network: stages of 3x3 convolutions, each followed by 2x2 max-pooling; mean over positions.

    Args:
        stages: Widths of the convolutions of each stage.
        norm: Name of a normalization or a callable ``channels -> module``.
        in_channels: Channels of the images.
        num_classes: Number of outputs.
        width: Channels of the first convolution, in place of those of ``stages``; all others scale with it.
        **norm_args: Handed to the normalization.

    Returns:
        A module from (N, in_channels, H, W) to logits (N, num_classes); H and W at least ``2**len(stages)``.

    Raises:
        ValueError: If ``width`` is below 1.
    """
    if width is not None and width < 1:
        raise ValueError(f"width must be at least 1 channel, got {width}")
    bricks = Bricks(norm, **norm_args)
    first = stages[0][0]
    layers: list[tuple[str, nn.Module]] = []
    channels = in_channels
    for stage, widths in enumerate(stages, 1):
        for index, planned in enumerate(widths, 1):
            out = planned if width is None else max(1, planned * width // first)
            layers.append((f"stage{stage}_layer{index}", bricks.conv(channels, out)))
            channels = out
        layers.append((f"stage{stage}_pool", nn.MaxPool2d(2)))
    return assemble(layers, channels, num_classes, [name for name, _ in layers if "_layer" in name])


def nin(
    norm: NormSpec = "batch",
    in_channels: int = 3,
    num_classes: int = 10,
    *,
    width: int = 192,
    **norm_args: Any,
) -> nn.Sequential:
    """Network in network of the Normalization Propagation paper (Arpit et al. 2016, sec. 5): nine convolutions.

    C(192,5) C(160,1) maxpool(3,2) C(96,1) C(192,5) C(192,1) avgpool(3,2) C(192,1) C(192,5) C(192,1) C(classes,1), mean.
    The paper pads the last 1x1 instead of the last 5x5 convolution (sizes 8, 4, 8), which reads like swapped entries;
    here the 5x5 is padded, so that the size stays 8.

    Args:
        norm: Name of a normalization or a callable ``channels -> module``.
        in_channels: Channels of the images.
        num_classes: Number of outputs.
        width: 192 in the paper; the other widths scale with it.
        **norm_args: Handed to the normalization.

    Returns:
        A module from (N, in_channels, H, W) to logits (N, num_classes).
    """
    bricks = Bricks(norm, **norm_args)
    w192, w160, w96 = width, max(1, width * 160 // 192), max(1, width // 2)
    last = nn.Conv2d(w192, num_classes, 1)
    nn.init.normal_(last.weight, std=w192**-0.5)
    if last.bias is not None:
        nn.init.zeros_(last.bias)
    net = nn.Sequential(
        OrderedDict(
            layer1=bricks.conv(in_channels, w192, 5),
            layer2=bricks.conv(w192, w160, 1),
            pool1=nn.MaxPool2d(3, 2, 1),
            layer3=bricks.conv(w160, w96, 1),
            layer4=bricks.conv(w96, w192, 5),
            layer5=bricks.conv(w192, w192, 1),
            pool2=nn.AvgPool2d(3, 2, 1),
            layer6=bricks.conv(w192, w192, 1),
            layer7=bricks.conv(w192, w192, 5),
            layer8=bricks.conv(w192, w192, 1),
            head=last,
            mean=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
        )
    )
    return _watching(net, [f"layer{index}" for index in range(1, 9)])
