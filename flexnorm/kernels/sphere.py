"""The C kernel of the optimizers: one step for the rows of many weights in one call, compiled once per machine."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from flexnorm.kernels.build import library

__all__ = ["CWalk", "Numbers", "load"]

_SOURCE = Path(__file__).with_name("sphere.c")


class Numbers(ctypes.Structure):
    """The numbers of one step that all rows share: ``Walk`` of ``sphere.c``."""

    _fields_ = [(name, ctypes.c_double) for name in ("clip", "push", "scale", "keep", "beta1", "beta2", "eps", "sign")]


def addresses(values: Sequence[int] | None) -> ctypes.Array[ctypes.c_int64] | None:
    """Return a table of addresses or other integers for C; a null pointer for None."""
    return None if values is None else (ctypes.c_int64 * len(values))(*values)


class CWalk:
    """The compiled step, for float32 and float64."""

    dtypes = frozenset({torch.float32, torch.float64})

    def __init__(self, library: ctypes.CDLL, path: Path) -> None:
        self.path = path
        self._walks = {torch.float32: library.walk_f32, torch.float64: library.walk_f64}
        for function in self._walks.values():
            function.argtypes = [ctypes.c_int64] * 2 + [ctypes.c_void_p] * 9 + [ctypes.POINTER(Numbers), ctypes.c_int]
            function.restype = None

    def __call__(
        self, dtype: torch.dtype, counts: tuple[int, int], tables: Sequence[object], numbers: Numbers, threads: int
    ) -> None:
        """Move all rows.

        Args:
            dtype: Type of all numbers but the counters of steps.
            counts: Weights, and tasks.
            tables: Tasks (weight, first row, end); addresses of points, gradients, moments, second moments and counters
                of steps; lengths of the rows; addresses for angles and norms. Null where there is none.
            numbers: The numbers of the step.
            threads: Threads to use; the result does not depend on it.
        """
        self._walks[dtype](*counts, *tables, ctypes.byref(numbers), threads)


@functools.cache
def load() -> CWalk | None:
    """Return the compiled step, building it if this machine has not yet; ``None`` where that is impossible."""
    found = library(_SOURCE, "optimizer")
    return None if found is None else CWalk(*found)
