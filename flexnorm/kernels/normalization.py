"""The C kernels of normalization: compiled on the first large activation, and never required."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexnorm.kernels import gpu
from flexnorm.kernels.build import declare, library

_SOURCE = Path(__file__).with_name("normalization.c")
SUFFIXES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}
"""Ends of the names of kernels by type of activation."""
DTYPES = frozenset(SUFFIXES)
"""Types of activations that the passes take."""

# Their arguments in the letters of :func:`declare`.
_PASSES = {"moments": "pppnnni", "affine": "psspnnni", "sums": "pppppnnni", "combine": "ppssdsdppnnni"}
_TABLES = {
    **dict.fromkeys(("pool_samples", "pool_channels", "add_samples"), "ppppnn"),
    **dict.fromkeys(("unpool_samples", "unpool_channels"), "pppppnn"),
    "track": "ppppddn",
    "follow": "ppppdin",
    "guard": "ppppddppn",
    "standardize": "ppppdppn",
    "population": "pppppdiddpppppppn",
    "standardize_backward": "pppppppdpppn",
    "unitize": "pppppppddpppnn",
    "unitize_backward": "pppppppppddpppppppnn",
}
_COUNTING = ("track", "follow", "guard")


@functools.cache
def load() -> dict[tuple[str, torch.dtype], Any] | None:
    """Return the kernels by name and type of the values, building them if this machine has not yet.

    ``None`` where that is impossible. A processor without 16-bit floats has none for them: they are computed in float32
    by torch's operations there.
    """
    found = library(_SOURCE, "normalization")
    if found is None:
        return None
    signatures = {f"{name}_{order}": signature for name, signature in _PASSES.items() for order in ("rows", "cols")}
    kernels = {}
    for name, signature in {**signatures, **_TABLES}.items():
        for dtype, suffix in SUFFIXES.items():
            if (kernel := getattr(found[0], f"{name}_{suffix}", None)) is not None:
                kernels[name, dtype] = declare(kernel, signature, ctypes.c_int64 if name in _COUNTING else None)
    return kernels


def serves(dtype: torch.dtype) -> bool:
    """Whether there are kernels for activations of this type: in 16-bit floats not on every processor."""
    return dtype in DTYPES and (found := load()) is not None and ("affine_rows", dtype) in found


def call(name: str, dtype: torch.dtype, *arguments: Any) -> Any:
    """Run a kernel; tensors among the arguments go by their address, ``None`` as a null pointer."""
    kernels = load()
    assert kernels is not None
    return kernels[name, dtype](*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments])


def strided(table: Tensor | None) -> tuple[int | None, int, int]:
    """Address and strides of a 2-D table; a null pointer where there is none."""
    return (None, 0, 0) if table is None else (table.data_ptr(), table.stride(0), table.stride(1))


def status() -> str:
    """Return one line on which kernels are in use on this machine (builds them if need be)."""
    found = None if load() is None else library(_SOURCE, "normalization")
    on_cpu = "torch's own kernels" if found is None else f"compiled kernels at {found[1]}"
    return f"{on_cpu}; {on_gpus}" if (on_gpus := gpu.status()) else on_cpu
