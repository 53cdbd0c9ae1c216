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

__all__ = ["HANDS_ON", "Carry", "joined", "passed"]


@dataclass(frozen=True)
class Carry:
    """``x[n, c] = scale[c] * x'[n, c] + shift[c]``, channels on axis 1.

    Attributes:
        scale: (C,), float64, never 0.
        shift: (C,), float64.
    """

    scale: Tensor
    shift: Tensor

    @property
    def increasing(self) -> bool:
        """Whether larger values stand for larger values."""
        return bool((self.scale > 0).all())

    @classmethod
    def identity(cls, channels: int) -> Carry:
        """Values that stand for themselves."""
        return cls(torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64))


def joined(carries: Sequence[Carry | None], channels: Sequence[int]) -> Carry | None:
    """Of a concatenation along the channels."""
    if all(carry is None for carry in carries):
        return None
    parts = [carry or Carry.identity(count) for carry, count in zip(carries, channels, strict=True)]
    return Carry(torch.cat([p.scale for p in parts]), torch.cat([p.shift for p in parts]))


_ALWAYS: tuple[type[nn.Module], ...] = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.Upsample,
)
_MAXIMUM = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_ADAPTIVE_MAXIMUM = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
_AVERAGE = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
HANDS_ON = (*_ALWAYS[:-1], *_MAXIMUM, *_AVERAGE)
"""Modules that hand on standardized values, as a rule."""

_FUNCTIONS = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
_MAX_FUNCTIONS = (F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d)
_AVG_FUNCTIONS = (F.avg_pool2d, F.avg_pool3d, torch.avg_pool1d)
_FLAT = ("flatten", "view", "reshape")


def passed(
    node: fx.Node, module: nn.Module | None, carry: Carry, before: torch.Size, after: torch.Size | None
) -> Carry | None:
    """What the output of an operation on one value stands for; None if the operation needs the original values.

    Args:
        node: The operation.
        module: Its module, for ``call_module``.
        carry: Of its input.
        before: Shape of the input.
        after: Shape of the output.
    """
    if after is None:
        return None
    if module is not None:
        return _through_module(module, carry, before, after)
    if node.op == "call_function" and node.target in _FUNCTIONS:
        return carry
    if node.op == "call_function" and node.target in (*_MAX_FUNCTIONS, *_AVG_FUNCTIONS):
        return _through_pooling(node, carry)
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    if name == "contiguous":
        return carry
    if name in _FLAT:
        return _flattened(carry, before, after)
    if name == "mean" and len(after) >= 2 and after[:2] == before[:2]:
        return carry if _axes(node, len(before)) else None
    return None


def _through_module(module: nn.Module, carry: Carry, before: torch.Size, after: torch.Size) -> Carry | None:
    kind = type(module)
    if kind in _ALWAYS:
        return carry
    if kind is nn.Flatten:
        return _flattened(carry, before, after)
    if kind in (*_MAXIMUM, *_ADAPTIVE_MAXIMUM):
        return carry if carry.increasing and not module.return_indices else None
    if kind in _AVERAGE:
        padded = any(p for p in _tuple(module.padding)) and bool(module.count_include_pad)
        # Averages over windows that reach over the border in ceil mode are divided by the number of values in them.
        return carry if not padded or not bool(carry.shift.any()) else None
    return None


def _through_pooling(node: fx.Node, carry: Carry) -> Carry | None:
    if node.target in _MAX_FUNCTIONS:
        return carry if carry.increasing and not node.kwargs.get("return_indices") and len(node.args) < 7 else None
    padding = node.args[3] if len(node.args) > 3 else node.kwargs.get("padding", 0)
    return carry if not any(_tuple(padding)) else None


def _flattened(carry: Carry, before: torch.Size, after: torch.Size) -> Carry | None:
    if before == after:
        return carry
    if len(after) != 2 or after[0] != before[0] or after[1] != math.prod(before[1:]):
        return None
    # The positions of a channel stand side by side.
    repeats = math.prod(before[2:])
    return Carry(carry.scale.repeat_interleave(repeats), carry.shift.repeat_interleave(repeats))


def _axes(node: fx.Node, dims: int) -> bool:
    """Whether a mean goes over positions only."""
    axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if axes is None or not all(isinstance(a, int) for a in _tuple(axes)):
        return False
    return not {a % dims for a in _tuple(axes)} & {0, 1}


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
