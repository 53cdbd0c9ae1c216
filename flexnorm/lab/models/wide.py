"""Wide residual networks (Zagoruyko & Komodakis, 2016, arXiv 1605.07146), for any normalization."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from flexnorm import nn as norms
from flexnorm.lab.models.bricks import Bricks, NormSpec
from flexnorm.lab.models.networks import assemble

__all__ = ["wide_resnet"]


class _WideBlock(nn.Module):
    """norm -> ReLU -> 3x3 -> norm -> ReLU -> dropout -> 3x3, plus the input, or a 1x1 of the activated input."""

    def __init__(self, bricks: Bricks, cin: int, cout: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = bricks.norm(cin)
        # norm1 of a network without normalization is the identity: its ReLU must not overwrite the shortcut's input.
        self.relu1 = nn.ReLU()
        self.conv1 = bricks.convolution(cin, cout, 3, stride, 1)
        self.norm2 = bricks.norm(cout)
        self.relu2 = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = bricks.convolution(cout, cout, 3, 1, 1)
        self.shortcut = bricks.convolution(cin, cout, 1, stride, 0) if stride != 1 or cin != cout else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for ``x`` (N, C, H, W)."""
        active = self.relu1(self.norm1(x))
        out: Tensor = self.conv2(self.dropout(self.relu2(self.norm2(self.conv1(active)))))
        return out + (x if self.shortcut is None else self.shortcut(active))


def _propagating_block(bricks: Bricks, cin: int, cout: int, stride: int, dropout: float) -> nn.Module:
    shortcut = bricks.shortcut(cin, cout, stride) if stride != 1 or cin != cout else None
    branch = OrderedDict(
        conv1=bricks.conv(cin, cout, 3, stride), dropout=nn.Dropout(dropout), conv2=bricks.conv(cout, cout, 3)
    )
    return norms.NormPropResidual(nn.Sequential(branch), shortcut)


def wide_resnet(
    depth: int,
    norm: NormSpec = "batch",
    in_channels: int = 3,
    num_classes: int = 10,
    *,
    widen: int = 10,
    dropout: float = 0.0,
    **norm_args: object,
) -> nn.Sequential:
    """Pre-activation residual network of three stages of ``(depth - 4) / 6`` blocks, ``widen`` times as wide.

    Args:
        depth: Number of weight layers, ``6 n + 4``: 10, 16, 28, 40.
        norm: Name of a normalization or a callable ``channels -> module``.
        in_channels: Channels of the images.
        num_classes: Number of outputs.
        widen: The stages have 16, 32 and 64 times this many channels; the first convolution has 16.
        dropout: Share of the activations that is dropped between the two convolutions of a block, 0 to 1.
        **norm_args: Handed to the normalization.

    Returns:
        A module from (N, in_channels, H, W) to logits (N, num_classes).

    Raises:
        ValueError: If ``depth`` is not ``6 n + 4`` with n at least 1.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth must be 6 n + 4 with n >= 1 (10, 16, 28, ...), got {depth}")
    bricks = Bricks(norm, **norm_args)
    # The stem of a pre-activation network is bare: the first block normalizes. A propagating stem standardizes itself.
    stem = bricks.conv(in_channels, 16) if bricks.propagates else bricks.convolution(in_channels, 16, 3, 1, 1)
    layers: list[tuple[str, nn.Module]] = [("stem", stem)]
    channels = 16
    for stage in range(3):
        for block in range((depth - 4) // 6):
            out, stride = 16 * widen * 2**stage, 2 if stage and block == 0 else 1
            make = _propagating_block if bricks.propagates else _WideBlock
            layers.append((f"stage{stage + 1}_block{block + 1}", make(bricks, channels, out, stride, dropout)))
            channels = out
    blocks = [name for name, _ in layers[1:]]
    if bricks.propagates:
        watched = ["stem", *(name for block in blocks for name in (f"{block}.branch.conv1", block))]
    else:
        watched = [*(name for block in blocks for name in (f"{block}.relu1", f"{block}.relu2")), "relu"]
        layers += [("norm", bricks.norm(channels)), ("relu", nn.ReLU(inplace=True))]
    return assemble(layers, channels, num_classes, watched)
