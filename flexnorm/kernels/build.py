"""Compile a C file of the package: once per machine, when it is first needed, and never required.

The library is built by the C compiler of the machine (``cc``, ``gcc`` or ``clang``; environment variable ``CC`` first)
in a second or two and kept in a cache folder (``$FLEXNORM_CACHE``, else ``$XDG_CACHE_HOME/flexnorm``, else
``~/.cache/flexnorm``), under a name that contains a hash of the source, the compiler and the processor. Without a
compiler, or with ``FLEXNORM_KERNELS=0``, there is no library and the callers run on torch's own kernels.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger("flexnorm")

_ARGUMENTS: dict[str, list[Any]] = {
    "p": [ctypes.c_void_p],
    "s": [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64],
    "n": [ctypes.c_int64],
    "d": [ctypes.c_double],
    "i": [ctypes.c_int],
}
_FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")


def library(source: Path, purpose: str) -> tuple[ctypes.CDLL, Path] | None:
    """Load the library made of a C file, building it if this machine has not yet.

    Args:
        source: The file; its name becomes part of that of the library.
        purpose: What it is for, as in "the *normalization* kernels", for the lines that are logged.

    Returns:
        The library and where it lies, or ``None`` where that is impossible.
    """
    if os.environ.get("FLEXNORM_KERNELS", "1") == "0":
        return None
    compiler = _compiler()
    if compiler is None:
        logger.info("flexnorm: no C compiler found; %s runs on torch's own kernels (slower, same results)", purpose)
        return None
    try:
        sources = [file.read_bytes() for file in (source, *sorted(source.parent.glob("*.h")))]
        key = hashlib.sha256(
            b"\0".join([*sources, " ".join(_FLAGS).encode(), compiler.encode(), _processor().encode()])
        )
        target = _cache_folder() / f"{source.stem}-{key.hexdigest()[:16]}.so"
        if not target.exists():
            logger.warning("flexnorm: compiling the %s kernels once for this machine into %s", purpose, target)
            _build(compiler, source, target)
        return ctypes.CDLL(str(target)), target
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        logger.warning("flexnorm: the %s kernels could not be compiled (%s); using torch's own", purpose, error)
        return None


def declare(function: Any, arguments: str, returns: Any = None) -> Any:
    """Tell ctypes what a C function takes: p pointer, s a table with its two strides, n a size, d double, i int."""
    function.argtypes = [kind for letter in arguments for kind in _ARGUMENTS[letter]]
    function.restype = returns
    return function


def threads(values: int) -> int:
    """How many threads a kernel takes for so many values: one where that is done before it has woken another."""
    return torch.get_num_threads() if values > 1 << 15 else 1


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FLEXNORM_CACHE") or Path(base) / "flexnorm")


def _processor() -> str:
    """What ``-march=native`` depends on: a cache folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _compiler() -> str | None:
    candidates = (os.environ.get("CC"), "cc", "gcc", "clang")
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def _build(compiler: str, source: Path, target: Path) -> None:
    """Compile into ``target`` atomically: two processes that start at once must not load half a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        command = [compiler, *_FLAGS, "-march=native", "-fopenmp", str(source), "-o", name, "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode != 0:
            raise OSError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
        Path(name).replace(target)
    finally:
        Path(name).unlink(missing_ok=True)
