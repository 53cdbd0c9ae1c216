r"""Which numbers of a parameter form one weight vector, and how to lay them out as rows of a matrix.

The weight vector of an output unit is a slice along the output axis: axis 0 for linear layers and convolutions, axis 1
for transposed convolutions, whose weight is ``(in, out / groups, *kernel)`` with the groups hidden in axis 0, and for
linear maps that hold their weight as ``(in, out)``, as GPT-2's ``Conv1D`` does: that is found out by trying. The slices
of several neighbouring units may be one vector together: those of a head, or all, which is the matrix with its
Frobenius length.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flexnorm.probe import isolated, tensors


@dataclass(frozen=True)
class RowLayout:
    """How one parameter is read as rows.

    Attributes:
        rows: Number of weight vectors.
        n: Numbers in one weight vector.
        row_dim: Axis of the output units, 0 or 1.
        blocks: Groups of the convolution; rows come in this many equal blocks.
        units: Output units whose weights are one vector together.
        order: Permutation of the axes behind the first, so that memory is walked in its own order.
        plain: Whether that order is the natural one.
    """

    rows: int
    n: int
    row_dim: int
    blocks: int
    order: tuple[int, ...]
    plain: bool
    units: int = 1

    @classmethod
    def of(cls, weight: Tensor, row_dim: int = 0, blocks: int = 1, units: int = 1) -> RowLayout:
        """Derive the layout from a weight, ``(out, *)`` for ``row_dim`` 0, ``(in, out / blocks, *)`` for ``row_dim`` 1.

        ``units`` output units are one vector, 0 stands for all.

        Raises:
            ValueError: If the weight has fewer than two axes, its first axis does not divide into the blocks, or the
                output units of a block do not divide into vectors.
        """
        if weight.ndim < 2:
            raise ValueError(
                f"a parameter of shape {tuple(weight.shape)} has no weight vectors, so it cannot go on the manifold: "
                "put it into a group with manifold=False (flexnorm.optim.param_groups(model) sorts this out)"
            )
        if weight.shape[0] % blocks:
            raise ValueError(f"row_groups={blocks} does not divide axis 0 of a weight of shape {tuple(weight.shape)}")
        rows = weight.shape[0] if row_dim == 0 else weight.shape[1] * blocks
        if units == 0 or units == rows > 1:
            units, rows, blocks = rows, min(rows, 1), 1
        elif units > 1:
            if (rows // blocks) % units:
                raise ValueError(
                    f"row_units={units} does not divide the {rows // blocks} output units of a weight of shape "
                    f"{tuple(weight.shape)}: give the size of a head, or 0 for the whole matrix"
                )
            rows //= units
        axes = range(1, weight.ndim)
        # Within a row the order of the elements is free, so take the one in memory: channels_last needs no copy.
        order = tuple(axes) if weight.is_contiguous() else tuple(sorted(axes, key=weight.stride, reverse=True))
        return cls(rows, weight.numel() // rows if rows else 0, row_dim, blocks, order, order == tuple(axes), units)

    def view(self, t: Tensor) -> Tensor:
        """View a tensor of the shape of the weight with the row axis (or axes: block, row, unit) in front."""
        if self.rows == 1 and self.units > 1:
            return t.unsqueeze(0)  # the whole weight, whose elements may come in any order
        if self.row_dim == 0:
            if self.plain and t.is_contiguous():
                return t.view(self.rows, self.n)
            t = t.permute(0, *self.order)
            return t if self.units == 1 else t.view(self.rows, self.units, *t.shape[1:])
        t = t.view(self.blocks, t.shape[0] // self.blocks, *t.shape[1:]).movedim(2, 1)
        return t if self.units == 1 else t.view(self.blocks, -1, self.units, *t.shape[2:])


def row_axis(module: nn.Module, weight: Tensor) -> tuple[int, int]:
    """Return the axis of the output units of the ``weight`` of a ``module``, and the groups of a convolution.

    A matrix of a module whose forward is not torch's is tried: of which axis does one index change one output only, in
    isolation and with other numbers in its place? Where neither does, or the module cannot be called with one tensor,
    it is axis 0.

    Examples:
        >>> class Conv1D(nn.Linear):
        ...     def forward(self, x):
        ...         return x @ self.weight
        >>> row_axis(layer := Conv1D(3, 3), layer.weight), row_axis(layer := nn.Linear(3, 3), layer.weight)
        ((1, 1), (0, 1))
    """
    if weight.ndim >= 3 and hasattr(module, "kernel_size"):
        return int(getattr(module, "transposed", False)), int(getattr(module, "groups", 1))
    known = type(module).forward.__module__.startswith("torch.nn.modules.") and "forward" not in vars(module)
    return 0 if known or weight.ndim != 2 else _tried_axis(module, weight), 1


def _tried_axis(module: nn.Module, weight: Tensor) -> int:
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point() or weight.is_meta:
        return 0
    generator = torch.Generator().manual_seed(0)
    for size in {weight.shape[1]: 0, weight.shape[0]: 1}:  # of the input; in the order of how common it is
        x = torch.randn((2, size), generator=generator).to(weight)
        try:
            plain = _called(module, weight, x, None)
            for axis in (0, 1):
                change = (_called(module, weight, x, axis) - plain).abs()
                if weight.shape[axis] == plain.shape[-1] > 1 and _only_last(change > 1e-2 * change.amax()):
                    return axis
        except Exception:  # noqa: BLE001 - what a module that is not ours raises when it is called like this
            continue
    return 0


def _called(module: nn.Module, weight: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """Call a module alone, with ones as its weight, of which the last index along an axis is doubled."""
    ones = torch.ones_like(weight, requires_grad=False)
    if axis is not None:
        ones.select(axis, -1).fill_(2.0)
    with isolated(module, 0):
        own = {name: ones if p is weight else p for name, p in module._parameters.items()}
        module.__dict__["_parameters"] = own
        (output,) = tensors(module.eval().forward(x))
    return output


def _only_last(changed: Tensor) -> bool:
    return bool(changed[..., -1].all()) and not bool(changed[..., :-1].any())


def to_rows(t: Tensor, layout: RowLayout) -> Tensor:
    """Return ``t``, read with its ``layout``, as a matrix ``(rows, n)``: a view where memory allows, else a copy."""
    return layout.view(t).reshape(layout.rows, layout.n)


def from_rows(matrix: Tensor, out: Tensor, layout: RowLayout) -> None:
    """Write a matrix ``(rows, n)`` back into a tensor of the shape of the weight."""
    view = layout.view(out)
    view.copy_(matrix.view(view.shape))


def compute_dtype(t: Tensor) -> torch.dtype:
    """Dtype of the arithmetic and of the state: float64 for float64 parameters, else float32."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def local_parts(tensors: Sequence[Tensor], row_dim: int, needs_whole: bool) -> list[Tensor]:
    """Apply :func:`local_part` to many tensors, at no cost where there is no DTensor."""
    if all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors):
        return list(tensors)
    return [local_part(t, row_dim, needs_whole) for t in tensors]


def local_part(t: Tensor, row_dim: int, needs_whole: bool) -> Tensor:
    """Return the tensor of this process behind a DTensor (FSDP2, tensor parallel), or ``t`` itself.

    ``needs_whole`` says that the step looks at several rows together, as the orthogonality term and heads do.

    Raises:
        RuntimeError: If weight vectors are split between processes, or rows are and the step needs them together.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return t
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(t, DTensor):
        return t
    for placement in t.placements:
        if placement.is_replicate():
            continue
        if not isinstance(placement, Shard) or placement.dim != 0 or row_dim != 0:
            raise RuntimeError(
                f"a weight placed as {placement} splits single weight vectors between processes; the manifold "
                "optimizers need whole rows: shard on axis 0 (the default of fully_shard) or set manifold=False"
            )
        if needs_whole:
            raise RuntimeError(
                "the orthogonality term and vectors of several output units look at rows of a weight together, but "
                "this one is sharded between processes: set ortho=0 and row_units=1 for its group"
            )
    return t.to_local()
