"""The Triton kernels: loaded with the first activation on a GPU, and never required.

Triton comes with torch for CUDA and ROCm and compiles each kernel in a second or two when it is first used; its own
cache keeps them. Without it, or with ``FLEXNORM_KERNELS=0``, GPUs run the plain composition.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("flexnorm")

DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
"""Types of activations that the passes take."""

_OLDEST = (3, 7)  # tuples with None inside among the arguments of a kernel: earlier compilers stumble
_CAPABILITY = (8, 0)  # bfloat16; older NVIDIA devices are not served


@functools.cache
def load() -> Any | None:
    """Return the module of the kernels, or ``None`` where Triton is missing, too old or switched off."""
    if os.environ.get("FLEXNORM_KERNELS", "1") == "0":
        return None
    try:
        version = importlib.import_module("triton").__version__
        if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
            raise ImportError(f"Triton {version} is older than {'.'.join(map(str, _OLDEST))}")
        return importlib.import_module("flexnorm.kernels.triton_kernels")
    except (ImportError, ValueError) as error:
        logger.info("flexnorm: no Triton kernels (%s); GPUs run torch's operations (slower, same results)", error)
        return None


def available(x: Tensor) -> bool:
    """Whether the Triton kernels serve the device and the type of ``x``."""
    return x.device.type == "cuda" and x.dtype in DTYPES and _works(x.device)


@functools.cache
def _works(device: torch.device) -> bool:
    """Whether a kernel compiles and runs on a device: Triton needs a C compiler for its launcher, for one."""
    kernels = load()
    if kernels is None:
        return False
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < _CAPABILITY:
        return False
    one = torch.ones(1, device=device)
    scale = ((None, None, one, 0, 1),)
    try:
        launch("affine", (1,), one, one.clone(), scale, None, 1, 1, 1, 1, ROWS=True, ALIGN=1, BC=1, BP=1)
    except Exception as error:  # noqa: BLE001 - whatever Triton, its compilers or the driver raise, torch can do it
        logger.warning("flexnorm: the Triton kernels do not run on %s (%s); using torch's operations", device, error)
        return False
    return True


def launch(name: str, grid: tuple[int, ...], first: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the device of its first argument; tables and sums are of the type of ``ACC``.

    ``constants`` are its compile-time constants; ``ACC`` is float64 for ``first`` of float64, else float32.
    """
    kernels = load()
    assert kernels is not None
    constants["ACC"] = kernels.tl.float64 if first.dtype == torch.float64 else kernels.tl.float32
    with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
        getattr(kernels, name)[grid](first, *arguments, **constants)


def status() -> str:
    """Return one line on the kernels that GPUs of this machine use; empty without any."""
    if not torch.cuda.is_available():
        return ""
    served = [k for k in range(torch.cuda.device_count()) if _works(torch.device("cuda", k))]
    names = sorted({torch.cuda.get_device_name(k) for k in served})
    return f"Triton kernels on {', '.join(names)}" if names else "torch's operations on GPUs"
