"""The bricks of the reference networks: convolution, normalization and activation in one place, for any normalization.

A network is written once, in terms of :class:`Bricks`; the normalization decides what a brick is. Ordinary layers are
``conv -> norm -> ReLU``; Normalization Propagation has linear map, activation and standardization in one module, and
combines residual branches with weights that keep unit variance.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from flexnorm import nn as norms
from flexnorm._messages import unknown_name

__all__ = ["Bricks", "NormSpec", "norm_names"]

NormSpec: TypeAlias = str | Callable[[int], nn.Module]


def norm_names() -> tuple[str, ...]:
    """Return the names that the reference networks accept as ``norm=``."""
    return (*norms.NORMS, "normprop")


class Bricks:
    """Makes the layers of a network for one choice of normalization.

    Args:
        norm: A name of :func:`norm_names`, or a callable that builds the normalization of a number of channels.
        **norm_args: Handed to the normalization (to the propagating layers for ``"normprop"``).

    Raises:
        ValueError: For an unknown name, or ``norm_args`` with a callable.
    """

    def __init__(self, norm: NormSpec = "batch", **norm_args: Any) -> None:
        if isinstance(norm, str) and norm not in norm_names():
            raise ValueError(unknown_name("norm", norm, norm_names()))
        if not isinstance(norm, str) and norm_args:
            raise ValueError(f"norm is a callable: bind {sorted(norm_args)} to it instead of passing them beside it")
        self._norm = norm
        self._args = norm_args

    @property
    def propagates(self) -> bool:
        """Whether the layers normalize by propagation, without statistics."""
        return self._norm == "normprop"

    def norm(self, channels: int) -> nn.Module:
        """The normalization of ``channels`` channels of an image."""
        if callable(self._norm):
            return self._norm(channels)
        return norms.make_norm(self._norm, channels, 2, **self._args)

    def convolution(self, cin: int, cout: int, kernel: int, stride: int, padding: int) -> nn.Conv2d:
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

    def block(self, cin: int, cout: int, stride: int = 1) -> nn.Module:
        """A pre-activated residual block of two 3x3 convolutions; 1x1 on the shortcut where shapes change."""
        if not self.propagates:
            return _PreActivationBlock(self, cin, cout, stride)
        shortcut = self.shortcut(cin, cout, stride) if stride != 1 or cin != cout else None
        branch = nn.Sequential(OrderedDict(conv1=self.conv(cin, cout, 3, stride), conv2=self.conv(cout, cout, 3)))
        return norms.NormPropResidual(branch, shortcut)

    def shortcut(self, cin: int, cout: int, stride: int) -> nn.Module:
        """The 1x1 convolution on the shortcut of a propagating residual block: no activation, unit variance kept."""
        args = {key: value for key, value in self._args.items() if key != "activation"}
        return norms.NormPropConv2d(cin, cout, 1, stride=stride, activation="identity", **args)


class _PreActivationBlock(nn.Module):
    """norm -> ReLU -> 3x3 -> norm -> ReLU -> 3x3, plus the input (He et al. 2016, identity mappings).

    As in the unitization experiments, a shortcut that changes the shape is a 1x1 convolution of the raw block input.
    """

    def __init__(self, bricks: Bricks, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.norm1 = bricks.norm(cin)
        # norm1 of a network without normalization is the identity: its ReLU must not overwrite the shortcut's input.
        self.relu1 = nn.ReLU()
        self.conv1 = bricks.convolution(cin, cout, 3, stride, 1)
        self.norm2 = bricks.norm(cout)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = bricks.convolution(cout, cout, 3, 1, 1)
        changes = stride != 1 or cin != cout
        self.shortcut = bricks.convolution(cin, cout, 1, stride, 0) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for ``x`` (N, C, H, W)."""
        first = self.conv1(self.relu1(self.norm1(x)))
        out: Tensor = self.conv2(self.relu2(self.norm2(first))) + self.shortcut(x)
        return out
