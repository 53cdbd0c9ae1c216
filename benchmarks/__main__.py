"""All speed measurements, one after the other: ``python -m benchmarks``. Each writes its table and prints it."""

from __future__ import annotations

import subprocess
import sys

for name in ("norms", "shift", "optimizers", "normprop"):
    print(f"== {name}", flush=True)
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
