"""When the Triton kernels are chosen: on GPUs, where Triton is there and a kernel runs, unless switched off."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Iterator

import pytest
import torch

from flexnorm.kernels import gpu, status
from flexnorm.kernels.layout import layout_of, token_layout_of

CPU = torch.device("cpu")
LAST = torch.channels_last


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """A process that has not asked for Triton yet, and will ask again."""
    caches = (gpu.load, gpu._works)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_the_cpu_never_asks_for_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "load", lambda: pytest.fail("asked for"))
    assert not gpu.available(torch.zeros(4, 4, 4096))
    assert layout_of(torch.zeros(4, 4, 4096)).backend != "triton"


def test_switched_off_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXNORM_KERNELS", "0")
    assert gpu.load() is None
    assert not gpu._works(CPU)


@pytest.mark.parametrize("version", [None, "3.6.0", "unknown"])
def test_without_triton_or_with_an_old_one_torch_does_it(
    version: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = None if version is None else types.SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "triton", found)
    with caplog.at_level(logging.INFO, "flexnorm"):
        assert gpu.load() is None
    assert "no Triton kernels" in caplog.text
    assert not gpu._works(CPU)


@pytest.mark.parametrize(("capability", "works"), [((7, 5), False), ((8, 0), True)])
def test_devices_without_bfloat16_are_not_served(
    capability: tuple[int, int], works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "load", object)
    monkeypatch.setattr(gpu, "launch", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert gpu._works(CPU) == works


def test_a_kernel_that_does_not_run_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(gpu, "load", object)
    monkeypatch.setattr(gpu, "launch", broken)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    for _ in range(2):
        assert not gpu._works(CPU)
    assert len(caplog.records) == 1
    assert "Failed to find C compiler" in caplog.text


@pytest.mark.parametrize(("works", "said"), [(True, "; Triton kernels on Some GPU"), (False, "; torch's operations")])
def test_status_names_the_devices(works: bool, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "GPU" not in status() or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(gpu, "_works", lambda _: works)
    assert said in status()


def test_layouts_of_a_device_that_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small: a GPU waits for launches, not for values."""
    monkeypatch.setattr(gpu, "available", lambda x: x.dtype in gpu.DTYPES)
    x = torch.zeros(2, 3, 4, 5)
    assert layout_of(x) == ("triton", "rows", (2, 3, 20))
    assert layout_of(x.to(memory_format=LAST)) == ("triton", "cols", (2, 3, 20))
    assert layout_of(x.transpose(2, 3)).backend == layout_of(x[:0]).backend == layout_of(x.int()).backend == "composed"
    assert layout_of(torch.zeros(2, 3)).backend == "composed"
    assert token_layout_of(x, 1) == ("triton", "rows", (2, 3, 20))
    assert token_layout_of(x, -1) == ("triton", "cols", (2, 5, 12))
    assert token_layout_of(torch.zeros(2, 3), 1) == ("triton", "cols", (2, 3, 1))
    assert token_layout_of(x[:0], 1) is token_layout_of(x.int(), 1) is None
