"""Shared by all tests: one seed per test, two threads at most, and a private cache for compiled kernels."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: kernels for GPUs then run on the CPU, slowly

settings.register_profile("flexnorm", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("flexnorm")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER"):
        # Several workers share the cores; threads of their own would only wait for each other.
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all but ``n`` cases of a test with ``@pytest.mark.quick(n)`` as slow, those kept spread over all of them."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("quick") is not None:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for family in cases.values():
        (n,) = family[0].get_closest_marker("quick").args
        kept = {k * len(family) // n for k in range(n)}
        for k, item in enumerate(family):
            if k not in kept:
                item.add_marker(pytest.mark.slow)
