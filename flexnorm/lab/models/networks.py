"""The networks of the papers, and the blocks they consist of: convolution, normalization and activation together.

A network is written once, in terms of :class:`Blocks`; the normalization decides what a block is. Ordinary layers are
``conv -> norm -> ReLU``; Normalization Propagation has linear map, activation and standardization in one module, and
combines residual branches with weights that keep unit variance.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from flexnorm import nn as norms
from flexnorm._messages import unknown_name
from flexnorm.nn import NoNorm, PopulationNorm2d

NormSpec: TypeAlias = str | Callable[[int], nn.Module]
Layers: TypeAlias = Sequence[tuple[str, nn.Module]]
Stages: TypeAlias = Sequence[tuple[int, int]]


def norm_names() -> tuple[str, ...]:
    """Return the names that the networks accept as ``norm=``."""
    return (*norms.NORMS, "normprop")


def initialized(head: nn.Linear | nn.Conv2d, channels: int) -> nn.Module:
    """Return the last layer, a linear map of so many channels to the classes, with small weights."""
    nn.init.normal_(head.weight, std=channels**-0.5)
    if head.bias is not None:
        nn.init.zeros_(head.bias)
    return head


class Blocks:
    """Makes the layers of a network for one choice of normalization, and puts them together.

    Args:
        norm: A name of :func:`norm_names`, or a callable that builds the normalization of a number of channels.
        norm_args: Handed to the normalization (to the propagating layers for ``"normprop"``).
        in_channels: Channels of the images.
        num_classes: Number of outputs.

    Raises:
        ValueError: For an unknown name, or ``norm_args`` with a callable.
    """

    def __init__(self, norm: NormSpec, norm_args: Mapping[str, Any], in_channels: int, num_classes: int) -> None:
        if isinstance(norm, str) and norm not in norm_names():
            raise ValueError(unknown_name("norm", norm, norm_names()))
        if not isinstance(norm, str) and norm_args:
            raise ValueError(f"norm is a callable: bind {sorted(norm_args)} to it instead of passing them beside it")
        self._norm, self._args = norm, dict(norm_args)
        self.in_channels, self.num_classes = in_channels, num_classes

    @property
    def propagates(self) -> bool:
        """Whether the layers normalize by propagation, without statistics."""
        return self._norm == "normprop"

    def norm(self, channels: int) -> nn.Module:
        """The normalization of ``channels`` channels of an image."""
        if callable(self._norm):
            return self._norm(channels)
        return norms.make_norm(self._norm, channels, 2, **self._args)

    def convolution(self, cin: int, cout: int, kernel: int = 3, stride: int = 1, padding: int = 1) -> nn.Conv2d:
        """A bare convolution as it stands before a normalization."""
        conv = nn.Conv2d(cin, cout, kernel, stride, padding, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        if self._norm == "none":
            # Only a network without normalization needs the bias. Added last, it draws no random number, so that equal
            # seeds give equal weights under every normalization.
            conv.bias = nn.Parameter(torch.zeros(cout))
        return conv

    def conv(self, cin: int, cout: int, kernel: int = 3, stride: int = 1, padding: int | None = None) -> nn.Module:
        """Convolution, normalization and ReLU; ``padding`` defaults to keeping the size at stride 1."""
        padding = kernel // 2 if padding is None else padding
        if self.propagates:
            # In a container of its own, so that the layer to watch has the same name under every normalization.
            layer = norms.NormPropConv2d(cin, cout, kernel, stride=stride, padding=padding, **self._args)
            return nn.Sequential(OrderedDict(norm=layer))
        convolution = self.convolution(cin, cout, kernel, stride, padding)
        return nn.Sequential(OrderedDict(conv=convolution, norm=self.norm(cout), relu=nn.ReLU(inplace=True)))

    def residual(self, cin: int, cout: int, stride: int, dropout: float | None, activated: bool) -> nn.Module:
        """A pre-activated residual block of two 3x3 convolutions; 1x1 on the shortcut where shapes change.

        Args:
            cin: Channels of the input.
            cout: Channels of the output.
            stride: Of the first convolution.
            dropout: Share of the activations that is dropped before the second; None for no such layer.
            activated: Whether the 1x1 reads the activated input or, as in the unitization experiments, the raw one.
        """
        if not self.propagates:
            return _ResidualBlock(self, cin, cout, stride, dropout, activated)
        args = {key: value for key, value in self._args.items() if key != "activation"}
        changes = stride != 1 or cin != cout
        shortcut = norms.NormPropConv2d(cin, cout, 1, stride=stride, activation="identity", **args) if changes else None
        branch = OrderedDict(conv1=self.conv(cin, cout, 3, stride))
        if dropout is not None:
            branch["dropout"] = nn.Dropout(dropout)
        branch["conv2"] = self.conv(cout, cout, 3)
        return norms.NormPropResidual(nn.Sequential(branch), shortcut)

    def network(self, layers: Layers, channels: int, watched: Iterable[str], head: Layers = ()) -> nn.Sequential:
        """Put together the layers by name, the mean over positions and a linear head; note which layers to watch.

        Args:
            layers: Name and module of each.
            channels: What the last one puts out.
            watched: For :func:`flexnorm.lab.models.watched_layers`.
            head: What stands before the mean in place of the linear layer behind it.
        """
        last = () if head else (("head", initialized(nn.Linear(channels, self.num_classes), channels)),)
        mean = (("mean", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()))
        net = nn.Sequential(OrderedDict([*layers, *head, *mean, *last]))
        net.watched = tuple(watched)  # type: ignore[assignment]
        return net


class _ResidualBlock(nn.Module):
    """norm -> ReLU -> 3x3 -> norm -> ReLU (-> dropout) -> 3x3, plus the shortcut (He et al. 2016)."""

    def __init__(
        self, blocks: Blocks, cin: int, cout: int, stride: int, dropout: float | None, activated: bool
    ) -> None:
        super().__init__()
        self.norm1 = blocks.norm(cin)
        # norm1 of a network without normalization is the identity: its ReLU must not overwrite the shortcut's input.
        self.relu1 = nn.ReLU()
        self.conv1 = blocks.convolution(cin, cout, stride=stride)
        self.norm2 = blocks.norm(cout)
        self.relu2 = nn.ReLU(inplace=True)
        self.dropout = None if dropout is None else nn.Dropout(dropout)
        self.conv2 = blocks.convolution(cout, cout)
        changes = stride != 1 or cin != cout
        self.shortcut = blocks.convolution(cin, cout, 1, stride, 0) if changes else nn.Identity()
        self.activated = activated and changes

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for ``x`` (N, C, H, W)."""
        active = self.relu1(self.norm1(x))
        inner = self.relu2(self.norm2(self.conv1(active)))
        out: Tensor = self.conv2(inner if self.dropout is None else self.dropout(inner))
        shortcut: Tensor = self.shortcut(active if self.activated else x)
        return out + shortcut


