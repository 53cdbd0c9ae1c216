"""The compiled kernels: built once, cached, announced in a line, never needed, never loaded for small inputs."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flexnorm.engine import flex_norm
from flexnorm.kernels import build as _compile
from flexnorm.kernels import normalization, passes, status
from flexnorm.kernels.layout import Layout, layout_of
from flexnorm.nn import rules


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine that has compiled nothing yet."""
    monkeypatch.setenv("FLEXNORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FLEXNORM_KERNELS", raising=False)
    normalization.load.cache_clear()
    yield tmp_path / "cache"
    normalization.load.cache_clear()


@pytest.mark.slow
def test_compiles_once_and_loads_from_the_cache_afterwards(
    fresh: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if _compile._compiler() is None:
        pytest.skip("no C compiler on this machine")
    with caplog.at_level(logging.INFO, "flexnorm"):
        assert normalization.load() is not None
    assert len(caplog.records) == 1
    assert "compiling the normalization kernels once" in caplog.text
    assert str(fresh) in status()
    (library,) = fresh.iterdir()
    normalization.load.cache_clear()
    caplog.clear()
    monkeypatch.setattr(_compile, "_build", lambda *_: pytest.fail("compiled a second time"))
    with caplog.at_level(logging.INFO, "flexnorm"):
        loaded = normalization.load()
    assert loaded is not None
    assert str(library) in status()
    assert not caplog.records


def test_small_inputs_never_load_the_kernels(fresh: Path) -> None:
    flex_norm(torch.randn(8, 4, 8, 8, requires_grad=True), rules.batch).sum().backward()
    flex_norm(torch.randn(64, 512), rules.batch)
    assert normalization.load.cache_info().misses == 0
    assert not fresh.exists()


def _works() -> None:
    x = torch.randn(8, 16, 16, 16, requires_grad=True)
    y = flex_norm(x, rules.batch)
    torch.testing.assert_close(y, torch.nn.functional.batch_norm(x, None, None, training=True), rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    assert layout_of(x).backend == "torch"


def test_switched_off_by_the_environment(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXNORM_KERNELS", "0")
    assert normalization.load() is None
    assert status() == "torch's own kernels"
    _works()


def test_works_without_a_compiler(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    with caplog.at_level(logging.INFO, "flexnorm"):
        assert normalization.load() is None
    assert "no C compiler found" in caplog.text
    _works()


def test_works_when_the_compiler_fails(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho 'no such architecture' >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("CC", str(broken))
    with caplog.at_level(logging.INFO, "flexnorm"):
        assert normalization.load() is None
    assert "no such architecture" in caplog.text
    assert list(fresh.iterdir()) == []
    _works()


def test_works_when_the_cache_cannot_be_written(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("FLEXNORM_CACHE", str(file / "below"))
    with caplog.at_level(logging.INFO, "flexnorm"):
        assert normalization.load() is None
    assert "could not be compiled" in caplog.text
    _works()


def test_cache_folder_follows_the_conventions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FLEXNORM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _compile._cache_folder() == tmp_path / "flexnorm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _compile._cache_folder() == tmp_path / ".cache" / "flexnorm"


@pytest.mark.slow
def test_two_processes_that_start_at_once_both_work(fresh: Path) -> None:
    code = (
        "import torch; from flexnorm import flex_norm; from flexnorm.nn import rules; "
        "from flexnorm.kernels import status; "
        "flex_norm(torch.randn(8, 16, 32, 32), rules.batch); print(status())"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    for process in started:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert _compile._compiler() is None or "compiled kernels" in out
    assert len(list(fresh.glob("*.so"))) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_memory_of_a_training_step_is_that_of_batch_norm(dtype: torch.dtype) -> None:
    """What the backward keeps alive, each storage once."""

    def kept(norm: torch.nn.Module) -> int:
        x = torch.randn(16, 32, 16, 16, dtype=dtype, requires_grad=True)
        sizes: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            norm(x)
        return sum(sizes.values())

    from flexnorm import nn as fx

    own = kept(torch.nn.BatchNorm2d(32, dtype=dtype))
    for layer in (fx.BatchNorm2d(32, dtype=dtype), fx.PopulationNorm2d(32, dtype=dtype)):
        assert kept(layer) <= 1.02 * own
    # Unitization has one scale per sample and channel, 1/256 of this activation, in four float32 tables and their like.
    assert kept(fx.UnitizedBatchNorm2d(32, dtype=dtype)) <= 1.08 * own


@pytest.mark.parametrize("last", [False, True])
def test_tables_of_the_batch_reach_every_sample(last: bool) -> None:
    x = torch.randn(8, 16, 16, 16).to(memory_format=torch.channels_last if last else torch.contiguous_format)
    mean, table = torch.randn(8, 16), torch.randn(3, 1, 16)
    found = passes.combine(x, x, *table, mean, layout_of(x))
    torch.testing.assert_close(
        found, passes.combine(x, x, *table.expand(3, 8, 16), mean, Layout("composed", "rows", (8, 16, 256)))
    )
