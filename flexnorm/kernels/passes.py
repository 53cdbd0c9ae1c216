"""The passes over an activation, on whichever backend serves its device, type and layout.

Four implementations give the same tables and activations (the tests hold them against each other):

* ``"c"``: the C kernels of ``normalization.c`` (CPU, large activations, both memory formats).
* ``"triton"``: the Triton kernels of ``triton_kernels.py`` (GPUs, both memory formats).
* ``"torch"``: torch's own fused kernels (CPU, contiguous), with no compilation: the statistics pass of BatchNorm on the
  view (1, N*C, P) yields the moments; BatchNorm in evaluation mode with weight = scale and bias = shift is the affine
  pass, and its backward yields ``sum g*x``, ``sum g`` and ``scale*g`` at once.
* ``"composed"``: plain differentiable torch operations. Everything else: tiny or empty tensors, double backward,
  ``torch.func`` transforms, and any code that torch.compile or torch.export traces and fuses with its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from flexnorm.kernels import triton_passes
from flexnorm.kernels.layout import Layout, over_positions, table_dtype
from flexnorm.kernels.normalization import call, strided


def composed_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (N, C) by plain torch operations."""
    values = x.to(table_dtype(x.dtype))
    if x.dim() == 2:
        return values, torch.zeros_like(values)
    if x.numel() == 0:  # no values, no moments: zeros keep 0/0 out of the graph
        zeros = values.sum(tuple(range(2, x.dim())))
        return zeros, zeros
    var, mean = torch.var_mean(values, tuple(range(2, x.dim())), correction=0)
    return mean, var


def composed_affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``scale * x + shift`` in the type of ``x`` by plain torch operations."""
    values = x.to(scale.dtype)
    return torch.addcmul(over_positions(shift, x), values, over_positions(scale, x)).to(x.dtype)


def _as_rows(x: Tensor, size: tuple[int, int, int]) -> Tensor:
    return x.view(1, size[0] * size[1], size[2])


def _reshaped(fresh: Tensor, shape: Sequence[int]) -> Tensor:
    """A fresh tensor in another shape, not as a view: views that leave an autograd function forbid in-place ReLU."""
    return cast("Tensor", torch.ops.aten._unsafe_view(fresh, list(shape)))


def _tables(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    dtype = table_dtype(x.dtype)
    return torch.empty(layout.size[:2], dtype=dtype), torch.empty(layout.size[:2], dtype=dtype)


def moments(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the positions, each (N, C)."""
    if layout.backend == "triton":
        return triton_passes.moments(x, layout)
    if layout.backend == "c":
        mean, var = _tables(x, layout)
        call(f"moments_{layout.order}", x.dtype, x, mean, var, *layout.size, torch.get_num_threads())
        return mean, var
    if layout.backend == "torch":
        mean, var = torch.ops.aten.batch_norm_update_stats(_as_rows(x, layout.size), None, None, 0.0)
        return _reshaped(mean, layout.size[:2]), _reshaped(var, layout.size[:2])
    return composed_moments(x)


def affine(x: Tensor, scale: Tensor, shift: Tensor | None, layout: Layout) -> Tensor:
    """``scale * x + shift`` in the memory format of ``x``; tables broadcast to (N, C); no shift means zero."""
    if layout.backend == "triton":
        return triton_passes.affine(x, scale, shift, layout)
    size = layout.size[:2]
    if layout.backend == "composed":
        if shift is None:
            return (x.to(scale.dtype) * over_positions(scale, x)).to(x.dtype)
        return composed_affine(x, scale, shift)
    scale, shift = scale.expand(size), None if shift is None else shift.expand(size)
    if layout.backend == "torch":
        return _torch_affine(x, scale, shift, layout.size)
    y = torch.empty_like(x)
    tables = (*strided(scale), *strided(shift))
    call(f"affine_{layout.order}", x.dtype, x, *tables, y, *layout.size, torch.get_num_threads())
    return y


def _torch_affine(x: Tensor, scale: Tensor, shift: Tensor | None, size: tuple[int, int, int]) -> Tensor:
    rows = size[0] * size[1]
    zero, one = scale.new_zeros(rows), scale.new_ones(rows)
    bias = zero if shift is None else shift.reshape(rows)
    y = torch.native_batch_norm(_as_rows(x, size), scale.reshape(rows), bias, zero, one, False, 0.0, 0.0)[0]
    return _reshaped(y, x.shape)


