"""The geometry against its defining properties, closed forms and float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexnorm.optim import manifold as mf

EPS32 = torch.finfo(torch.float32).eps


def points(rows, n, seed, dtype=torch.float64):
    return mf.unit(torch.randn(rows, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def vectors(rows, n, seed, scale=1.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed + 1000)
    return (scale * torch.randn(rows, n, generator=g, dtype=torch.float64)).to(dtype)


cases = given(n=st.integers(2, 40), seed=st.integers(0, 999), scale=st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 30.0]))
quick = settings(deadline=None, max_examples=40, derandomize=True)


@quick
@cases
def test_projection_is_tangent_idempotent_and_shortens(n, seed, scale):
    y, g = points(3, n, seed), vectors(3, n, seed, scale)
    h = mf.project(y, g)
    assert ((y * h).sum(1).abs() <= 1e-14 * (1 + scale * n)).all()
    torch.testing.assert_close(mf.project(y, h), h, rtol=0, atol=1e-13 * (1 + scale))
    assert (h.norm(dim=1) <= g.norm(dim=1) + 1e-12).all()


@quick
@cases
def test_exponential_map_walks_the_length_of_its_argument(n, seed, scale):
    y = points(3, n, seed)
    d = mf.project(y, vectors(3, n, seed, scale / n))
    z = mf.exp_map(y, d)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(3, dtype=torch.float64), rtol=1e-15, atol=0)
    length = d.norm(dim=1) % (2 * math.pi)  # the great circle is closed
    torch.testing.assert_close(mf.angle(y, z), torch.minimum(length, 2 * math.pi - length), rtol=0, atol=1e-12)


@quick
@cases
def test_transport_keeps_lengths_and_angles_and_stays_tangent(n, seed, scale):
    y = points(3, n, seed)
    d = mf.project(y, vectors(3, n, seed, scale / n))
    v, w = mf.project(y, vectors(3, n, seed + 1)), mf.project(y, vectors(3, n, seed + 2))
    z, pv, pw = mf.exp_map(y, d), mf.parallel_transport(y, d, v), mf.parallel_transport(y, d, w)
    tiny = 1e-12 * n
    assert ((z * pv).sum(1).abs() <= tiny).all()
    torch.testing.assert_close((pv * pw).sum(1), (v * w).sum(1), rtol=0, atol=tiny)
    torch.testing.assert_close(
        mf.parallel_transport(y, d, d), mf.transport_along(y, d), rtol=0, atol=tiny * (1 + scale)
    )


@quick
@cases
def test_walking_on_and_back_returns(n, seed, scale):
    y = points(3, n, seed)
    d = mf.project(y, vectors(3, n, seed, scale / n))
    z = mf.exp_map(y, d)
    torch.testing.assert_close(mf.exp_map(z, -mf.transport_along(y, d)), y, rtol=0, atol=1e-11)


def test_quarter_circle_by_hand():
    y, d = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, math.pi / 2]])
    torch.testing.assert_close(mf.exp_map(y, d), torch.tensor([[0.0, 1.0]]), rtol=0, atol=1e-7)
    torch.testing.assert_close(mf.transport_along(y, d), torch.tensor([[-math.pi / 2, 0.0]]), rtol=0, atol=1e-6)


def test_clip_shortens_only_what_is_too_long():
    h = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [3e30, 4e30]])
    out = mf.norm_clip(h, 1.0)
    torch.testing.assert_close(out, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0], [0.6, 0.8]]))
    assert mf.norm_clip(h, None) is h


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1.0, 1e30, 3e38])
def test_rows_of_any_size_have_a_norm_and_a_direction(scale):
    x = torch.tensor([[0.6, 0.0, -0.8]], dtype=torch.float64).mul(scale).float()
    norm = x.double().norm(dim=1, keepdim=True)
    assert norm > 0
    near = {"rtol": 4 * EPS32, "atol": 1.5e-45}  # subnormal numbers are 1.4e-45 apart
    torch.testing.assert_close(mf.row_norm(x).double(), norm, **near)
    torch.testing.assert_close(mf.unit(x).double(), x.double() / norm, **near)


def test_zero_and_empty_rows():
    assert (mf.unit(torch.zeros(2, 3)) == 0).all()
    assert (mf.row_norm(torch.zeros(2, 3)) == 0).all()
    y = points(2, 3, 0)
    torch.testing.assert_close(mf.exp_map(y, torch.zeros_like(y)), y)
    torch.testing.assert_close(mf.parallel_transport(y, torch.zeros_like(y), y), y)
    for f in (mf.unit, mf.row_norm):
        assert f(torch.zeros(0, 3)).shape[0] == 0
        assert f(torch.zeros(2, 0)).shape[0] == 2


def test_gradients_flow_through_a_zero_step():
    y = points(2, 3, 0).requires_grad_()
    d = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    mf.exp_map(y, d).sum().backward()
    assert d.grad.isfinite().all()


@pytest.mark.slow
def test_unit_norm_holds_over_ten_thousand_steps():
    y = points(8, 27, 0, torch.float32)
    generator = torch.Generator().manual_seed(1)
    for _ in range(10_000):
        y = mf.exp_map(y, mf.project(y, 0.1 * torch.randn(8, 27, generator=generator)))
    assert ((y.double().norm(dim=1) - 1).abs() <= 4 * EPS32).all()


@pytest.mark.parametrize("angle", [1e-9, 1e-4, 1.0, math.pi - 1e-4, math.pi])
def test_angle_is_accurate_where_the_arc_cosine_is_not(angle):
    y = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    z = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    torch.testing.assert_close(float(mf.angle(5 * y, 0.1 * z)), angle, rtol=1e-7, atol=0)


SIZES = [(3, 7, 1), (7, 3, 1), (4, 4, 1), (6, 5, 3), (6, 2, 2), (4, 3, 4), (300, 310, 1), (310, 300, 1), (600, 310, 2)]


@pytest.mark.parametrize(("rows", "n", "blocks"), SIZES)
def test_orthogonality_gradient_is_the_gradient_of_the_penalty(rows, n, blocks):
    y = points(rows, n, 3).requires_grad_()
    mf.orthogonality_penalty(y, 0.3, blocks).backward()
    torch.testing.assert_close(mf.orthogonality_gradient(y.detach(), 0.3, blocks), y.grad)


def test_orthogonality_gradient_of_directions_and_of_pruned_rows():
    y = points(5, 8, 3)
    lengths = torch.tensor([1e-5, 1.0, 0.0, 3.0, 1e5], dtype=torch.float64).unsqueeze(1)
    expected = mf.orthogonality_gradient(y[[0, 1, 3, 4]], 0.3)
    for many in (y * lengths, (y * lengths).T.contiguous().T):
        got = mf.orthogonality_gradient(many, 0.3)
        torch.testing.assert_close(got[[0, 1, 3, 4]], expected)
        assert (got[2] == 0).all()
    tall = mf.orthogonality_gradient((y * lengths)[:, :3], 0.3)
    assert tall.isfinite().all()
    assert (tall[2] == 0).all()


def test_products_in_bfloat16_where_torch_is_told_so():
    y = points(300, 310, 3, torch.float32)
    expected = mf.orthogonality_gradient(y.double(), 0.3)
    settings = torch.backends.mkldnn.matmul
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        got = mf.orthogonality_gradient(y, 0.3)
    finally:
        settings.fp32_precision = before
    assert float((got - expected).norm() / expected.norm()) < 0.02


def test_penalty_of_unit_rows_is_the_sum_of_squared_cosines():
    y = points(4, 6, 5)
    pairs = sum(float(y[i] @ y[j]) ** 2 for i in range(4) for j in range(i))
    assert float(mf.orthogonality_penalty(y, 0.7)) == pytest.approx(0.7 * pairs)
    assert float(mf.orthogonality_penalty(torch.eye(3, 5), 1.0)) == 0


def test_coherence_by_hand():
    y = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    mean, largest = mf.coherence(y)
    assert largest == pytest.approx(2**-0.5)
    assert mean == pytest.approx(2 / 3 * 2**-0.5)
    assert mf.coherence(y[:1]) == (0.0, 0.0)
    assert mf.coherence(torch.eye(4)[[0, 0, 1, 1]], blocks=2) == (1.0, 1.0)
    assert mf.coherence(torch.eye(4)[[0, 1, 0, 1]], blocks=2) == (0.0, 0.0)
