"""The C kernel of the optimizers: one step for the rows of many weights in one call, compiled once per machine."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from flexnorm.kernels.build import library, threads

_SOURCE = Path(__file__).with_name("sphere.c")

Kernel = Callable[..., None]
Tensors = Sequence[Tensor]


class Numbers(ctypes.Structure):
    """The numbers of one step that all rows share: ``Rotation`` of ``sphere.c``."""

    _fields_ = [(name, ctypes.c_double) for name in ("clip", "push", "scale", "keep", "beta1", "beta2", "eps", "sign")]


@functools.cache
def load() -> dict[torch.dtype, Kernel] | None:
    """Return the kernel by type of number, building it if this machine has not yet; ``None`` where that cannot be."""
    found = library(_SOURCE, "optimizer")
    if found is None:
        return None
    kernels = {torch.float32: found[0].rotate_f32, torch.float64: found[0].rotate_f64}
    for kernel in kernels.values():
        kernel.argtypes = [ctypes.c_int64] * 2 + [ctypes.c_void_p] * 9 + [ctypes.POINTER(Numbers), ctypes.c_int]
        kernel.restype = None
    return kernels  # type: ignore[return-value]


class Rows:
    """Weights of one dtype whose rows lie one after the other in memory, with their state, as C is told of them.

    Args:
        points: The weights; the rows of each are all of its memory.
        moments: First moments in the memory order of the weights; empty where there are none.
        seconds: Second moments, ``(rows,)`` each, or empty likewise.
        steps: Counters of steps taken, float32 scalars that are raised by one with every call, or empty likewise.
        rows: Number of rows of each weight.
    """

    def __init__(
        self, points: Tensors, moments: Tensors, seconds: Tensors, steps: Tensors, rows: Sequence[int]
    ) -> None:
        self._points, self._rows = points, rows
        self._numbers = sum(p.numel() for p in points)
        chunk = min(max(self._numbers // (4 * torch.get_num_threads()), 1 << 12), 1 << 16)
        lengths = [p.numel() // count for p, count in zip(points, rows, strict=True)]
        tasks: list[int] = []
        for i, (count, n) in enumerate(zip(rows, lengths, strict=True)):
            height = max(1, chunk // n)
            for start in range(0, count, height):
                tasks += (i, start, min(start + height, count))
        self._counts = (len(points), len(tasks) // 3)
        # In the order of the kernel's arguments, with room for the gradients, the angles and the norms of a step.
        state = [_addresses(kind) for kind in (moments, seconds, steps)]
        self._tables = [_table(tasks), _addresses(points), None, *state, _table(lengths), None, None]

    def rotate(self, gradients: Tensors, numbers: Numbers, watched: bool) -> tuple[list[Tensor], list[Tensor]] | None:
        """Move all rows against gradients of the dtype and memory order of the weights, whatever the number of threads.

        Returns the angles and the tangent norms of each weight, ``(rows,)`` each, if ``watched``.
        """
        kernels = load()
        assert kernels is not None
        tables, seen = list(self._tables), None
        tables[2] = _addresses(gradients)
        if watched:
            angles, norms = ([p.new_empty(n) for p, n in zip(self._points, self._rows, strict=True)] for _ in range(2))
            seen, tables[7:] = (angles, norms), [_addresses(angles), _addresses(norms)]
        kernels[self._points[0].dtype](*self._counts, *tables, ctypes.byref(numbers), threads(self._numbers))
        torch.autograd.graph.increment_version(self._points)
        return seen


def _table(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def _addresses(tensors: Tensors) -> ctypes.Array[ctypes.c_int64] | None:
    """Return a table of addresses for C, a null pointer where there are no tensors."""
    return _table([t.data_ptr() for t in tensors]) if tensors else None
