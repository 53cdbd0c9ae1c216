"""Which backend serves an activation, and how it lies in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexnorm.kernels import layout, normalization
from flexnorm.kernels.layout import layout_of, memory_order, over_positions, positions_of, table_dtype

LAST = torch.channels_last
ORDERS = [
    (torch.zeros(3, 4), "rows"),
    (torch.zeros(4, 3).T, "none"),
    (torch.zeros(3, 4, 5), "rows"),
    (torch.zeros(3, 5, 4).transpose(1, 2), "cols"),
    (torch.zeros(3, 4, 5, 6).to(memory_format=LAST), "cols"),
    (torch.zeros(3, 4, 5, 6).transpose(2, 3), "none"),
    (torch.zeros(3, 4, 5, 6)[:, ::2], "none"),
    (torch.zeros(3, 4, 5, 6)[1:], "rows"),
    (torch.zeros(3, 1, 5, 6).expand(3, 4, 5, 6), "none"),
    (torch.zeros(3, 1, 5, 6).to(memory_format=LAST), "rows"),  # both at once: rows
    (torch.zeros(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d), "cols"),
]


@pytest.mark.parametrize(("x", "order"), ORDERS)
def test_memory_order(x: Tensor, order: str) -> None:
    assert memory_order(x) == order


BIG = torch.zeros(16, 8, 16, 16)
BACKENDS = {
    "large": (BIG, "c", "torch"),
    "channels last": (BIG.to(memory_format=LAST), "c", "composed"),
    "float64": (BIG.double(), "c", "torch"),
    "bfloat16": (BIG.bfloat16(), "c", "composed"),
    "integers": (BIG.int(), "composed", "composed"),
    "just large enough": (torch.zeros(4, 4, 1024), "c", "torch"),
    "small": (torch.zeros(4, 4, 1023), "torch", "torch"),
    "small, bfloat16": (torch.zeros(4, 4, 9, dtype=torch.bfloat16), "composed", "composed"),
    "small, channels last": (torch.zeros(4, 4, 9, 9).to(memory_format=LAST), "composed", "composed"),
    "one position": (torch.zeros(512, 64), "composed", "composed"),
    "one position, 4-D": (torch.zeros(512, 64, 1, 1), "composed", "composed"),
    "strided": (BIG.transpose(2, 3)[:, :, 1:], "composed", "composed"),
    "empty": (torch.zeros(0, 8, 16, 16), "composed", "composed"),
    "no memory": (torch.zeros(16, 8, 16, 16, device="meta"), "composed", "composed"),
}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("compiler", [True, False])
def test_backend(name: str, compiler: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {("affine_rows", dtype): None for dtype in normalization.DTYPES}
    monkeypatch.setattr(normalization, "load", lambda: kernels if compiler else None)
    x, with_compiler, without = BACKENDS[name]
    found = layout_of(x)
    assert found.backend == (with_compiler if compiler else without)
    assert found.size == (x.shape[0], x.shape[1], positions_of(x))
    assert found.order == memory_order(x)


def test_small_tensors_do_not_ask_for_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalization, "load", lambda: pytest.fail("asked for"))
    for name in ("small", "empty", "integers", "one position", "strided"):
        layout_of(BACKENDS[name][0])
    monkeypatch.setattr(layout, "_SMALL", 1)
    with pytest.raises(pytest.fail.Exception):
        layout_of(BACKENDS["small"][0])


def test_tables_of_an_activation() -> None:
    x = torch.zeros(2, 3, 4, 5)
    assert over_positions(torch.zeros(2, 3), x).shape == (2, 3, 1, 1)
    assert over_positions(torch.zeros(1, 3), x[:, :, 0, 0]).shape == (1, 3)
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    assert [table_dtype(dtype) for dtype in kinds] == [torch.float64] + 3 * [torch.float32]


def test_a_processor_without_16_bit_floats_leaves_them_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = {("affine_rows", torch.float32): None}
    monkeypatch.setattr(normalization, "load", lambda: wide)
    x = torch.zeros(8, 8, 16, 16)
    assert layout_of(x).backend == "c"
    assert layout_of(x.half()).backend == "composed"
    assert layout.token_layout_of(x.half(), 1) is None
