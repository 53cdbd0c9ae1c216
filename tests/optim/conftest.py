"""Makes the helper module of this folder importable whichever way pytest is started."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def untraced(monkeypatch):
    """The path of ``compile=True`` with the function as it is, for compiling takes seconds per shape."""
    from evenkeel.optim import kernels

    monkeypatch.setattr(kernels, "_compiled", lambda: kernels._walk_fused)