def watched_layers(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers whose outputs the normalized linear maps of a network read.

    A BatchNorm stands before its activation, a layer of Normalization Propagation ends after it, and a network without
    normalization has neither: their outputs are no like quantities. What the next linear map reads is, so that is what
    a comparison of normalizations watches. These networks have equally many such places under every
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
        width: Channels of the first convolution, at least 1, in place of those of ``stages``; all others scale with it.
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

    The network in which Luo et al. (2019, Fig. 2) take BatchNorm apart, after Salimans & Kingma (2016). Widths and
    poolings are in an appendix that we have not seen; here they are those of a small VGG. The hidden dense layer is
    written as the convolution whose kernel covers its whole input, which is the same map and lets every normalization
    of images stand behind it.

    Args:
        blocks: Normalization, channels of the images (of at least 8 pixels a side) and number of classes.
            ``"instance"`` builds, but cannot train: a dense layer has one position.
        width: Channels of the first two convolutions.
        only: Number of the only layer that is normalized, 1 to 5 (5 is the hidden dense layer); the others are plain
            layers with a bias. By default all are normalized.
        weight_norm: Weight normalization (Salimans & Kingma 2016) of the five layers: ``w = g v / |v|``, g held
            at the norm of the initial v. The scale that is learned is that of the layer behind, the normalization
            or, with ``"none"``, one that only scales: so the scales of all variants are alike, and gamma decay
            finds them. Behind a normalization without a scale g is learned. Not for ``"normprop"``, whose weights have
            unit norm as they are.
        dropout: Share of the activations that is dropped after each pooling and after the hidden layer, 0 to 1.
    """
    if only is not None and not 1 <= only <= LAYERS:
        raise ValueError(f"only must be the number of a layer, 1 to {LAYERS}, got {only}")
    plain = Blocks("none", {}, blocks.in_channels, blocks.num_classes)
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
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth must be 6 n + 2 with n >= 1 (8, 14, 20, ...), got {depth}")
    return _stages([((depth - 2) // 6, width * 2**stage) for stage in range(3)], blocks, stem=width, after=dropout)


def resnet18(blocks: Blocks, *, width: int = 64, dropout: float = 0.0) -> nn.Sequential:
    """ResNet-18 as it is used on small images: four stages of two blocks, a 3x3 stem, no max-pooling, pre-activation.

    Args:
        blocks: Makes the layers.
        width: Channels of the first stage; each further one has twice as many.
        dropout: As in :func:`resnet`.
    """
    return _stages([(2, width * 2**stage) for stage in range(4)], blocks, stem=width, after=dropout)


def wide_resnet(blocks: Blocks, *, depth: int, widen: int = 10, dropout: float = 0.0) -> nn.Sequential:
    """Wide residual network (Zagoruyko & Komodakis, arXiv 1605.07146): three stages of ``(depth - 4) / 6`` blocks.

    Args:
        blocks: Makes the layers.
        depth: Number of weight layers, ``6 n + 4``: 10, 16, 28, 40.
        widen: The stages have 16, 32 and 64 times this many channels; the first convolution has 16.
        dropout: Share of the activations that is dropped between the two convolutions of a block, 0 to 1.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth must be 6 n + 4 with n >= 1 (10, 16, 28, ...), got {depth}")
    stages = [((depth - 4) // 6, 16 * widen * 2**stage) for stage in range(3)]
    return _stages(stages, blocks, stem=16, inside=dropout, activated=True)


def _stages(
    stages: Stages, blocks: Blocks, stem: int, after: float = 0.0, inside: float | None = None, activated: bool = False
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
