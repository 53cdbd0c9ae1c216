"""The side pass over layers that normalize by a batch: its tables against autograd, and no trace of it."""

import copy

import pytest
import torch
from noisy_networks import calibrated, images, small_model
from torch import nn
from torch.nn import functional as F

from flexnorm import nn as enn
from flexnorm import optim, probe
from flexnorm.statistics import recalibrate
from flexnorm.theory import regularization as reg

D = torch.float64


@pytest.mark.parametrize("inplace", [False, True])
def test_capture_against_autograd_image_by_image(inplace):
    net = calibrated(True, inplace)
    x, y = images(6), torch.tensor([0, 1, 2, 3, 4, 0])
    table = probe.capture(net, x, F.cross_entropy, y)[0]
    with torch.no_grad():
        h = net.conv(x)
    torch.testing.assert_close(table.mean, h.mean((2, 3)))
    torch.testing.assert_close(table.var, h.var((2, 3), correction=0))
    for j in range(6):
        shift = torch.zeros(6, dtype=D, requires_grad=True)
        scale = torch.zeros(6, dtype=D, requires_grad=True)
        centred = h[j : j + 1] - table.mean[j][None, :, None, None]
        out = net.bn(h[j : j + 1]) + shift[:, None, None] + scale[:, None, None] * centred
        g_shift, g_scale = torch.autograd.grad(F.cross_entropy(net.tail(out), y[j : j + 1]), (shift, scale))
        torch.testing.assert_close(table.shift[j], g_shift)
        torch.testing.assert_close(table.scale[j], g_scale)


def test_capture_leaves_the_model_alone():
    net = calibrated().train()
    net.conv.eval()
    before = copy.deepcopy(net.state_dict())
    x = images(8)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    probe.capture(net, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    assert not net.conv.training
    assert all(p.grad is None for p in net.parameters())
    assert not net.bn._forward_hooks
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


def test_capture_works_on_a_frozen_model_and_a_shared_layer():
    shared = nn.BatchNorm1d(3, dtype=D)
    net = nn.Sequential(shared, nn.Linear(3, 3, dtype=D), shared, nn.Linear(3, 2, dtype=D)).requires_grad_(False)
    x = torch.randn(16, 3, dtype=D, generator=torch.Generator().manual_seed(0))
    tables = probe.capture(net, x)
    assert [t.name for t in tables] == ["0", "0#2"]
    assert tables[1].shift.abs().sum() > 0
    decay = optim.GammaDecay(net, 32, momentum=1.0)
    decay.update(x)
    generator = torch.Generator().manual_seed(0)
    again = [reg.layer_strength(t) for t in probe.capture(net, x, generator=generator)]
    total = sum(s.mean_part + s.std_part + s.cross_part for s in again) / 32
    torch.testing.assert_close(decay.zeta()["0"], total.clamp_min(0))


def test_wrappers_are_looked_through():
    net, x = calibrated(), images(8)
    compiled = torch.compile(net, backend="eager")
    compiled(x)  # compiled code does not see hooks that come later
    plain, seen = probe.capture(net, x)[0], probe.capture(compiled, x)[0]
    assert (plain.name, seen.name) == ("bn", "_orig_mod.bn")
    assert all(torch.equal(a, b) for a, b in zip(plain[1:], seen[1:], strict=True))


def test_only_norms_of_batch_and_population_are_found():
    kinds = (nn.BatchNorm1d, nn.SyncBatchNorm, enn.BatchNorm1d, enn.PopulationNorm1d, enn.UnitizedBatchNorm1d)
    others = (nn.InstanceNorm1d, nn.LayerNorm, enn.InstanceNorm1d, enn.LayerNorm1d, enn.RMSNorm1d)
    model = nn.ModuleDict({kind.__module__.replace(".", "_") + kind.__name__: kind(4) for kind in (*kinds, *others)})
    model["group"] = enn.GroupNorm(2, 4)
    assert tuple(type(module) for module in probe.batch_norm_layers(model).values()) == kinds


def test_a_branch_without_influence_has_no_strength():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            self.unused(x)
            return self.used(x)

    tables = probe.capture(Net(), torch.randn(8, 3))
    assert [t.name for t in tables] == ["unused", "used"]
    assert tables[0].shift.abs().sum() == 0
    assert reg.layer_strength(tables[0]).zeta(32).sum() == 0


def exact_hessian(name, z, n):
    losses = {
        "cross_entropy": lambda o: sum(F.cross_entropy(o, t) * p for t, p in _all_labels(o)),
        "mse": lambda o: F.mse_loss(o, torch.zeros_like(o)),
        "squared": lambda o: o.square().sum(),
        "half_squared": lambda o: 0.5 * o.square().sum(),
        "binary_cross_entropy": lambda o: F.binary_cross_entropy_with_logits(o, torch.full_like(o, 0.5)),
    }
    return torch.autograd.functional.hessian(losses[name], z).reshape(n, n)


def _all_labels(o):
    # The curvature of the cross entropy of logits does not depend on the label.
    yield torch.zeros((1, *o.shape[2:]), dtype=torch.long), 1.0


@pytest.mark.parametrize("shape", [(1, 3), (1, 2, 2)])
@pytest.mark.parametrize("name", probe.CURVED_LOSSES)
def test_draws_have_the_hessian_as_their_covariance(name, shape):
    z = torch.randn(shape, dtype=D, generator=torch.Generator().manual_seed(2))
    n = z.numel()
    draws = 40_000
    many = z.expand(draws, *shape[1:])
    root = probe.CURVED_LOSSES[name](many, torch.Generator().manual_seed(1)).reshape(draws, n)
    torch.testing.assert_close(root.T @ root / draws, exact_hessian(name, z, n), atol=0.04, rtol=0.04)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: probe.capture(nn.Linear(2, 2), torch.zeros(4, 2)), ValueError, "no layer"),
        (lambda: probe.capture(small_model(), torch.zeros(4, 4), "mae"), ValueError, "did you mean 'mse'"),
        (lambda: probe.capture(small_model(), torch.zeros(4, 4), F.cross_entropy), ValueError, "needs targets"),
    ],
)
def test_errors_name_the_value(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_channels_on_the_last_axis_are_taken_there():
    # The same network twice: channels last, and on axis 1 between two turns.
    torch.manual_seed(0)
    last = nn.Sequential(nn.Linear(4, 6), enn.BatchNorm1d(6, channel_axis=-1), nn.Tanh()).double()
    first = nn.Sequential(nn.Linear(4, 6), Turn(), enn.BatchNorm1d(6), Turn(), nn.Tanh()).double()
    first[0].load_state_dict(last[0].state_dict())
    x = torch.randn(5, 7, 4, dtype=D)
    recalibrate(last, [x])
    recalibrate(first, [x])
    torch.testing.assert_close(last[1].running_var, first[2].running_var)
    torch.testing.assert_close(last[1].running_mean, last[0](x).mean((0, 1)))
    tables = [
        probe.capture(net, x, lambda y, t: (y - t).square().mean(), torch.ones_like(x[..., :1]))[0]
        for net in (last, first)
    ]
    for one, other in zip(tables[0][1:], tables[1][1:], strict=True):
        torch.testing.assert_close(one, other)
    noisy = []
    for net in (last, first):
        noise = optim.BatchNoise(net.train(), 8)
        torch.manual_seed(1)
        noisy.append(net(x))
        noise.remove()
    torch.testing.assert_close(*noisy)


class Turn(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)
