"""Pool: the moments of a union from those of its parts, however it is cut."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexnorm.statistics import Pool, pool_processes

X = torch.randn(24, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 7


def pooled(parts):
    pool = Pool(3)
    for part in parts:
        pool.add_values(part)
    return pool


def assert_same(pool, x):
    torch.testing.assert_close(pool.mean, x.mean((0, 2)))
    torch.testing.assert_close(pool.var, x.var((0, 2), correction=0))
    torch.testing.assert_close(pool.unbiased, x.var((0, 2)))
    assert pool.count == x.numel() // 3
    assert pool.finite.all()


@given(st.lists(st.integers(0, 8), min_size=1, max_size=6), st.integers(0, 6))
def test_parts_and_pools_of_parts_are_the_whole(sizes, cut):
    sizes = [*sizes, 24 - sum(sizes)] if sum(sizes) < 24 else [24]
    parts = X.split(sizes)
    assert_same(pooled(parts), X)
    merged = pooled(parts[:cut])
    merged.merge(pooled(parts[cut:]))
    assert_same(merged, X)
    assert merged.batches == sum(size > 0 for size in sizes)


def test_samples_average_their_variances():
    pool = Pool(3, between=False)
    for part in X.split([1, 20, 3]):
        mean, var = pool.add_values(part)
    torch.testing.assert_close(mean, X[21:].mean((0, 2)))
    torch.testing.assert_close(var, X[21:].var(2).mean(0))
    torch.testing.assert_close(pool.var, X.var(2).mean(0))
    assert torch.equal(pool.unbiased, pool.var)
    assert pool.count == 24


def test_half_precision_and_huge_means_keep_their_variance():
    x = (torch.randn(1000, 3, generator=torch.Generator().manual_seed(1)) + 50).to(torch.bfloat16)
    pool = pooled(x.split(100))
    torch.testing.assert_close(pool.var, x.double().var(0, correction=0), rtol=1e-4, atol=0)
    pool = pooled((X + 1e7).split(3))
    torch.testing.assert_close(pool.var, X.var((0, 2), correction=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_channel_that_is_not_finite_is_known(value):
    x = X.clone()
    x[3, 1, 2] = value
    assert pooled(x.split(5)).finite.tolist() == [True, False, True]


def test_one_process_alone_keeps_what_it_has(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        pools = [pooled(X.split(5)), Pool(2)]
        pool_processes(pools, torch.distributed.group.WORLD)
    finally:
        torch.distributed.barrier()  # gloo is done with all tensors: its end must not wait for one
        torch.distributed.destroy_process_group()
    assert_same(pools[0], X)
    assert pools[0].batches == 5
    assert (pools[1].count, pools[1].batches) == (0, 0)
