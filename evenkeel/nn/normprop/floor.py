"""Shift and floor per channel in one pass: what a standardized rectifier is once 1 / std has moved into the weight.

``relu(u + shift) - offset = max(u + shift - offset, -offset)``. Composed of torch's operations, that is two passes
over the activations forward and four backward (mask, two sums, a bias); here it is one and one, compiled by
TorchInductor or not.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evenkeel.flexnorm import passes
from evenkeel.flexnorm._compile import library
from evenkeel.nn.normprop.elementwise import per_channel

__all__ = ["may", "shift_and_floor_", "takes"]

_ALONE = 1 << 15  # numbers that one thread is done with before it has woken another


@functools.cache
def _kernel() -> ctypes.CDLL | None:
    found = library(Path(__file__).with_name("floor.c"), "Normalization Propagation")
    if found is None:
        return None
    kernel, pointer, size = found[0], ctypes.c_void_p, ctypes.c_int64
    kernel.floor_forward.argtypes = [size] * 3 + [pointer] * 4 + [ctypes.c_int]
    kernel.floor_forward.restype = None
    kernel.floor_backward.argtypes = [size] * 3 + [pointer] * 6 + [ctypes.c_int]
    kernel.floor_backward.restype = ctypes.c_int
    return kernel


def may(table: Tensor) -> bool:
    """Tell, from a table of its layer, whether what comes of it has a chance to be taken."""
    traced = not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None
    if traced or torch.compiler.is_exporting():
        return False  # an exported program is to hold torch's operations only
    return (
        table.device.type == "cpu"
        and table.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not passes.transformed()
        and torch.autograd.forward_ad._current_level < 0
        and _available()
    )


def takes(u: Tensor) -> bool:
    """Tell whether :func:`shift_and_floor_` takes a tensor, where :func:`may` said yes."""
    plain = torch.compiler.is_compiling() or type(u) is Tensor
    return plain and u.dtype == torch.float32 and u.dim() >= 2 and u.numel() > 0 and _order(u) is not None


@torch.compiler.assume_constant_result
def _available() -> bool:
    return _kernel() is not None


def shift_and_floor_(u: Tensor, shift: Tensor, floor: Tensor) -> Tensor:
    """``max(u + shift, floor)``, written over ``u``.

    Args:
        u: (N, C, *), one that :func:`takes`, whose old value nobody needs.
        shift: (C,).
        floor: (C,).
    """
    if torch.compiler.is_compiling():
        # Inductor's own reductions over the channels of an activation are slower than all of the rest.
        compiled: Tensor = _forward(u, shift, floor)
        return compiled
    return _ShiftFloor.apply(u, shift, floor)  # type: ignore[no-untyped-call,no-any-return]


def _order(u: Tensor) -> tuple[int, int, int] | None:
    """Outer size, channels, inner size; None for other layouts."""
    channels = u.shape[1]
    if u.is_contiguous():
        return u.shape[0], channels, u.numel() // (u.shape[0] * channels)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(u.dim())
    if last is not None and u.is_contiguous(memory_format=last):
        return u.numel() // channels, channels, 1
    return None


def _threads(u: Tensor) -> int:
    return torch.get_num_threads() if u.numel() > _ALONE else 1


class _ShiftFloor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, shift: Tensor, floor: Tensor) -> Tensor:
        shift, floor = shift.contiguous(), floor.contiguous()
        _run_forward(u, u, shift, floor)
        ctx.mark_dirty(u)
        ctx.save_for_backward(u, floor)
        return u

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, floor = ctx.saved_tensors
        if torch.is_grad_enabled() or passes.transformed(g) or type(g) is not Tensor or g.dtype != y.dtype:
            d = g * (y > per_channel(floor, y.dim() - 2, y)).to(g.dtype)
            axes = [0, *range(2, g.dim())]
            return d, d.sum(axes), (g - d).sum(axes)
        d, sums = _run_backward(g, y, floor)
        return d, sums[0], sums[1]


def _run_forward(u: Tensor, y: Tensor, shift: Tensor, floor: Tensor) -> None:
    order, kernel = _order(u), _kernel()
    assert order is not None
    assert kernel is not None
    pointers = (u, y, shift, floor)
    kernel.floor_forward(*order, *(t.data_ptr() for t in pointers), _threads(u))


def _run_backward(g: Tensor, y: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    if g.stride() != y.stride():
        g = torch.empty_like(y).copy_(g)
    order, kernel = _order(y), _kernel()
    assert order is not None
    assert kernel is not None
    d, sums = torch.empty_like(y), y.new_empty(2, order[1])
    pointers = (g, y, floor, d, sums[0], sums[1])
    if kernel.floor_backward(*order, *(t.data_ptr() for t in pointers), _threads(y)):
        raise MemoryError("no memory for the sums of a backward pass")
    return d, sums


# The same for compiled code, as operations that the compiler does not look into.


@torch.library.custom_op("evenkeel::shift_and_floor", mutates_args=())
def _forward(u: Tensor, shift: Tensor, floor: Tensor) -> Tensor:
    y = torch.empty_like(u)
    _run_forward(u, y, shift.contiguous(), floor.contiguous())
    return y


@_forward.register_fake
def _(u: Tensor, shift: Tensor, floor: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(u)


@torch.library.custom_op("evenkeel::shift_and_floor_backward", mutates_args=())
def _backward(g: Tensor, y: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    return _run_backward(g, y, floor.contiguous())


@_backward.register_fake
def _(g: Tensor, y: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return torch.empty_like(y), y.new_empty(2, y.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output, inputs[2])


def _differentiate(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y, floor = ctx.saved_tensors
    d, sums = _backward(g, y, floor)
    return d, sums[0], sums[1]


_forward.register_autograd(_differentiate, setup_context=_save)
