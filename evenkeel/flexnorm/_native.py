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


class CKernels:
    """The compiled passes. Tensors are (N, C, P) contiguous ("rows") or (N, P, C) contiguous ("cols") in memory."""

    def __init__(self, library: ctypes.CDLL, path: Path) -> None:
        self.path = path
        pointer, integer, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        size = [integer, integer, integer, threads]
        signatures = {
            "moments": [pointer] * 3 + size,
            "affine": [pointer, pointer, integer, integer, pointer, integer, integer, pointer, *size],
            "sums": [pointer] * 5 + size,
            "combine": [pointer, pointer, pointer, integer, integer, pointer, pointer, pointer, pointer, *size],
        }
        self._functions = {}
        for dtype, name in _NAMES.items():
            for layout in ("rows", "cols"):
                for pass_, signature in signatures.items():
                    function = getattr(library, f"{pass_}_{layout}_{name}", None)
                    if function is not None:
                        function.argtypes, function.restype = signature, None
                        self._functions[pass_, layout, dtype] = function
        self.dtypes = frozenset(dtype for _, _, dtype in self._functions)

    def moments(self, x: Tensor, layout: str, size: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return mean and biased variance over the positions, each (N, C) in ``dtype``."""
        mean, var = (torch.empty(size[:2], dtype=dtype, device=x.device) for _ in range(2))
        self._functions["moments", layout, x.dtype](
            x.data_ptr(), mean.data_ptr(), var.data_ptr(), *size, torch.get_num_threads()
        )
        return mean, var

    def affine(self, x: Tensor, scale: Tensor, shift: Tensor | None, layout: str, size: tuple[int, int, int]) -> Tensor:
        """Return ``scale * x + shift`` in the memory format of ``x``; tables (N, C), possibly expanded views."""
        y = torch.empty_like(x)
        at_shift = (0, 0, 0) if shift is None else (shift.data_ptr(), *shift.stride())
        self._functions["affine", layout, x.dtype](
            x.data_ptr(), scale.data_ptr(), *scale.stride(), *at_shift, y.data_ptr(), *size, torch.get_num_threads()
        )
        return y

    def sums(
        self, g: Tensor, x: Tensor, center: Tensor | None, layout: str, size: tuple[int, int, int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return ``sum g * (x - center)`` and ``sum g`` over the positions, each (N, C) in ``dtype``."""
        s1, s0 = (torch.empty(size[:2], dtype=dtype, device=x.device) for _ in range(2))
        at_center = 0 if center is None else center.data_ptr()
        self._functions["sums", layout, x.dtype](
            g.data_ptr(), x.data_ptr(), at_center, s1.data_ptr(), s0.data_ptr(), *size, torch.get_num_threads()
        )
        return s1, s0

    def combine(
        self,
        g: Tensor,
        x: Tensor,
        scale: Tensor,
        a: Tensor,
        b: Tensor,
        center: Tensor,
        layout: str,
        size: tuple[int, int, int],
    ) -> Tensor:
        """Return ``scale * g + a + b * (x - center)``; ``a``, ``b`` and ``center`` dense (N, C)."""
        dx = torch.empty_like(x)
        at_scale = (scale.data_ptr(), *scale.stride())
        at_tables = (a.data_ptr(), b.data_ptr(), center.data_ptr())
        self._functions["combine", layout, x.dtype](
            g.data_ptr(), x.data_ptr(), *at_scale, *at_tables, dx.data_ptr(), *size, torch.get_num_threads()
        )
        return dx


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
        command = [compiler, *_FLAGS, "-march=native", "-fopenmp", str(_SOURCE), "-o", name]
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
            logger.info("evenkeel: compiling the normalization kernels once for this machine into %s", target)
            _build(compiler, target)
        return CKernels(ctypes.CDLL(str(target)), target)
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        logger.warning("evenkeel: the kernels could not be compiled (%s); using torch's own", error)
        return None


def status() -> str:
    """Return one line on which kernels are in use on this machine (builds them if need be)."""
    kernels = load()
    return "torch's own kernels" if kernels is None else f"compiled kernels at {kernels.path}"
