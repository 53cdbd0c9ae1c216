"""Shared by all tests: one seed per test, two threads at most, and a private cache for compiled kernels."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("flexnorm", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("flexnorm")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER"):
        # Several workers share the cores; threads of their own would only wait for each other.
        torch.set_num_threads(1)
