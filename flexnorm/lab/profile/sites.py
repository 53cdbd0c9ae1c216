"""Where the layers of a model lie: which weight comes before each, which activation takes its output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from flexnorm.nn import is_norm, needs_batch
from flexnorm.probe import Selection, channel_axis, first_tensor, select_layers, side_forward

RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Threshold)
"""Activations that are 0 for every argument that is not positive (Threshold: as far as its threshold is 0)."""

FLAT: dict[type[nn.Module], tuple[float, float]] = {
    nn.Sigmoid: (-4.6, 4.6),
    nn.Tanh: (-2.65, 2.65),
    nn.Softsign: (-99.0, 99.0),
    nn.Hardtanh: (-1.0, 1.0),
    nn.Hardsigmoid: (-3.0, 3.0),
}
"""Below the first and above the second value an activation is within 1 % of its limits, or does not move at all."""

_ACTIVATIONS = (*RECTIFIERS, *FLAT)


@dataclass
class Site:
    """One call of one layer.

    Attributes:
        name: Name of the layer; ``#2`` and so on is appended for further calls.
        module: The layer.
        axis: Axis of the channels of its output.
        channels: Number of channels of its output.
        positions: Spatial positions of its output.
        weight: Name of the weight used last before the layer, or of its own.
        mixes_batch: Whether it normalizes with the statistics of the training batch.
        activation: The activation that takes its output as it is, if it is one of those known here.
    """

    name: str
    module: nn.Module
    axis: int
    channels: int
    positions: int
    weight: str | None
    mixes_batch: bool
    activation: nn.Module | None = None


def watched(model: nn.Module, layers: Selection | None) -> Selection:
    """Return what to watch: as asked for, else the normalization layers, else all layers with a weight."""
    if layers is not None:
        return layers
    if any(is_norm(module) for module in model.modules()):
        return "norm"
    return lambda _, module: own_weight(module) is not None


def own_weight(module: nn.Module) -> str | None:
    """Return the name of the first own parameter with two or more axes, or ``None``."""
    return next((name for name, p in module.named_parameters(recurse=False) if p.ndim >= 2), None)


def find_sites(model: nn.Module, batch: Tensor, layers: Selection) -> list[Site]:
    """Return the calls of the chosen layers in one forward of a batch, in their order. Leaves no trace in the model.

    Args:
        model: The model.
        batch: (N, C, H, W) images.
        layers: Which layers, as for :func:`flexnorm.probe.select_layers`.
    """
    chosen = select_layers(model, layers)
    taps = {
        name: module
        for name, module in model.named_modules()
        if name in chosen or own_weight(module) is not None or isinstance(module, _ACTIVATIONS)
    }
    found: list[tuple[Site, Tensor, int]] = []
    last: str | None = None

    def look(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal last
        own, base = own_weight(module), name.split("#")[0]
        if own is not None:
            last = f"{base}.{own}".lstrip(".")
        taken = first_tensor(inputs)
        if isinstance(module, _ACTIVATIONS) and taken is not None:
            # A residual sum may be written into the output of a layer: then it is not the output that the activation
            # takes, though it is the same tensor. The activation itself may have written into it once.
            now = taken._version - bool(getattr(module, "inplace", False))
            for site, kept, version in found:
                if kept is taken and version == now and site.activation is None:
                    site.activation = module
        tensor = first_tensor(output)
        if base in chosen and tensor is not None:
            axis = channel_axis(module)
            channels = tensor.shape[axis] if tensor.ndim > 1 else 1
            positions = max(1, tensor[0].numel() // max(channels, 1))
            mixes = needs_batch(module) and (module.training or getattr(module, "running_mean", None) is None)
            found.append((Site(name, module, axis, channels, positions, last, mixes), tensor, tensor._version))

    side_forward(model, batch, taps, look)
    return [site for site, _, _ in found]
