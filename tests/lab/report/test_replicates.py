"""Means, spreads and paired differences against scipy and numpy."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from flexnorm.lab.records import holds
from flexnorm.lab.replicates import Replicates
from flexnorm.lab.report.figures import rank_correlation
from flexnorm.lab.report.load import load

numbers = st.floats(-100, 100).map(lambda v: round(v, 3))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(numbers, min_size=2, max_size=25))
def test_sample(values):
    sample = Replicates.of([*values, math.nan])
    assert sample.mean == pytest.approx(np.mean(values), abs=1e-12)
    assert sample.std == pytest.approx(np.std(values, ddof=1), abs=1e-9)
    assert sample.median == pytest.approx(np.median(values))
    assert (sample.low, sample.high) == (min(values), max(values))
    if sample.std > 1e-6:
        margin = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
        assert sample.margin == pytest.approx(margin, rel=0.01)
        assert sample.separated == (abs(sample.mean) > sample.margin)


def test_samples_that_have_no_interval():
    for values in ((), (1.0,), (1.0, 1.0, 1.0), (math.inf, 1.0)):
        sample = Replicates(values)
        assert math.isnan(sample.margin)
        assert not sample.separated
    assert math.isnan(Replicates(()).mean)
    assert math.isnan(Replicates(()).median)
    assert Replicates((math.inf, 1.0)).mean == math.inf


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=20))
def test_rank_correlation(pairs):
    x, y = zip(*pairs, strict=True)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(rank_correlation(x, y))
    else:
        assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert math.isnan(rank_correlation(x[:2], y[:2]))


def test_cells_against_numpy(study):
    runs = study.make()
    results = {(r["norm"], r["optim"], r["seed"]): r for r in runs}
    rows = load(study.out).cells
    assert len(rows) == 6
    for row in rows:
        mine = [results[row.norm, row.optim, seed] for seed in range(3)]
        base = [results["batch", row.optim, seed] for seed in range(3)]
        accuracy = np.array([r["result"]["test_accuracy"] for r in mine])
        assert row.test_accuracy.mean == pytest.approx(accuracy.mean())
        assert row.shift_w1.mean == pytest.approx(np.mean([r["result"]["shift_w1"] for r in mine]))
        ratios = [r["timing"]["step_ms"] / b["timing"]["step_ms"] for r, b in zip(mine, base, strict=True)]
        assert row.step_ratio.median == pytest.approx(np.median(ratios))
        assert row.interval_holds is True
        if row.norm == "batch":
            assert not row.difference
        else:
            apart = accuracy - [b["result"]["test_accuracy"] for b in base]
            assert row.difference.mean == pytest.approx(apart.mean())
            assert row.difference.std == pytest.approx(apart.std(ddof=1))


def test_only_complete_runs_count_and_pairs_need_both(study):
    study.make(("none", "batch"), ("sgd",), 3, results=False)
    study.run("none", "sgd", 0, status="diverged", reason="NaN", test_accuracy=0.1)
    study.run("batch", "sgd", 1, status="diverged", reason="NaN")
    base, other = load(study.out).cells
    assert (base.norm, other.norm) == ("batch", "none")
    assert other.test_accuracy.n == 2
    assert other.difference.n == 1  # seed 2 alone is complete in both
    assert other.step_ratio.n == 1
    assert len(other.complete) == 2


def test_a_violated_interval_is_seen(study):
    study.make(("batch",), ("sgd",), 1)
    path = study.out / "runs/batch/sgd/seed0/shift.csv"
    head, first, *rest = path.read_text().splitlines()
    cells_of = first.split(",")
    cells_of[4] = "99"
    path.write_text("\n".join([head, ",".join(cells_of), *rest]))
    assert load(study.out).cells[0].interval_holds is False
    assert holds(1.0, 1.0 - 1e-9, 1.0)
    assert not holds(1.0, math.inf, 2.0)
    assert not holds(1.0, 0.9, 2.0)
