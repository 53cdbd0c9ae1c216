"""Sinks are readable while the run is live, resume without doubled rows, and survive a torn last line."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from flexnorm.shift import CSVSink, JSONLSink, MemorySink, ShiftRecord, Sink, TensorBoardSink
from flexnorm.shift.records import as_sink


def record(step: int, w1: float = 0.1, layer: str = "a", **metrics: float) -> ShiftRecord:
    return ShiftRecord(step, layer, "previous", step - 1, 0.05, w1, 0.2, 1 / 3, 0.15, 0.3, 0.6, metrics)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_files_hold_every_record_at_once_and_exactly(ending: str, tmp_path: Path) -> None:
    path = tmp_path / "deep" / f"shift.{ending}"
    sink = as_sink(str(path))
    made = [record(1), record(1, layer='odd "name", with comma'), record(2, 1 / 7, kurtosis=3.5)][
        : 3 if ending == "jsonl" else 2
    ]
    for k, one in enumerate(made):
        sink.write(one)
        with path.open() as file:
            rows: list[Any] = list(csv.DictReader(file)) if ending == "csv" else [json.loads(line) for line in file]
        assert len(rows) == k + 1
        expected = one.asdict()
        assert list(rows[-1]) == list(expected)
        assert all(type(expected[key])(rows[-1][key]) == expected[key] for key in expected)
    sink.close()
    sink.close()
    sink.write(made[0])
    sink.close()
    assert len(path.read_text().splitlines()) == len(made) + 1 + (ending == "csv")


@pytest.mark.parametrize("kind", [CSVSink, JSONLSink])
def test_rewind_drops_later_and_torn_rows(kind: type[CSVSink] | type[JSONLSink], tmp_path: Path) -> None:
    path = tmp_path / "s.txt"
    sink = kind(path)
    sink.rewind(3)
    assert not path.exists()
    for step in (1, 2, 3, 4):
        sink.write(record(step))
    sink.close()
    whole = path.read_text()
    path.write_text(whole + whole.splitlines()[-1][:9])
    sink.rewind(3)
    assert path.read_text() == "".join(whole.splitlines(keepends=True)[:-1])
    sink.write(record(4))
    assert path.read_text() == whole
    sink.close()
    path.write_text("")
    sink.rewind(3)
    assert path.read_text() == ""


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path: Path) -> None:
    with_nan = record(1, math.nan, noise=math.inf)
    JSONLSink(tmp_path / "s.jsonl").write(with_nan)
    row = json.loads((tmp_path / "s.jsonl").read_text())
    assert row["w1"] is None
    assert row["noise"] is None
    assert row["upper"] == 0.2


def test_memory_and_functions() -> None:
    seen: list[ShiftRecord] = []
    memory, function = MemorySink(), as_sink(seen.append)
    for sink in (memory, function):
        assert isinstance(sink, Sink)
        sink.write(record(1))
        sink.write(record(2))
        sink.rewind(1)
        sink.close()
    assert memory.records == [record(1)]
    assert seen == [record(1), record(2)]
    assert as_sink(memory) is memory


def test_tensorboard_writes_scalars(tmp_path: Path) -> None:
    calls: list[tuple[str, float, int]] = []

    class Writer:
        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append((name, value, step))

        def flush(self) -> None:
            pass

    sink = TensorBoardSink(Writer(), names=("w1", "kurtosis"))
    sink.write(record(4, kurtosis=2.0))
    sink.rewind(0)
    sink.close()
    assert calls == [("shift/a/w1", 0.1, 4), ("shift/a/kurtosis", 2.0, 4)]


def test_tensorboard_makes_event_files(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sink = TensorBoardSink(tmp_path)
    sink.write(record(4, w1=0.25))
    sink.close()
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("shift/a/w1")] == [(4, 0.25)]


def test_tensorboard_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r"TensorBoardSink needs tensorboard: pip install 'flexnorm\[tensorboard\]'"):
        TensorBoardSink(tmp_path)


def test_records_survive_a_dictionary() -> None:
    one = record(3, kurtosis=2.0)
    assert ShiftRecord.from_dict(one.asdict()) == one


@pytest.mark.parametrize(("error", "target"), [(ValueError, "a.txt"), (TypeError, 3)])
def test_errors(error: type[Exception], target: object) -> None:
    with pytest.raises(error, match="must"):
        as_sink(target)
