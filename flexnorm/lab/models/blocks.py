"""The blocks of the reference networks: convolution, normalization and activation together, for any normalization.

A network is written once, in terms of :class:`Blocks`; the normalization decides what a block is. Ordinary layers are
``conv -> norm -> ReLU``; Normalization Propagation has linear map, activation and standardization in one module, and
combines residual branches with weights that keep unit variance.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from flexnorm import nn as norms
from flexnorm._messages import unknown_name

NormSpec: TypeAlias = str | Callable[[int], nn.Module]
Layers: TypeAlias = Sequence[tuple[str, nn.Module]]


def norm_names() -> tuple[str, ...]:
    """Return the names that the reference networks accept as ``norm=``."""
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

    def __init__(
        self,
        norm: NormSpec = "batch",
        norm_args: Mapping[str, Any] | None = None,
        in_channels: int = 3,
        num_classes: int = 10,
    ) -> None:
        if isinstance(norm, str) and norm not in norm_names():
            raise ValueError(unknown_name("norm", norm, norm_names()))
        if not isinstance(norm, str) and norm_args:
            raise ValueError(f"norm is a callable: bind {sorted(norm_args)} to it instead of passing them beside it")
        self._norm, self._args = norm, dict(norm_args or {})
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
