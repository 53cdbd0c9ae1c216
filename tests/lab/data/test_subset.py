import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexnorm.lab.data.images import shares, stratified


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.data())
def test_every_class_keeps_its_share_to_within_one(sizes, data):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    count = data.draw(st.integers(1, len(labels)))
    chosen = stratified(labels, count, seed=data.draw(st.integers(0, 3)))
    assert len(chosen) == count
    assert (np.diff(chosen) > 0).all()  # ascending and without repeats
    kept = np.bincount(labels[chosen], minlength=len(sizes))
    exact = np.array(sizes) * count / len(labels)
    assert (np.abs(kept - exact) < 1).all()
    assert (kept <= sizes).all()


def test_shares_break_ties_by_class_number():
    assert shares(np.array([2, 2, 2]), 4).tolist() == [2, 1, 1]


def test_same_seed_same_subset_other_seed_other_subset():
    labels = np.arange(1000) % 10
    assert (stratified(labels, 100, 1) == stratified(labels, 100, 1)).all()
    assert (stratified(labels, 100, 1) != stratified(labels, 100, 2)).any()


@pytest.mark.parametrize("count", [0, -1, 11])
def test_impossible_counts_are_refused(count):
    with pytest.raises(ValueError, match="between 1 and 10"):
        stratified(np.zeros(10, dtype=int), count)
