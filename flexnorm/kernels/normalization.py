"""The C kernels of normalization: compiled on the first large activation, and never required."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from flexnorm.kernels.build import library

__all__ = ["CKernels", "load", "status"]

_SOURCE = Path(__file__).with_name("normalization.c")
_NAMES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}


def _at(table: Tensor | None) -> tuple[int, int, int]:
    """Address and strides of a 2-D table; a null pointer where there is none."""
    return (0, 0, 0) if table is None else (table.data_ptr(), table.stride(0), table.stride(1))


def _pointer(table: Tensor | None) -> int:
    return 0 if table is None else table.data_ptr()


class CKernels:
    """The compiled passes. Activations are (N, C, P) contiguous ("rows") or (N, P, C) contiguous ("cols") in memory."""

    def __init__(self, library: ctypes.CDLL, path: Path) -> None:
        self.path = path
        pointer, integer, real, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
        table = [pointer, integer, integer]
        size = [integer, integer, integer, threads]
        passes = {
            "moments": [pointer] * 3 + size,
            "affine": [pointer, *table, *table, pointer, *size],
            "sums": [pointer] * 5 + size,
            "combine": [pointer, pointer, *table, *table, real, *table, real, pointer, pointer, *size],
        }
        tables = {
            "pool": [pointer] * 4 + [integer] * 2,
            "unpool": [pointer] * 5 + [integer] * 2,
            "poolc": [pointer] * 4 + [integer] * 2,
            "unpoolc": [pointer] * 5 + [integer] * 2,
            "guard": [pointer] * 4 + [real, real, pointer, pointer, integer],
            "follow": [pointer] * 4 + [real, threads, integer],
            "fold": [pointer] * 4 + [integer] * 2,
            "track": [pointer] * 4 + [real, real, integer],
            "unitize": [pointer] * 7 + [real, real] + [pointer] * 3 + [integer] * 2,
            "deunitize": [pointer] * 9 + [real, real] + [pointer] * 7 + [integer] * 2,
        }
        self._passes = {}
        self._tables = {}
        for dtype, name in _NAMES.items():
            for pass_, signature in passes.items():
                for layout in ("rows", "cols"):
                    if (function := getattr(library, f"{pass_}_{layout}_{name}", None)) is not None:
                        function.argtypes, function.restype = signature, None
                        self._passes[pass_, layout, dtype] = function
            for operation, signature in tables.items():
                if (function := getattr(library, f"{operation}_{name}", None)) is not None:
                    function.argtypes = signature
                    function.restype = integer if operation in ("guard", "track", "follow") else None
                    self._tables[operation, dtype] = function
        self.dtypes = frozenset(dtype for _, _, dtype in self._passes)

    def moments(self, x: Tensor, layout: str, size: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return mean and biased variance over the positions, each (N, C) in ``dtype``."""
        mean, var = (torch.empty(size[:2], dtype=dtype, device=x.device) for _ in range(2))
        self._passes["moments", layout, x.dtype](
            x.data_ptr(), mean.data_ptr(), var.data_ptr(), *size, torch.get_num_threads()
        )
        return mean, var

    def affine(self, x: Tensor, scale: Tensor, shift: Tensor | None, layout: str, size: tuple[int, int, int]) -> Tensor:
        """Return ``scale * x + shift`` in the memory format of ``x``; tables (N, C), possibly expanded views."""
        y = torch.empty_like(x)
        self._passes["affine", layout, x.dtype](
            x.data_ptr(), *_at(scale), *_at(shift), y.data_ptr(), *size, torch.get_num_threads()
        )
        return y

    def sums(
        self, g: Tensor, x: Tensor, center: Tensor | None, layout: str, size: tuple[int, int, int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return ``sum g * x`` (taken about ``center``) and ``sum g`` over the positions, each (N, C) in ``dtype``."""
        s1, s0 = (torch.empty(size[:2], dtype=dtype, device=x.device) for _ in range(2))
        self._passes["sums", layout, x.dtype](
            g.data_ptr(),
            x.data_ptr(),
            _pointer(center),
            s1.data_ptr(),
            s0.data_ptr(),
            *size,
            torch.get_num_threads(),
        )
        return s1, s0

    def combine(
        self,
        g: Tensor,
        x: Tensor,
        scale: Tensor,
        a: Tensor | None,
        a_factor: float,
        b: Tensor | None,
        b_factor: float,
        center: Tensor,
        layout: str,
        size: tuple[int, int, int],
    ) -> Tensor:
        """Return ``scale * g + a_factor * a + b_factor * b * (x - center)``; all but ``center`` may be expanded."""
        dx = torch.empty_like(x)
        self._passes["combine", layout, x.dtype](
            g.data_ptr(),
            x.data_ptr(),
            *_at(scale),
            *_at(a),
            a_factor,
            *_at(b),
            b_factor,
            center.data_ptr(),
            dx.data_ptr(),
            *size,
            torch.get_num_threads(),
        )
        return dx

    def pool(self, mean: Tensor, var: Tensor, channels: bool = False) -> tuple[Tensor, Tensor]:
        """Return the moments over the samples (1, C) or channels (N, 1) of dense tables (N, C), by Chan's formula."""
        m, v = (mean.new_empty((len(mean), 1) if channels else (1, mean.shape[1])) for _ in range(2))
        self._tables["poolc" if channels else "pool", mean.dtype](
            mean.data_ptr(), var.data_ptr(), m.data_ptr(), v.data_ptr(), *mean.shape
        )
        return m, v

    def unpool(self, dm: Tensor | None, dv: Tensor | None, mean: Tensor, m: Tensor, channels: bool = False) -> Tensor:
        """Return the gradient of the means (N, C) for those of the pooled moments; that of the variances is dv / N."""
        dmean = torch.empty_like(mean)
        self._tables["unpoolc" if channels else "unpool", mean.dtype](
            _pointer(dm), _pointer(dv), mean.data_ptr(), m.data_ptr(), dmean.data_ptr(), *mean.shape
        )
        return dmean

    def fold(self, s1: Tensor, s0: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums over the samples of two dense tables (N, C), each (1, C)."""
        samples, channels = s1.shape
        f1, f0 = (s1.new_empty((1, channels)) for _ in range(2))
        self._tables["fold", s1.dtype](s1.data_ptr(), s0.data_ptr(), f1.data_ptr(), f0.data_ptr(), samples, channels)
        return f1, f0

    def track(self, m: Tensor, v: Tensor, mean: Tensor, var: Tensor, rate: float, correction: float) -> bool:
        """Move running statistics (C,) in place towards pooled moments, unless one is not finite; return whether."""
        usable = self._tables["track", mean.dtype](
            m.data_ptr(), v.data_ptr(), mean.data_ptr(), var.data_ptr(), rate, correction, mean.numel()
        )
        torch.autograd.graph.increment_version([mean, var])
        return bool(usable)

    def follow(self, m: Tensor, v: Tensor, mean: Tensor, var: Tensor, rate: float, first: bool) -> bool:
        """Move weighted moments (C,) in place: those of the ``first`` batch replace, later ones enter with ``rate``.

        Returns whether the batch was finite; otherwise nothing moves.
        """
        usable = self._tables["follow", mean.dtype](
            m.data_ptr(), v.data_ptr(), mean.data_ptr(), var.data_ptr(), rate, int(first), mean.numel()
        )
        torch.autograd.graph.increment_version([mean, var])
        return bool(usable)

    def guard(
        self, m: Tensor, v: Tensor, mean: Tensor, var: Tensor, eps: float, ratio: float
    ) -> tuple[Tensor, Tensor, float]:
        """Return the statistics (C,) within ``ratio`` of those of the batch, and the share of channels that moved."""
        guarded_mean, guarded_var = torch.empty_like(mean), torch.empty_like(var)
        inputs = [t.data_ptr() for t in (m, v, mean, var)]
        acted = self._tables["guard", mean.dtype](
            *inputs, eps, ratio, guarded_mean.data_ptr(), guarded_var.data_ptr(), mean.numel()
        )
        return guarded_mean, guarded_var, acted / max(mean.numel(), 1)

    def unitize(
        self,
        mean: Tensor,
        var: Tensor,
        m: Tensor,
        v: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        alpha: Tensor,
        eps: float,
        divisor: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return scale (N, C), shift (N, C) and the inverse norms (N,) of unitized batch normalization."""
        scale, shift = torch.empty_like(mean), torch.empty_like(mean)
        q = mean.new_empty(mean.shape[0])
        vectors = [_pointer(t) for t in (mean, var, m, v, weight, bias, alpha)]
        outputs = [t.data_ptr() for t in (scale, shift, q)]
        self._tables["unitize", mean.dtype](*vectors, eps, divisor, *outputs, *mean.shape)
        return scale, shift, q

    def deunitize(
        self,
        ds: Tensor,
        dh: Tensor,
        mean: Tensor,
        var: Tensor,
        m: Tensor,
        v: Tensor,
        weight: Tensor | None,
        alpha: Tensor,
        q: Tensor,
        eps: float,
        divisor: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of mean (N, C), var (N, C), and of m, v, weight, bias, alpha as float64 (5, C)."""
        dmean, dvar = torch.empty_like(mean), torch.empty_like(mean)
        rows = torch.empty((5, mean.shape[1]), dtype=torch.float64)
        inputs = [_pointer(t) for t in (ds, dh, mean, var, m, v, weight, alpha, q)]
        outputs = [dmean.data_ptr(), dvar.data_ptr(), *(rows.data_ptr() + k * rows.stride(0) * 8 for k in range(5))]
        self._tables["deunitize", mean.dtype](*inputs, eps, divisor, *outputs, *mean.shape)
        return dmean, dvar, rows


@functools.cache
def load() -> CKernels | None:
    """Return the compiled kernels, building them if this machine has not yet; ``None`` where that is impossible."""
    found = library(_SOURCE, "normalization")
    return None if found is None else CKernels(*found)


def status() -> str:
    """Return one line on which kernels are in use on this machine (builds them if need be)."""
    kernels = load()
    return "torch's own kernels" if kernels is None else f"compiled kernels at {kernels.path}"
