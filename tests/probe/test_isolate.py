"""What the isolation decides: what is copied, what is shared, what does not wait for other processes."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict, deque

import numpy as np
import pytest
import torch
from torch import nn

import flexnorm.nn as fn
from flexnorm.probe import isolated, private_randomness, side_forward
from flexnorm.probe.forward import _copied, _stop_synchronizing


def test_what_a_forward_may_write_into_is_copied_and_shared_where_it_was() -> None:
    copies: dict[int, object] = {}
    tensor = torch.ones(2)
    taken = _copied(tensor, copies, 0)
    assert taken is not tensor
    assert _copied(tensor, copies, 0) is taken, "shared as the original is"
    for container in ([tensor], {"a": tensor}, {1}, deque([tensor]), OrderedDict(a=tensor)):
        other = _copied(container, copies, 0)
        assert other == container
        assert other is not container
        assert type(other) is type(container)
    generator = torch.Generator().manual_seed(3)
    assert _copied(generator, copies, 5).initial_seed() == 5
    for same in (nn.Parameter(tensor), "text", 3, None, nn.Linear(1, 1), (tensor,)):
        assert _copied(same, copies, 0) is same


class Writes(nn.Module):
    """Writes into everything it has but parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(2))
        self.norm = nn.BatchNorm1d(2)
        self.kept = torch.zeros(2)
        self.history: list[float] = []
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.kept += 1
        self.history.append(random.random() + float(np.random.rand()) + float(torch.rand(1)))  # noqa: NPY002
        self.calls += 1
        self.late = True
        self.norm.eval()
        return self.norm(x) * self.norm.weight


def test_a_forward_leaves_no_trace() -> None:
    model = Writes()
    versions = [buffer._version for buffer in model.buffers()]
    before, buffers = copy.deepcopy(model.__dict__), list(model.buffers())
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    seen = []
    for _ in range(2):
        with isolated(model, 7):
            assert not torch.is_grad_enabled()
            model(torch.randn(4, 2))
            assert model.calls == 1
            seen.append(model.history[0])
    assert seen[0] == seen[1], "the same noise each time"
    assert all(now is then for now, then in zip(model.buffers(), buffers, strict=True))
    assert versions == [buffer._version for buffer in buffers]
    assert model.history == before["history"] == []
    assert model.calls == 0
    assert not hasattr(model, "late")
    assert model.norm.training
    assert not model.kept.any()
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def test_errors_inside_restore_everything() -> None:
    model = Writes()
    with pytest.raises(ValueError, match="expected 2D or 3D"), isolated(model, 0):
        model(torch.randn(4))
    assert not model.count.any()
    with pytest.raises(RuntimeError, match="inside"), private_randomness(set(), 0):
        raise RuntimeError("inside")


def test_one_process_alone_does_not_wait_for_others() -> None:
    sync = nn.SyncBatchNorm(2)
    _stop_synchronizing(sync)
    assert sync(torch.randn(4, 2)).shape == (4, 2), "torch's own refuses a tensor on the CPU"
    ours = fn.BatchNorm1d(2, process_group="world")
    _stop_synchronizing(ours)
    assert ours.process_group is None


def test_calls_of_a_layer_are_numbered_and_modes_restored() -> None:
    shared = nn.Dropout(0.5)
    model = nn.Sequential(shared, nn.ReLU(), shared).eval()
    seen: list[tuple[str, bool]] = []
    for mode in ("train", "eval"):
        side_forward(
            model, torch.ones(3), {"0": shared}, lambda name, m, *_: seen.append((name, m.training)), mode=mode
        )
    assert seen == [("0", True), ("0#2", True), ("0", False), ("0#2", False)]
    assert not model.training
    assert not shared._forward_hooks
