"""On which axis of a layer's output the channels are: told by the layer, by trying it, or by the layers before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flexnorm.engine import FlexNorm
from flexnorm.probe.forward import side_forward
from flexnorm.probe.nested import first_tensor
from flexnorm.probe.recognition import recognize

_LAST = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention, nn.RNNBase)
_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.Upsample,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.PixelShuffle,
)


def channel_axis(module: nn.Module, ndim: int | None = None) -> int | None:
    """The axis of the channels, 1 or -1, of the output of a layer, as far as its kind tells.

    Convolutions, pooling and norms of images: 1. Linear maps, embeddings, attention, recurrent layers: -1. Norms of
    this package: their ``channel_axis``; torch's LayerNorm and RMSNorm of one axis: -1, of channels and positions: 1;
    all other norms: as :func:`recognize` finds by trying them.

    Args:
        module: Any layer.
        ndim: Number of axes of the output, for norms that put their channels by it; ``None`` where it is not known.

    Returns:
        The axis; ``None`` if the kind does not tell, as that of an activation function does not.
    """
    if isinstance(module, FlexNorm):
        several = len(getattr(module, "normalized_shape", ())) > 1
        return 1 if several else module.channel_axis
    if isinstance(module, _LAST):
        return -1
    if type(module).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward):
        return -1 if len(module.normalized_shape) == 1 else 1  # type: ignore[arg-type]
    if isinstance(module, _FIRST):
        return 1
    found = recognize(module)
    if found is None:
        return None
    return found.channel_axis if ndim is None or found.axis(ndim) is None else found.axis(ndim)


def channels_first(module: nn.Module, x: Tensor) -> Tensor:
    """The input or output ``x`` of a layer with its channels on axis 1, a view.

    Args:
        module: The layer; where its kind does not tell where the channels are, they are on axis 1.
        x: (N, C, *spatial) or (..., C), as :func:`channel_axis` says.
    """
    return x.movedim(-1, 1) if x.ndim > 2 and channel_axis(module, x.ndim) == -1 else x


def channel_axes(model: nn.Module, probe: Any, layers: Mapping[str, nn.Module], **side: Any) -> dict[str, int | None]:
    """The axis of the channels of every call of some layers, where one can be told. Leaves no trace in the model.

    In this order: what :func:`channel_axis` says; the only axis with as many entries as the layer's own weights have
    outputs; where several have, the one along which the output changes with one entry of a weight or bias; the axis of
    the last layer of known kind, inside this layer or before it, whose output has the same shape, or as many channels
    as only one axis here has entries; axis 1 of (N, C), and of images before any layer of known kind.

    Args:
        model: The unwrapped model.
        probe: What the model is called with, as of :func:`side_forward`.
        layers: Layers by name.
        **side: Further arguments of :func:`side_forward`.

    Returns:
        By name of the call (``#2`` and so on appended for further calls) the axis, or ``None`` if nothing tells.
    """
    axes: dict[str, int | None] = {}
    trail: list[tuple[torch.Size, int]] = []  # shapes and axes of what layers of known kind gave
    names = {module: name for name, module in layers.items()}
    taps = {name: m for name, m in model.named_modules() if m in names or channel_axis(m) is not None}
    calls = {names.get(module, name): module for name, module in taps.items()}

    def look(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is None:
            return
        axis = _told(module, inputs, tensor)
        if axis is not None:
            trail.append((tensor.shape, axis))
        elif module in names:
            axis = _followed(tensor, trail)
        if module in names:
            axes[name] = axis

    side_forward(model, probe, calls, look, **side)
    return axes


def _told(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> int | None:
    """What the layer itself says, by its kind, by its weights, or by trying."""
    axis = channel_axis(module, output.ndim)
    if axis is not None or output.ndim < 2:
        return axis
    own = {**module._parameters, **module._buffers}
    wide = {name: t for name, t in own.items() if t is not None and t.numel() > 1}
    vectors = {name: t for name, t in wide.items() if t.is_floating_point() and t.numel() == max(t.shape)}
    sizes = {t.numel() for t in vectors.values()} or {size for t in wide.values() for size in t.shape[:2]}
    fitting = [axis for axis in range(1, output.ndim) if output.shape[axis] in sizes]
    if len(fitting) > 1:
        acts = {name: _changes(module, name, value, inputs, output) for name, value in vectors.items()}
        fitting = [axis for axis in fitting if any(c is not None and _only_first(c, axis) for c in acts.values())]
    return fitting[0] if len(fitting) == 1 else None


def _changes(module: nn.Module, name: str, value: Tensor, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
    """How the output of a layer without submodules changes with the first entry of one of its vectors."""
    held = module._parameters if name in module._parameters else module._buffers
    if any(True for _ in module.children()):
        return None
    state, kept, found = torch.get_rng_state(), held[name], []
    try:
        for change in (0.0, 1.0):
            torch.set_rng_state(state)
            first = torch.zeros(value.numel(), dtype=value.dtype, device=value.device)
            first[0] = change
            held[name] = value.detach() + first.view_as(value)  # type: ignore[assignment]
            # Not the module: that would call the hooks.
            found.append(first_tensor(module.forward(*inputs)))
    except Exception:  # noqa: BLE001 - the layer is not ours, and may want more than its positional inputs
        return None
    finally:
        torch.set_rng_state(state)
        held[name] = kept  # type: ignore[assignment]
    before, after = found
    return after - before if before is not None and after is not None and after.shape == output.shape else None


def _only_first(change: Tensor, axis: int) -> bool:
    """Whether something changed at index 0 of an axis, and nothing elsewhere."""
    sizes = change.movedim(axis, 0).flatten(1).abs().amax(1)
    return float(sizes[0]) > 0 and float(sizes[1:].max()) <= 1e-6 * float(sizes[0])


def _followed(output: Tensor, trail: list[tuple[torch.Size, int]]) -> int | None:
    """What the layers inside and before say of this output."""
    for shape, axis in reversed(trail):
        if shape == output.shape:
            return axis
    for shape, axis in reversed(trail):
        fitting = [k for k in range(1, output.ndim) if output.shape[k] == shape[axis]]
        if len(fitting) == 1:
            return fitting[0]
    # Before any layer says something, images are as torch has them.
    return 1 if output.ndim == 2 or (output.ndim > 3 and not trail) else None
