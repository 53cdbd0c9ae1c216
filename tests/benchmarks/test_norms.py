"""What the speed measurements rest on: the clock, the counting of bytes, and tables whose every line can run."""

import json
import time
from itertools import chain
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def norms(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import norms

    return norms


@pytest.fixture
def timing(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import timing

    return timing


def test_a_short_call_is_made_several_times_and_its_mean_counts(timing):
    calls = []

    def call():
        calls.append(None)
        time.sleep(1e-3)

    times = timing.interleave({"a": call, "b": lambda: time.sleep(4e-3)}, rounds=5, warmup=2, least=5e-3)
    assert len(times["a"]) == 5
    assert 2 + 5 * 3 <= len(calls) <= 2 + 5 * 5
    assert 1e-3 <= min(times["a"]) < 4e-3 <= min(times["b"])
    assert 1 < timing.ratios(times, "a")["b"] <= 4


def test_bytes_at_the_peak_and_kept_are_those_of_the_tensors(timing):
    before = torch.ones(5000)

    def call():
        large = torch.ones(3000) + torch.ones(3000)  # three at once
        return large[:10].clone(), before + 1

    assert timing.allocations(call) == (3 * 3000 * 4, 10 * 4 + 5000 * 4)


def test_parts_of_a_file_are_replaced_one_by_one(timing, tmp_path):
    path = tmp_path / "rows.json"
    for part, ratio in (("a", 1.0), ("b", 2.0), ("a", 3.0)):
        timing.save_part(path, "norms", part, [{"ratio": ratio}], seconds=1)
    parts = json.loads(path.read_text())["parts"]
    assert {name: part["rows"][0]["ratio"] for name, part in parts.items()} == {"a": 3.0, "b": 2.0}
    assert parts["a"]["torch"] == torch.__version__


def test_every_name_of_the_tables_is_a_layer_and_every_peer_is_timed(norms):
    for _, cases in chain.from_iterable(parts.values() for parts in norms.PARTS.values()):
        assert len(set(cases)) == len(cases)
        for case in cases:
            assert case.layer.removeprefix("compiled ") in norms.LAYERS, case
            assert case.peer.removeprefix("compiled ") in {*norms.LAYERS, "plain"}, case
            assert case.peer != "plain" or case.layer in norms.PLAIN, case


@pytest.mark.parametrize("wrong", ["output", "input", "weight"])
def test_a_layer_that_is_not_its_plain_composition_is_not_timed(norms, wrong):
    case = norms.Case((8, 3, 4, 4), "batch", "nn.BatchNorm")
    found = norms.contenders([case], "cpu")
    assert set(found) == {"batch", "plain batch", "nn.BatchNorm"}
    values = found["batch"]()
    values[wrong] = values[wrong] * 1.001
    with pytest.raises(AssertionError, match=wrong):
        norms.agree("batch", values, found["plain batch"]())
    with pytest.raises(AssertionError, match="output differs"):
        norms.agree("batch", {"output": torch.tensor([torch.nan])}, {"output": torch.ones(1)})


def test_a_case_becomes_a_row_with_its_goal(norms):
    case = norms.Case((8, 3), "batch", "plain", 0.6)
    row = norms.compared(case, {"batch": [1.0, 2.0, 9.0], "plain batch": [2.0, 4.0, 4.0]})
    assert (row["ratio"], row["target"], row["met"]) == (0.5, 0.6, True)
    assert (row["ms"], row["peer ms"], row["layout"]) == (2000.0, 4000.0, "features")
    assert not norms.judged(0.61, 0.6)["met"]
