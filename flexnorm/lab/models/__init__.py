"""The networks of the papers, each built around any normalization."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from typing import Any

from torch import nn

from flexnorm._messages import unknown_name
from flexnorm.lab.models.networks import (
    Blocks,
    NormSpec,
    conv4fc2,
    convnet,
    nin,
    norm_names,
    resnet,
    resnet18,
    vgg,
    watched_layers,
    wide_resnet,
)

__all__ = ["MODELS", "build", "norm_names", "watched_layers"]

_VGG13 = ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512))
_VGG19 = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)

_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "conv4fc2": conv4fc2,
    "convnet": convnet,
    "nin": nin,
    "resnet8": partial(resnet, depth=8),
    "resnet18": resnet18,
    **{f"resnet{depth}": partial(resnet, depth=depth) for depth in (20, 56, 110)},
    "vgg_small": partial(vgg, stages=((32, 32), (64, 64), (128, 128))),
    "vgg13": partial(vgg, stages=_VGG13),
    "vgg19": partial(vgg, stages=_VGG19),
    **{f"wrn{depth}": partial(wide_resnet, depth=depth) for depth in (10, 16, 22, 28, 40)},
}

MODELS: tuple[str, ...] = tuple(_BUILDERS)
"""Names that :func:`build` knows."""


def build(
    name: str,
    norm: NormSpec = "batch",
    in_channels: int = 3,
    num_classes: int = 10,
    *,
    norm_args: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a network of the papers by name.

    Args:
        name: One of :data:`MODELS`.
        norm: Name of a normalization (see :func:`norm_names`) or a callable ``channels -> module``.
        in_channels: Channels of the images.
        num_classes: Number of outputs.
        norm_args: Options of the normalization, whatever they are called.
        **kwargs: Options of the network: ``width`` (all but ``convnet``, which has ``widths``, and ``wrn..``, which
            have ``widen``), ``dropout`` (``conv4fc2``, ``resnet..``, ``wrn..``), ``depth`` (``resnet..``, ``wrn..``),
            ``stages`` (``vgg..``), ``only`` and ``weight_norm`` (``conv4fc2``), see their modules. All others are for
            the normalization (``momentum``, ``eps``).

    Returns:
        A module from images (N, in_channels, H, W) to logits (N, num_classes).

    Raises:
        ValueError: For an unknown network or normalization, with the nearest valid name, and options that the network
            cannot have (depths that do not fit its blocks, a width below 1).

    Examples:
        >>> import torch
        >>> build("resnet8", norm="unitized", in_channels=1)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    if name not in _BUILDERS:
        raise ValueError(unknown_name("model", name, MODELS))
    known = signature(_BUILDERS[name]).parameters
    of_norm = {key: value for key, value in kwargs.items() if key not in known} | dict(norm_args or {})
    blocks = Blocks(norm, of_norm, in_channels, num_classes)
    return _BUILDERS[name](blocks, **{key: value for key, value in kwargs.items() if key in known})
