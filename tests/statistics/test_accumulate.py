"""accumulate(): one update per step, from the statistics of the whole accumulated batch."""

from __future__ import annotations

import copy

import pytest
import torch
from model_zoo import BatchNormAct2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import flexnorm.nn as fx
from flexnorm.statistics import accumulate, freeze

LAYERS = {
    "torch": lambda: nn.BatchNorm2d(3, momentum=0.3),
    "torch cumulative": lambda: nn.BatchNorm2d(3, momentum=None),
    "timm": lambda: BatchNormAct2d(3, nn.Identity()),
    "batch": lambda: fx.BatchNorm2d(3, momentum=0.3),
    "batch cumulative": lambda: fx.BatchNorm2d(3, momentum=None),
    "unitized": lambda: fx.UnitizedBatchNorm2d(3),
    "population": lambda: fx.PopulationNorm2d(3, max_ratio=None),
    "renorm": lambda: fx.BatchRenorm2d(3),
    "switchable": lambda: fx.SwitchableNorm2d(3),
    "torch instance": lambda: nn.InstanceNorm2d(3, track_running_stats=True, momentum=0.3),
    "instance": lambda: fx.InstanceNorm2d(3, track_running_stats=True, momentum=0.3),
}


def micro(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 3, 4, 5, generator=generator, dtype=torch.float64) * n + i for i, n in enumerate((4, 2, 7))]


@pytest.mark.parametrize("name", LAYERS)
def test_equals_one_large_batch_per_step(name: str) -> None:
    layer, large = LAYERS[name]().double(), LAYERS[name]().double()
    for step in range(3):
        before = layer.running_mean.clone()
        with accumulate(layer):
            for x in micro(step):
                layer(x)
                assert torch.equal(layer.running_mean, before)
        large(torch.cat(micro(step)))
    torch.testing.assert_close(layer.running_mean, large.running_mean)
    torch.testing.assert_close(layer.running_var, large.running_var)
    assert layer.num_batches_tracked == large.num_batches_tracked
    # Afterwards the layer is what it was.
    again = copy.deepcopy(large)
    x = micro(9)[0]
    layer(x)
    again(x)
    torch.testing.assert_close(layer.running_mean, again.running_mean)
    torch.testing.assert_close(layer.running_var, again.running_var)
    assert "track" not in vars(layer)
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize("build", [nn.BatchNorm2d, fx.BatchNorm2d])
def test_outputs_and_gradients_are_those_of_the_micro_batches(build) -> None:
    plain, held = build(3).double(), build(3).double()
    with accumulate(held):
        for x in micro(0):
            a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
            first, second = plain(a), held(b)
            first.square().sum().backward()
            second.square().sum().backward()
            assert torch.equal(first, second)
            assert torch.equal(a.grad, b.grad)
    assert torch.equal(plain.weight.grad, held.weight.grad)


def test_backward_after_all_forwards() -> None:
    """The buffers that autograd holds are not written to."""
    layer = nn.BatchNorm2d(3).double()
    with accumulate(layer):
        loss = sum(layer(x).square().sum() for x in micro(0))
    loss.backward()
    assert layer.weight.grad is not None


def test_one_update_after_each_optimizer_step() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), fx.UnitizedBatchNorm2d(3)).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    handle = accumulate(model, optimizer)
    for step in range(1, 4):
        for x in micro(step):
            model(x).square().mean().backward()
        assert model[1].num_batches_tracked == model[3].num_batches_tracked == step - 1
        optimizer.step()
        assert model[1].num_batches_tracked == model[3].num_batches_tracked == step
    optimizer.step()
    assert model[1].num_batches_tracked == 3, "a step without a forward is no batch"
    model(micro(0)[0])
    handle.close()
    optimizer.step()
    assert model[1].num_batches_tracked == 3
    model(micro(0)[0])
    assert model[1].num_batches_tracked == 4


@pytest.mark.parametrize("build", [nn.BatchNorm2d, fx.BatchNorm2d])
def test_what_does_not_count(build) -> None:
    model = nn.Sequential(build(3), freeze(build(3)), build(3)).double()
    initial = copy.deepcopy(model.state_dict())
    with accumulate(model, include="0"):
        model[0].eval()(micro(0)[0])
        model[1](micro(0)[0])
    assert all(torch.equal(initial[k], v) for k, v in model.state_dict().items())
    model[0].train()
    x = micro(0)[0].requires_grad_()
    with accumulate(model[0]):
        checkpoint(model[0], x, use_reentrant=False).sum().backward()
    once = build(3).double()
    once(x)
    torch.testing.assert_close(model[0].running_mean, once.running_mean)
    torch.testing.assert_close(model[0].running_var, once.running_var)
    assert model[0].num_batches_tracked == 1
    handle = accumulate(model[0])
    model[0](micro(3)[0])
    handle.__exit__(KeyError, None, None)
    assert model[0].num_batches_tracked == 1
    with accumulate(model[2]), pytest.raises((ValueError, RuntimeError)):
        model[2](torch.zeros(2, 5, 3, 3, dtype=torch.float64))
    assert model[2].momentum == 0.1
    assert model[2].num_batches_tracked == 0


@pytest.mark.parametrize("build", [nn.BatchNorm2d, fx.BatchNorm2d])
def test_a_batch_that_is_not_finite_leaves_the_statistics_alone(build) -> None:
    layer = build(3).double()
    x = micro(0)[0]
    x[0, 1] = float("inf")
    with accumulate(layer):
        layer(x)
        layer(micro(0)[1])
    assert torch.isfinite(layer.running_mean).all()
    assert torch.isfinite(layer.running_var).all()
    assert layer.running_mean[1] == 0
    # As without accumulation, all channels of a layer of this package go together, and it does not count: torch's, too.
    assert torch.equal(layer.running_mean, torch.zeros(3).double())
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("momentum", [0.3, None])
def test_a_layer_of_torch_that_does_not_count(momentum: float | None) -> None:
    layer, large = (nn.BatchNorm2d(3, momentum=momentum).double() for _ in range(2))
    layer.num_batches_tracked = large.num_batches_tracked = None
    with accumulate(layer):
        for x in micro(0):
            layer(x)
    large(torch.cat(micro(0)))
    torch.testing.assert_close(layer.running_mean, large.running_mean)
    torch.testing.assert_close(layer.running_var, large.running_var)
    assert layer.num_batches_tracked is None


def test_unbatched_instance_norm() -> None:
    layer = nn.InstanceNorm1d(3, track_running_stats=True, momentum=1.0)
    x = torch.randn(3, 6)
    with accumulate(layer):
        layer(x)
    torch.testing.assert_close(layer.running_mean, x.mean(1))


def test_synchronized_layers_weigh_by_the_values_of_all_processes(tmp_path, monkeypatch) -> None:
    """On one process, and with the forward of the plain layer, since torch synchronizes on accelerators only."""
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", nn.modules.batchnorm._BatchNorm.forward)
    monkeypatch.setattr(nn.SyncBatchNorm, "_check_input_dim", lambda *_: None)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        layer, large = nn.SyncBatchNorm(3).double(), nn.BatchNorm2d(3).double()
        with accumulate(layer):
            for x in micro(0):
                layer(x)
        large(torch.cat(micro(0)))
        torch.testing.assert_close(layer.running_var, large.running_var)
    finally:
        torch.distributed.barrier()  # gloo is done with all tensors: its end must not wait for one
        torch.distributed.destroy_process_group()
