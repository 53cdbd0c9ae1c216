"""Fixtures for the ways to take a step on the sphere."""

import pytest


@pytest.fixture
def torch_only(monkeypatch):
    """A machine without a C compiler: the batched path runs on torch's own kernels."""
    from flexnorm.kernels import sphere as _native

    monkeypatch.setattr(_native, "load", lambda: None)


@pytest.fixture(params=["native", "packed", "loop"])
def foreach(request):
    """The argument ``foreach`` for each of the three ways to take a step."""
    from flexnorm.kernels import sphere as _native

    if request.param == "packed":
        request.getfixturevalue("torch_only")
    elif request.param == "native" and _native.load() is None:
        pytest.skip("no C compiler on this machine")
    return False if request.param == "loop" else None


@pytest.fixture
def untraced(monkeypatch):
    """The path of ``compile=True`` with the function as it is, for compiling takes seconds per shape."""
    from flexnorm.optim import kernels

    monkeypatch.setattr(kernels, "_compiled", lambda: kernels._walk_fused)
