"""Makes the helper module of this folder importable whichever way pytest is started."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def torch_only(monkeypatch):
    """A machine without a C compiler: the batched path runs on torch's own kernels."""
    from evenkeel.optim import _native

    monkeypatch.setattr(_native, "load", lambda: None)


@pytest.fixture(params=["native", "packed", "loop"])
def foreach(request):
    """The argument ``foreach`` for each of the three ways to take a step."""
    from evenkeel.optim import _native

    if request.param == "packed":
        request.getfixturevalue("torch_only")
    elif request.param == "native" and _native.load() is None:
        pytest.skip("no C compiler on this machine")
    return False if request.param == "loop" else None


@pytest.fixture
def untraced(monkeypatch):
    """The path of ``compile=True`` with the function as it is, for compiling takes seconds per shape."""
    from evenkeel.optim import kernels

    monkeypatch.setattr(kernels, "_compiled", lambda: kernels._walk_fused)
