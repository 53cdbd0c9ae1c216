"""The blocks of the reference networks: convolution, normalization and activation together, for any normalization.

A network is written once, in terms of :class:`Blocks`; the normalization decides what a block is. Ordinary layers are
``conv -> norm -> ReLU``; Normalization Propagation has linear map, activation and standardization in one module, and
combines residual branches with weights that keep unit variance.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from flexnorm import nn as norms
from flexnorm._messages import unknown_name

NormSpec: TypeAlias = "str | Callable[[int], nn.Module] | Blocks"


def norm_names() -> tuple[str, ...]:
    """Return the names that the reference networks accept as ``norm=``."""
    return (*norms.NORMS, "normprop")


class Blocks:
    """Makes the layers of a network for one choice of normalization.

    Args:
        norm: A name of :func:`norm_names`, a callable that builds the normalization of a number of channels, or blocks,
            whose choice is taken over.
        norm_args: Handed to the normalization (to the propagating layers for ``"normprop"``), beside those of the
            blocks.

    Raises:
        ValueError: For an unknown name, or ``norm_args`` with a callable.
    """

    def __init__(self, norm: NormSpec = "batch", norm_args: Mapping[str, Any] | None = None) -> None:
        self._norm: str | Callable[[int], nn.Module] = norm._norm if isinstance(norm, Blocks) else norm
        self._args: dict[str, Any] = {**(norm._args if isinstance(norm, Blocks) else {}), **(norm_args or {})}
        if isinstance(self._norm, str) and self._norm not in norm_names():
            raise ValueError(unknown_name("norm", self._norm, norm_names()))
        if not isinstance(self._norm, str) and self._args:
            raise ValueError(f"norm is a callable: bind {sorted(self._args)} to it instead of passing them beside it")

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
