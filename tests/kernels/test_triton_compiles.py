"""The Triton kernels compile for GPUs that this machine need not have: the interpreter forgives what they do not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton runs on Linux only, and comes with the extra flexnorm[triton]")
SCRIPT = Path(__file__).parents[1] / "helpers" / "triton_compiler.py"


@pytest.mark.slow
@pytest.mark.parametrize("target", [("cuda", "80", "32"), ("hip", "gfx942", "64")], ids=lambda t: t[1])
def test_every_kernel_compiles(target: tuple[str, ...], tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, str(SCRIPT), *target], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in lines] == ["affine", "combine", "merge", "moments", "sums", "token_sums"]
    assert all(int(shared) <= 48 * 1024 for *_, shared in lines)
