"""Draws of the noise of independent batch statistics: their moments, and the inflation that they must not have."""

import pytest
import torch

from flexnorm.theory import regularization as reg

D = torch.float64


@pytest.mark.parametrize("distribution", ["chi", "gaussian"])
def test_noise_moments(distribution):
    torch.manual_seed(0)
    v_m, v_q, size = torch.tensor([1.0, 0.2], dtype=D), torch.tensor([2.0, 5.0], dtype=D), 64
    r, s = reg.sample_noise(v_m, v_q, size, distribution=distribution, rows=200_000)
    assert r.shape == s.shape == (200_000, 2)
    torch.testing.assert_close(r.mean(0), torch.ones(2, dtype=D), atol=2e-3, rtol=0)
    torch.testing.assert_close(s.mean(0), torch.zeros(2, dtype=D), atol=2e-3, rtol=0)
    torch.testing.assert_close(s.var(0), v_m / size, rtol=0.12, atol=0)
    torch.testing.assert_close(r.var(0), v_q / (4 * size), rtol=0.25, atol=0)


def test_compensation_removes_the_inflation():
    torch.manual_seed(0)
    one, two = torch.ones(1, dtype=D), 2 * torch.ones(1, dtype=D)
    size = 32
    r, _ = reg.sample_noise(one, two, size, compensate=False, rows=400_000)
    error = float(r.std() / 400_000**0.5)
    assert abs(float(r.mean()) - 1 - reg.inverse_std_bias(size)) < 4 * error
    assert reg.inverse_std_bias(size) == pytest.approx(3 / (4 * size), rel=0.1)
    assert float(r.square().mean()) - 1 == pytest.approx(2 / (size - 2), rel=0.05)  # six times 1/(2M), as documented
    r, _ = reg.sample_noise(one, two, size, rows=400_000)
    assert abs(float(r.mean()) - 1) < 4 * error
    assert float(r.square().mean()) - 1 == pytest.approx(1 / (2 * size), rel=0.1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: reg.sample_noise(torch.ones(1), torch.ones(1), 8, distribution="xi"), ValueError, "chi"),
        (lambda: reg.inverse_std_bias(4, kurtosis=10.0), ValueError, "batch_size 4 is too small"),
    ],
)
def test_errors_name_the_value(call, error, message):
    with pytest.raises(error, match=message):
        call()
