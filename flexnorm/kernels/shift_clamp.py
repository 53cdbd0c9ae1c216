"""Shift and clamp per channel in one pass: what a standardized rectifier is once 1 / std has moved into the weight.

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

from flexnorm.kernels.build import declare, library, threads
from flexnorm.kernels.layout import memory_order, positions_of
from flexnorm.kernels.passes import must_compose, transformed


@functools.cache
def _kernel() -> ctypes.CDLL | None:
    found = library(Path(__file__).with_name("shift_clamp.c"), "Normalization Propagation")
    if found is None:
        return None
    declare(found[0].clamp_forward, "nnnpppppi")
    declare(found[0].clamp_backward, "nnnpppppi", ctypes.c_int)
    return found[0]


def may(table: Tensor) -> bool:
    """Tell, from a table of its layer, whether what comes of it has a chance to be taken."""
    traced = not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None
    if traced or torch.compiler.is_exporting():
        return False  # an exported program is to hold torch's operations only
    return (
        table.device.type == "cpu"
        and table.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not _transformed()
        and torch.autograd.forward_ad._current_level < 0
        and _available()
    )


def takes(u: Tensor) -> bool:
    """Tell whether :func:`shift_and_clamp_` takes a tensor, where :func:`may` said yes."""
    plain = torch.compiler.is_compiling() or type(u) is Tensor
    return plain and u.dtype == torch.float32 and u.dim() >= 2 and u.numel() > 0 and _order(u) is not None


@torch.compiler.assume_constant_result
def _transformed() -> bool:
    # Asked while a compiler traces, when transforms are in force as in eager code; Dynamo itself would guess yes.
    return transformed()


@torch.compiler.assume_constant_result
def _available() -> bool:
    return _kernel() is not None


def shift_and_clamp_(u: Tensor, shift: Tensor, low: Tensor) -> Tensor:
    """``max(u + shift, low)``, written over ``u``.

    Args:
        u: (N, C, *), one that :func:`takes`, whose old value nobody needs.
        shift: (C,).
        low: (C,).
    """
    if torch.compiler.is_compiling():
        # Inductor's own reductions over the channels of an activation are slower than all of the rest.
        compiled: Tensor = _forward(u, shift, low)[0]
        return compiled
    return _ShiftClamp.apply(u, shift, low)  # type: ignore[no-untyped-call,no-any-return]


def _order(u: Tensor) -> tuple[int, int, int] | None:
    """Outer size, channels, inner size; None for strides that the kernel does not walk."""
    samples, channels, positions = u.shape[0], u.shape[1], positions_of(u)
    return {"rows": (samples, channels, positions), "cols": (samples * positions, channels, 1)}.get(memory_order(u))


def _run(name: str, u: Tensor, *tensors: Tensor | None) -> Any:
    """Run a kernel over activations of the shape and strides of ``u``."""
    order, kernel = _order(u), _kernel()
    assert order is not None
    return getattr(kernel, name)(*order, *(None if t is None else t.data_ptr() for t in tensors), threads(u.numel()))


def _run_backward(g: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    d = torch.empty_like(mask, dtype=g.dtype)
    if g.stride() != mask.stride():
        g = torch.empty_like(d).copy_(g)
    sums = g.new_empty(2, mask.shape[1])
    if _run("clamp_backward", mask, g, mask, d, *sums):
        raise MemoryError("no memory for the sums of a backward pass")
    return d, sums


class _ShiftClamp(torch.autograd.Function):
    """The mask is kept and not the output, which whoever takes it may overwrite, as a residual sum in place does."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, shift: Tensor, low: Tensor) -> Tensor:
        mask = torch.empty_like(u, dtype=torch.bool) if any(ctx.needs_input_grad) else None
        _run("clamp_forward", u, u, u, mask, shift.contiguous(), low.contiguous())
        ctx.mark_dirty(u)
        ctx.save_for_backward(mask)
        return u

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (mask,) = ctx.saved_tensors
        if must_compose(g) or type(g) is not Tensor or g.dtype != torch.float32:
            d = g * mask.to(g.dtype)
            axes = [0, *range(2, g.dim())]
            return d, d.sum(axes), (g - d).sum(axes)
        d, sums = _run_backward(g, mask)
        return d, sums[0], sums[1]


# The same for compiled code, as operations that the compiler does not look into. They take any layout: Inductor prefers
# channels last for convolutions and would transpose each activation there and back.
_LAYOUT = (torch.Tag.flexible_layout,)


@torch.library.custom_op("flexnorm::shift_and_clamp", mutates_args=(), tags=_LAYOUT)
def _forward(u: Tensor, shift: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    y, mask = torch.empty_like(u), torch.empty_like(u, dtype=torch.bool)
    _run("clamp_forward", u, u, y, mask, shift.contiguous(), low.contiguous())
    return y, mask


@_forward.register_fake
def _(u: Tensor, shift: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return torch.empty_like(u), torch.empty_like(u, dtype=torch.bool)


@torch.library.custom_op("flexnorm::shift_and_clamp_backward", mutates_args=(), tags=_LAYOUT)
def _backward(g: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return _run_backward(g, mask)


@_backward.register_fake
def _(g: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mask, dtype=g.dtype), g.new_empty(2, mask.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:  # noqa: ARG001
    ctx.save_for_backward(output[1])


def _differentiate(ctx: Any, g: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    d, sums = _backward(g, ctx.saved_tensors[0])
    return d, sums[0], sums[1]


_forward.register_autograd(_differentiate, setup_context=_save)
