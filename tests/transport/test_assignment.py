"""The assignment in NumPy, for where scipy is not installed, against scipy's."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from flexnorm.transport import wasserstein
from flexnorm.transport.distances import augmenting_paths


@given(n=st.integers(0, 30), seed=st.integers(0, 10**6), ties=st.booleans())
def test_the_cheapest_assignment(n, seed, ties):
    generator = np.random.default_rng(seed)
    cost = generator.integers(0, 4, (n, n)).astype(float) if ties else generator.exponential(size=(n, n))
    columns = augmenting_paths(cost)
    assert sorted(columns) == list(range(n))
    rows, best = linear_sum_assignment(cost)
    assert cost[np.arange(n), columns].sum() == pytest.approx(cost[rows, best].sum(), rel=1e-12, abs=1e-12)


def test_exact_distances_are_the_same_without_scipy(monkeypatch):
    x, y = torch.randn(2, 64, 5, dtype=torch.float64)
    with_scipy = wasserstein(x, y, method="exact")
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    torch.testing.assert_close(wasserstein(x, y, method="exact"), with_scipy, rtol=1e-14, atol=0)


def test_what_needs_the_solver_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ot", None)
    assert wasserstein(torch.zeros(1, 2), torch.ones(3, 2), method="exact") == pytest.approx(2**0.5), "one coupling"
    with pytest.raises(ImportError, match=r"pip install 'flexnorm\[lab\]'"):
        wasserstein(torch.zeros(2, 2), torch.ones(3, 2), method="exact")
