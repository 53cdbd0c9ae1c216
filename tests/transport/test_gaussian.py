"""The closed form for Gaussians against matrix square roots, special cases and samples."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.linalg
import torch
from torch import Tensor

from flexnorm.shift import gaussian_wasserstein, wasserstein


def covariance(*shape: int) -> Tensor:
    a = torch.randn(*shape, dtype=torch.float64)
    return a @ a.mT


def test_equals_the_formula_with_matrix_square_roots() -> None:
    m, k = torch.randn(2, 4, dtype=torch.float64)
    a, b = covariance(4, 4), covariance(4, 4)
    root = torch.as_tensor(scipy.linalg.sqrtm(a.numpy()).real)
    cross = torch.as_tensor(scipy.linalg.sqrtm((root @ b @ root).numpy()).real)
    expected = ((m - k).square().sum() + (a + b - 2 * cross).trace()).sqrt()
    torch.testing.assert_close(gaussian_wasserstein(m, a, k, b), expected, rtol=1e-9, atol=1e-9)


def test_variances_are_a_diagonal_covariance() -> None:
    m, k = torch.randn(2, 3, 5, dtype=torch.float64)
    a, b = torch.rand(2, 3, 5, dtype=torch.float64)
    full = gaussian_wasserstein(m, torch.diag_embed(a), k, torch.diag_embed(b))
    torch.testing.assert_close(gaussian_wasserstein(m, a, k, b), full)
    assert full.shape == (3,)


def test_singular_covariances_and_gradients() -> None:
    m = torch.zeros(3, dtype=torch.float64)
    a = covariance(3, 1)
    assert gaussian_wasserstein(m, a, m, a) < 1e-6
    b = torch.eye(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: gaussian_wasserstein(m + 1, c @ c.mT, m, 2 * torch.eye(3).double()), (b,))
    variances = torch.ones(3, dtype=torch.float64, requires_grad=True)
    gaussian_wasserstein(m, variances, m, torch.ones(3, dtype=torch.float64)).backward()
    assert torch.equal(variances.grad, torch.zeros(3, dtype=torch.float64))


def test_large_samples_come_close() -> None:
    x, y = torch.randn(400, 1, dtype=torch.float64), 3 * torch.randn(400, 1, dtype=torch.float64) + 2
    one = torch.ones(1, dtype=torch.float64)
    assert float(wasserstein(x, y, "exact", 2)) == pytest.approx(
        float(gaussian_wasserstein(0 * one, one, 2 * one, 9 * one)), rel=0.1
    )


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("one length", (torch.zeros(2), torch.eye(2), torch.zeros(3), torch.eye(3))),
        ("covariances must both", (torch.zeros(2), torch.eye(3), torch.zeros(2), torch.eye(2))),
        ("negative", (torch.zeros(2), -torch.ones(2), torch.zeros(2), torch.ones(2))),
        ("not symmetric", (torch.zeros(2), torch.tensor([[0.0, 1.0], [5.0, 0.0]]), torch.zeros(2), torch.eye(2))),
        ("positive semi-definite", (torch.zeros(2), -torch.eye(2), torch.zeros(2), torch.eye(2))),
    ],
)
def test_errors(message: str, arguments: tuple) -> None:
    with pytest.raises(ValueError, match=message):
        gaussian_wasserstein(*arguments)


def test_close_gaussians_in_float32_are_as_exact_as_in_float64() -> None:
    """The traces cancel where the two are close; the root would magnify a rounding of 1e-7 to 3e-4."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator)
    cov, mean = root @ root.mT + torch.eye(6), torch.zeros(6)
    assert float(gaussian_wasserstein(mean, cov, mean, cov)) < 1e-6
    near = cov * 1.001
    wide = gaussian_wasserstein(mean.double(), cov.double(), mean.double(), near.double())
    narrow = gaussian_wasserstein(mean, cov, mean, near)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("error", "message", "values"),
    [
        (TypeError, "mean_x must be a tensor, got float", (0.0, torch.eye(2), torch.zeros(2), torch.eye(2))),
        (TypeError, "cov_y must be floating point", (torch.zeros(2), torch.eye(2), torch.zeros(2), torch.eye(2).int())),
        (ValueError, "cov_x holds NaN", (torch.zeros(2), torch.eye(2) / 0, torch.zeros(2), torch.eye(2))),
        (
            ValueError,
            "not symmetric",
            (torch.zeros(2), torch.tensor([[2.0, 1.0], [0.0, 2.0]]), torch.zeros(2), torch.eye(2)),
        ),
    ],
)
def test_what_is_no_gaussian_is_named(error: type[Exception], message: str, values: tuple[Any, ...]) -> None:
    with pytest.raises(error, match=message):
        gaussian_wasserstein(*values)
