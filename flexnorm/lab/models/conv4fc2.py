"""Four convolutions and two dense layers: the network in which Luo et al. (2019, Fig. 2) take BatchNorm apart.

After Salimans & Kingma (2016). Widths and poolings are in an appendix that we have not seen; here they are those of a
small VGG. The hidden dense layer is written as the convolution whose kernel covers its whole input, which is the same
map and lets every normalization of images stand behind it.
"""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrizations

from flexnorm.lab.models.blocks import Blocks
from flexnorm.nn import NoNorm, PopulationNorm2d

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
