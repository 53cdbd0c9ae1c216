"""Fixtures: the ways to take a step on the sphere."""

import pytest

from flexnorm.kernels import sphere
from flexnorm.optim import step


@pytest.fixture
def torch_only(monkeypatch):
    """A machine without a C compiler: steps are taken with torch's own kernels."""
    monkeypatch.setattr(sphere, "load", lambda: None)


@pytest.fixture(params=["c", "torch", "one by one"])
def foreach(request):
    """The argument ``foreach`` for each of the three ways to take a step."""
    if request.param == "torch":
        request.getfixturevalue("torch_only")
    elif request.param == "c" and sphere.load() is None:
        pytest.skip("no C compiler on this machine")
    return False if request.param == "one by one" else None


@pytest.fixture
def untraced(monkeypatch):
    """The path of ``compile=True`` with the function as it is, for compiling takes seconds per shape."""
    monkeypatch.setattr(step, "compiled_rotation", lambda: step.rotate_)