def sums(
    g: Tensor, x: Tensor, center: Tensor | None, layout: Layout, shapes: tuple[Sequence[int], Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """``sum g * x`` and ``sum g`` over the positions, (N, C), and further down to ``shapes``, which broadcast to that.

    The first is taken about ``center``, ``sum g * (x - center) + center * sum g``: summed directly, that of an
    activation with a large mean would lose its digits.
    """
    if layout.backend == "triton":
        return triton_passes.sums(g, x, center, layout, shapes)
    samples, channels = layout.size[:2]
    if layout.backend == "c":
        s1, s0 = _tables(x, layout)
        call(f"sums_{layout.order}", x.dtype, g, x, center, s1, s0, *layout.size, torch.get_num_threads())
        if tuple(shapes[0]) == tuple(shapes[1]) == (1, channels):
            sum1, sum0 = s1.new_empty((1, channels)), s1.new_empty((1, channels))
            call("add_samples", s1.dtype, s1, s0, sum1, sum0, samples, channels)
            return sum1, sum0
    elif layout.backend == "torch":
        mean = x.new_zeros(samples * channels) if center is None else center.reshape(samples * channels)
        one = torch.ones_like(mean)
        rows, mask = (_as_rows(g, layout.size), _as_rows(x, layout.size)), [False, True, True]
        found = torch.ops.aten.native_batch_norm_backward(*rows, one, mean, one, None, None, False, 0.0, mask)
        s1, s0 = _reshaped(found[1], layout.size[:2]), _reshaped(found[2], layout.size[:2])
        s1 = s1 if center is None else torch.addcmul(s1, center, s0)
    else:
        values, s0 = x.to(table_dtype(x.dtype)), g.to(table_dtype(x.dtype))
        s1 = s0 * (values if center is None or x.dim() == 2 else values - over_positions(center, x))
        if axes := tuple(range(2, x.dim())):
            s1, s0 = s1.sum(axes), s0.sum(axes)
            s1 = s1 if center is None else torch.addcmul(s1, center, s0)
    return s1.sum_to_size(shapes[0]), s0.sum_to_size(shapes[1])


def combine(
    g: Tensor, x: Tensor, scale: Tensor | None, dmean: Tensor | None, dvar: Tensor | None, mean: Tensor, layout: Layout
) -> Tensor:
    """The gradient of ``x``: ``scale * g + dmean / P + 2 * dvar * (x - mean) / P``.

    Tables broadcast to (N, C), ``mean`` (N, C) is dense; no scale means one, no other table means zero.
    """
    if layout.backend == "triton":
        return triton_passes.combine(g, x, scale, dmean, dvar, mean, layout)
    positions = max(layout.size[2], 1)
    size = layout.size[:2]
    scale = (torch.ones((), dtype=mean.dtype, device=mean.device) if scale is None else scale).expand(size)
    if layout.backend == "c":
        dx = torch.empty_like(x)
        dmean, dvar = (None if t is None else t.expand(size) for t in (dmean, dvar))
        tables = (*strided(scale), *strided(dmean), 1.0 / positions, *strided(dvar), 2.0 / positions)
        call(f"combine_{layout.order}", x.dtype, g, x, *tables, mean, dx, *layout.size, torch.get_num_threads())
        return dx
    a = torch.zeros_like(mean) if dmean is None else dmean / positions
    b = torch.zeros_like(mean) if dvar is None else dvar * (2.0 / positions)
    if layout.backend == "torch":
        # Two affine passes and one sum: torch has no fused kernel for all three.
        dx = _torch_affine(g, scale, a - b * mean, layout.size)
        return dx.add_(_torch_affine(x, b, None, layout.size))
    dtype = table_dtype(x.dtype)
    dx = over_positions(b, x) * (x.to(dtype) - over_positions(mean, x))
    dx = torch.addcmul(dx + over_positions(a, x), g.to(dtype), over_positions(scale, x))
    return dx.to(x.dtype)


def transformed(*tensors: Tensor | None) -> bool:
    """Whether a torch.func transform is active or gradients come batched: such tensors have no memory of their own."""
    functorch = torch._C._functorch
    batched = any(t is not None and functorch.is_legacy_batchedtensor(t) for t in tensors)
    return batched or functorch.peek_interpreter_stack() is not None


def must_compose(*grads: Tensor | None) -> bool:
    """Whether a backward has to run by torch's operations: it is itself differentiated, batched or transformed."""
    return torch.is_grad_enabled() or transformed(*grads)


def gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of the ``inputs`` of a composition for those of its outputs, differentiable if gradients are on.

    ``needed`` tells whose gradients are wanted (what it says beyond the inputs is ignored); an output without a
    gradient does not count.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Some inputs are functions of others: only aliases have partial derivatives.
        aliases = [None if t is None else t.view_as(t) if again else t.detach().requires_grad_() for t in inputs]
        wanted = [t for t, need in zip(aliases, needed, strict=False) if t is not None and need]
        outputs = function(*aliases)
        pairs = zip((outputs,) if isinstance(outputs, Tensor) else outputs, grads, strict=True)
        known = [(y, g) for y, g in pairs if g is not None and y.requires_grad]
        roots, seeds = [y for y, _ in known], [g for _, g in known]
        found = iter(torch.autograd.grad(roots, wanted, seeds, create_graph=again, allow_unused=True))
    return [next(found) if t is not None and need else None for t, need in zip(inputs, needed, strict=False)]
