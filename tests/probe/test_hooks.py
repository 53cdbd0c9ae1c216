"""Hooks on many modules: what they see, what they may replace, and that they are gone at the end, come what may."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flexnorm.probe import hooked, watched


def test_functions_see_and_may_replace_inputs_and_outputs() -> None:
    first, second = nn.Identity(), nn.Identity()
    model, x, seen = nn.Sequential(first, second), torch.ones(2), []
    with hooked([first], before=lambda module, inputs: seen.append((module, inputs)) or (inputs[0] + 1,)):
        with hooked([first, second], after=lambda _module, _inputs, output: 10 * output):
            assert model(x).tolist() == [200.0, 200.0]
        assert model(x).tolist() == [2.0, 2.0]
    assert [(module, len(inputs)) for module, inputs in seen] == [(first, 1)] * 2
    assert model(x).tolist() == [1.0, 1.0]


def test_hooks_are_gone_after_an_error() -> None:
    layer = nn.Linear(2, 2)

    def fail(*_: object) -> None:
        raise RuntimeError("seen enough")

    for block in (hooked([layer], before=fail), hooked([layer], after=fail), watched({"fc": layer}, fail)):
        with pytest.raises(RuntimeError, match="seen enough"), block:
            layer(torch.ones(2))
        assert not layer._forward_hooks
        assert not layer._forward_pre_hooks


def test_every_call_is_shown_by_name_and_number() -> None:
    shared, other, seen = nn.ReLU(), nn.Identity(), []
    model = nn.Sequential(shared, other, shared, shared)
    with watched({"act": shared, "id": other}, lambda name, module, inputs, output: seen.append((name, module))):
        model(torch.ones(2))
    assert seen == [("act", shared), ("id", other), ("act#2", shared), ("act#3", shared)]
    with watched({"id": other}, lambda _name, _module, _inputs, output: output + 1):
        assert model(torch.ones(1)).item() == 2
