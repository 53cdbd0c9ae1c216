"""How a value of the converted network stands for one of the original: by a scale and a shift per channel.

A converted layer hands on standardized values x', where the original had x = scale x' + shift. Some operations do not
mind: what they make of x' stands for what they made of x in the same way, or with tables that follow from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

__all__ = ["HANDS_ON", "ScaleShift", "joined", "passed"]


@dataclass(frozen=True)
class ScaleShift:
    """``x[n, c] = scale[c] * x'[n, c] + shift[c]``, channels on axis 1.

    Attributes:
        scale: (C,), float64, never 0.
        shift: (C,), float64.
    """

    scale: Tensor
    shift: Tensor

    @classmethod
    def identity(cls, channels: int) -> ScaleShift:
        """Of values that stand for themselves."""
        return cls(torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64))


def joined(parts: Sequence[ScaleShift | None], channels: Sequence[int]) -> ScaleShift | None:
    """Of a concatenation along the channels; ``None`` stands for the original's values."""
    if all(part is None for part in parts):
        return None
    known = [part or ScaleShift.identity(count) for part, count in zip(parts, channels, strict=True)]
    return ScaleShift(torch.cat([p.scale for p in known]), torch.cat([p.shift for p in known]))


_NEUTRAL: set[type[nn.Module]] = {nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d}
_NEUTRAL |= {nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d}
_ADAPTIVE_MAXIMUM = {nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d}
_MAXIMUM, _AVERAGE = {nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d}, {nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d}
HANDS_ON = _NEUTRAL | _MAXIMUM | _AVERAGE
"""Modules that hand on standardized values, as a rule."""

_ADAPTIVE_FUNCTIONS = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
_MAX_FUNCTIONS = (F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d)
_AVG_FUNCTIONS = (F.avg_pool2d, F.avg_pool3d, torch.avg_pool1d)


def passed(
    node: fx.Node, module: nn.Module | None, scaling: ScaleShift, before: torch.Size, after: torch.Size | None
) -> ScaleShift | None:
    """What the output of an operation on one value stands for; None if the operation needs the original values.

    ``module`` is the one that ``node`` calls, if any; ``scaling`` and ``before`` (a shape) are those of the input.
    """
    if after is None:
        return None
    kind: Any = node.target if module is None else type(module)
    name = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
    increasing = bool((scaling.scale > 0).all())
    if kind in _NEUTRAL or kind is nn.Upsample or kind in _ADAPTIVE_FUNCTIONS:
        return scaling
    if kind in _MAXIMUM | _ADAPTIVE_MAXIMUM and module is not None:
        return scaling if increasing and not module.return_indices else None
    if kind in _AVERAGE and module is not None:
        padded = any(_tuple(module.padding)) and bool(module.count_include_pad)
        # Averages over windows that reach over the border in ceil mode are divided by the number of values in them.
        return scaling if not padded or not bool(scaling.shift.any()) else None
    if kind in _MAX_FUNCTIONS:
        return scaling if increasing and not node.kwargs.get("return_indices") and len(node.args) < 7 else None
    if kind in _AVG_FUNCTIONS:
        padding = node.args[3] if len(node.args) > 3 else node.kwargs.get("padding", 0)
        return None if any(_tuple(padding)) else scaling
    if kind is nn.Flatten or (module is None and name in ("flatten", "view", "reshape")):
        return _flattened(scaling, before, after)
    if module is None and name == "mean" and len(after) >= 2 and after[:2] == before[:2]:
        return scaling if _over_positions(node, len(before)) else None
    return scaling if module is None and name == "contiguous" else None


def _flattened(scaling: ScaleShift, before: torch.Size, after: torch.Size) -> ScaleShift | None:
    if before == after:
        return scaling
    if len(after) != 2 or after[0] != before[0] or after[1] != math.prod(before[1:]):
        return None
    # The positions of a channel stand side by side.
    repeats = math.prod(before[2:])
    return ScaleShift(scaling.scale.repeat_interleave(repeats), scaling.shift.repeat_interleave(repeats))


def _over_positions(node: fx.Node, dims: int) -> bool:
    """Whether a mean goes over positions only."""
    axes = _tuple(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim"))
    return all(isinstance(a, int) for a in axes) and not {a % dims for a in axes} & {0, 1}


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
