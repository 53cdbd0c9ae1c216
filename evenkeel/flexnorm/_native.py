"""Compile and load the C kernels: once per machine, on the first large activation, and never required.

The library is built from ``kernels.c`` by the C compiler of the machine (``cc``, ``gcc`` or ``clang``; environment
variable ``CC`` first) in about two seconds and kept in a cache folder (``$EVENKEEL_CACHE``, else
``$XDG_CACHE_HOME/evenkeel``, else ``~/.cache/evenkeel``), under a name that contains a hash of the source, the
compiler and the processor. Without a compiler, or with ``EVENKEEL_NATIVE=0``, the passes run on torch's own kernels.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["CKernels", "load", "status"]

logger = logging.getLogger("evenkeel")

_SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
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


def _cache_folder() -> Path:
    if named := os.environ.get("EVENKEEL_CACHE"):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "evenkeel"


def _processor() -> str:
    """What ``-march=native`` depends on: a cache folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _compiler() -> str | None:
    for candidate in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if candidate and (found := shutil.which(candidate)):
            return found
    return None


def _build(compiler: str, target: Path) -> None:
    """Compile into ``target`` atomically: two processes that start at once must not load half a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        command = [compiler, *_FLAGS, "-march=native", "-fopenmp", str(_SOURCE), "-o", name, "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode != 0:
            raise OSError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
        Path(name).replace(target)
    finally:
        Path(name).unlink(missing_ok=True)


@functools.cache
def load() -> CKernels | None:
    """Return the compiled kernels, building them if this machine has not yet; ``None`` where that is impossible."""
    if os.environ.get("EVENKEEL_NATIVE", "1") == "0":
        return None
    compiler = _compiler()
    if compiler is None:
        logger.info("evenkeel: no C compiler found; normalization runs on torch's own kernels (slower, same results)")
        return None
    try:
        key = hashlib.sha256(
            b"\0".join([_SOURCE.read_bytes(), " ".join(_FLAGS).encode(), compiler.encode(), _processor().encode()])
        )
        target = _cache_folder() / f"kernels-{key.hexdigest()[:16]}.so"
        if not target.exists():
            logger.warning("evenkeel: compiling the normalization kernels once for this machine into %s", target)
            _build(compiler, target)
        return CKernels(ctypes.CDLL(str(target)), target)
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        logger.warning("evenkeel: the kernels could not be compiled (%s); using torch's own", error)
        return None


def status() -> str:
    """Return one line on which kernels are in use on this machine (builds them if need be)."""
    kernels = load()
    return "torch's own kernels" if kernels is None else f"compiled kernels at {kernels.path}"
