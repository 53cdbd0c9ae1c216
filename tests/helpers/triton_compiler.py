"""Compile the Triton kernels for a processor that this machine need not have: every pass, as its launcher asks for it.

``python triton_compiler.py cuda 80 32`` prints a line for each kernel: its name, how many variants there are, and the
bytes of shared memory.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from flexnorm.kernels import gpu, passes, tokens, triton_passes
from flexnorm.kernels.layout import Layout, table_dtype


def compile_instead_of_launching(target: GPUTarget) -> dict[str, dict[str, int]]:
    """Let each launch compile for ``target`` only; returns, by kernel and variant, the bytes of shared memory."""
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_current_stream=lambda _=0: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
    )
    triton.runtime.driver.set_active(driver)
    found: dict[str, dict[str, int]] = {}

    def launch(name: str, grid: tuple[int, ...], first: Any, *arguments: Any, **constants: Any) -> None:
        kernels = gpu.load()
        constants["ACC"] = kernels.tl.float64 if first.dtype == torch.float64 else kernels.tl.float32
        made = getattr(kernels, name).warmup(first, *arguments, grid=grid, **constants)
        found.setdefault(name, {})[made.hash] = made.metadata.shared

    triton_passes.launch = launch
    return found


def images(x: torch.Tensor, layout: Layout) -> None:
    """The passes over samples whose positions share their moments."""
    mean, _ = passes.moments(x, layout)
    passes.affine(x, mean, mean[:1], layout)
    passes.sums(x, x, mean, layout, (mean.shape, mean.shape))
    passes.combine(x, x, mean, mean[:1], mean, mean, layout)


def by_token(x: torch.Tensor, layout: Layout, groups: int) -> None:
    """The passes over tokens, with terms of every kind."""
    n, channels, p = layout.size
    rows, kind = n * p, table_dtype(x.dtype)
    row, column, weights = (torch.ones(size, dtype=kind) for size in ((rows, groups), channels, rows))
    terms = ((row, column), (row[:, :1], None))
    tokens.row_moments(x, layout, groups)
    tokens.column_moments(x, layout, weights)
    tokens.affine(x, terms, ((None, column),), layout)
    for center in (row, column.view(1, -1)):
        tokens.sums(x, x, center, terms, ((row, column), (None, column)), layout)
    of_rows = tokens.Source(row, row, row, channels // groups)
    of_batch = tokens.Source(column.view(1, -1), column.view(1, -1), column.view(1, -1), weights.sum(), weights)
    tokens.combine(x, x, terms, of_rows, of_batch, layout)


if __name__ == "__main__":
    backend, arch, warp = sys.argv[1:]
    compiled = compile_instead_of_launching(GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp)))
    for dtype, order, groups in ((torch.bfloat16, "rows", 1), (torch.float32, "cols", 8)):
        layout = Layout("triton", order, (2, 96, 1600))
        images(torch.ones(2, 96, 1600, dtype=dtype), layout)
        by_token(torch.ones(2, 96, 1600, dtype=dtype), layout, groups)
    by_token(torch.ones(1, 1), Layout("triton", "cols", (1, 1, 1)), 1)  # sizes of 1 become constants
    for name, variants in sorted(compiled.items()):
        sys.stdout.write(f"{name} {len(variants)} {max(variants.values())}\n")
