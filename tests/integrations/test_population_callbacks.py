"""The callbacks for population statistics under stand-ins that call them as the real trainers do.

They were also run under Lightning 2.6.6 and Transformers 5.24.0: renewals, evaluations and resumption are the same.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import flexnorm.integrations as integrations
from flexnorm import NothingDone
from flexnorm.integrations import LightningPopulationCallback, TransformersPopulationCallback
from flexnorm.nn import PopulationNorm1d

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(1)) * 2 + 1


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), PopulationNorm1d(6, statistics="estimated"), nn.Linear(6, 1))


def step(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    (model(X[:20]) - X[:20].sum(1, keepdim=True)).square().mean().backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()


def fresh(model: nn.Sequential) -> bool:
    """Whether the statistics are those of the whole pool under the present weights."""
    with torch.no_grad():
        h = model[0](X)
    return torch.allclose(model[1].running_mean, h.mean(0), atol=1e-6)


def lightning(callback: Any, model: nn.Sequential, batches: int, accumulate: int = 1, done: int = 0) -> list[bool]:
    precision = SimpleNamespace(forward_context=contextlib.nullcontext)
    trainer = SimpleNamespace(global_step=done, precision_plugin=precision, loggers=[])
    callback.on_validation_start(trainer, model)  # the sanity check
    callback.on_train_start(trainer, model)
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    seen = []
    for index in range(batches):
        callback.on_train_batch_start(trainer, model, X[:20], index)
        seen.append(fresh(model))
        ends = (index + 1) % accumulate == 0
        step(model, optimizer if ends else None)
        trainer.global_step += ends
    callback.on_validation_start(trainer, model)
    seen.append(fresh(model))
    step(model, optimizer)
    callback.on_train_end(trainer, model)
    return [*seen, fresh(model)]


def test_lightning_renews_every_few_updates_and_before_evaluations() -> None:
    callback = LightningPopulationCallback(X, size=60, every=2)
    assert callback.state_dict() == {}
    assert lightning(callback, net(), 4) == [True, False, True, False, True, True]
    assert callback.estimator.steps == 4
    assert callback.estimator.cost > 0


def test_lightning_counts_updates_not_batches_and_resumes() -> None:
    callback = LightningPopulationCallback(X, size=60, every=2)
    assert lightning(callback, net(), 6, accumulate=2) == [True, True, False, False, True, True, True, True]
    assert callback.estimator.steps == 3
    later = LightningPopulationCallback(X, size=60, every=2)
    later.load_state_dict(callback.state_dict())
    assert later.state_dict() == callback.state_dict()
    assert lightning(later, net(), 2, done=3)[:2] == [False, True]  # steps 3 and 4


def transformers(callback: Any, model: nn.Sequential, folder: Any, done: int, updates: int) -> list[bool]:
    args, state = SimpleNamespace(output_dir=str(folder)), SimpleNamespace(global_step=done, is_world_process_zero=True)
    control = SimpleNamespace(should_evaluate=False, should_save=False)
    callback.on_train_begin(args, state, control, model=model, train_dataloader=None)
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    seen = []
    for _ in range(updates):
        callback.on_step_begin(args, state, control, model=model)
        seen.append(fresh(model))
        step(model, optimizer)
        state.global_step += 1
        control.should_save = state.global_step == 3
        callback.on_step_end(args, state, control, model=model)
        if control.should_save:
            assert fresh(model)
            (folder / "checkpoint-3").mkdir()
            callback.on_save(args, state, control, model=model)
    control.should_save = False
    control.should_evaluate = True
    callback.on_epoch_end(args, state, control, model=model)
    assert fresh(model)
    step(model, optimizer)
    callback.on_train_end(args, state, control, model=model)
    assert fresh(model)
    return seen


def test_transformers_renews_every_few_updates_and_resumes(tmp_path: Any) -> None:
    callback = TransformersPopulationCallback(X, size=60, every=2)
    callback.on_save(*(SimpleNamespace(output_dir=str(tmp_path), global_step=0),) * 3)  # before the training: nothing
    assert transformers(callback, net(), tmp_path, 0, 4) == [True, False, True, True]  # the last after the checkpoint
    assert callback.estimator.steps == 4
    later = TransformersPopulationCallback(X, size=60, every=2)
    assert transformers(later, net(), tmp_path, 3, 2) == [False, True]
    assert later.estimator.steps == 5


def test_they_are_exported_and_say_what_is_missing_without_stopping_the_training() -> None:
    assert {"LightningPopulationCallback", "TransformersPopulationCallback"} <= set(dir(integrations))
    lightning, transformers = LightningPopulationCallback(X), TransformersPopulationCallback(X)
    trainer = SimpleNamespace(global_step=0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.warns(NothingDone, match=r"renews nothing: 0 of 1 PopulationNorm .* \(1: BatchNorm1d\)"):
        lightning.on_train_start(trainer, model)
    with pytest.warns(NothingDone, match="has no PopulationNorm layers"):
        transformers.on_train_begin(None, None, None, model=nn.Linear(4, 1))
    lightning.on_train_batch_start(trainer, model, None, 0)
    transformers.on_step_begin(None, None, None)
    transformers.on_train_end(None, None, None)
    assert (lightning.estimator, transformers.estimator) == (None, None)
