"""zeta of real layers, and the advice, against simulation of the batch noise."""

import json
import math

import pytest
import torch
from noisy_networks import calibrated, images, small_model
from torch import nn
from torch.nn import functional as F

from flexnorm import probe
from flexnorm.theory import regularization as reg

D = torch.float64


@torch.no_grad()
def noise_cost(net, size, batches, one_by_one):
    """Expected loss that the statistics of independent batches add, by sampling them; with its standard error."""
    mu, sigma = net.bn.running_mean[:, None, None], net.bn.running_var.sqrt()[:, None, None]
    gamma, beta = net.bn.weight[:, None, None], net.bn.bias[:, None, None]
    evaluation = images(192)
    u = (net.conv(evaluation) - mu) / sigma
    labels = net(evaluation).softmax(1)  # labels as the model itself draws them, as the Fisher information has it

    def loss(shift, scale):
        logits = net.tail(gamma * (1 + scale) * u + beta + gamma * shift)
        return -(labels * logits.log_softmax(1)).sum(1).mean()

    zero = torch.zeros_like(mu)
    base = loss(zero, zero)
    other = net.conv(images(size * batches, seed=5)).reshape(batches, size, 6, 6, 6)
    costs = []
    for index, batch in enumerate(other):
        a = (batch.mean((0, 2, 3))[:, None, None] - mu) / sigma
        b = 0.5 * (batch.var((0, 2, 3), correction=0)[:, None, None] / sigma**2 - 1)
        mask = torch.ones_like(mu)
        if one_by_one:
            mask = torch.zeros_like(mu)
            mask[index % 6] = 1
        pair = (loss(-sign * a * mask, -sign * b * mask) for sign in (1, -1))
        costs.append((6 if one_by_one else 1) * (sum(pair) / 2 - base))
    costs = torch.stack(costs)
    return float(costs.mean()), float(costs.std() / math.sqrt(batches))


@pytest.mark.slow
@pytest.mark.parametrize("activation", [False, True])
def test_strength_of_a_convolution_is_what_batch_noise_costs(activation):
    net, size = calibrated(activation), 32
    table = reg.merge_tables([probe.capture(net, images(2048)[i : i + 512]) for i in range(0, 2048, 512)])[0]
    gamma = net.bn.weight.detach()
    for joint in (False, True):
        cost, error = noise_cost(net, size, 600, not joint)
        strength = reg.layer_strength(table)
        expected = reg.joint_strength(table, gamma) / size if joint else float((strength.zeta(size) * gamma**2).sum())
        assert abs(cost - expected) < 3.5 * error + 0.08 * expected  # 2048 images estimate it within a few percent
        assert error < 0.1 * cost


def test_effective_batch_size_of_correlated_positions():
    net = calibrated()
    strength = reg.layer_strength(probe.capture(net, images(2048))[0])
    with torch.no_grad():
        h = net.conv(images(32 * 400, seed=9)).reshape(400, 32, 6, 36)
    u = (h - net.bn.running_mean[:, None]) / net.bn.running_var.sqrt()[:, None]
    u = u.movedim(2, 1).reshape(400, 6, -1)
    mean_variance = u.mean(2).var(0)
    std_variance = u.std(2, correction=0).var(0)
    torch.testing.assert_close(strength.mean_variance / 32, mean_variance, rtol=0.25, atol=0)
    torch.testing.assert_close(strength.square_variance / 128, std_variance, rtol=0.3, atol=0)
    assert torch.all(strength.mean_variance < 0.7)  # more values than images ...
    assert strength.mean_variance.max() > 3 / 36  # ... and far fewer than positions where the kernel is smooth


@pytest.mark.parametrize("kind", ["gaussian", "heavy"])
def test_dense_layers_reduce_to_the_printed_form(kind):
    torch.manual_seed(1)
    x = torch.randn(20_000, 3, dtype=D)
    if kind == "heavy":
        x = torch.distributions.Laplace(torch.tensor(0.0, dtype=D), 2**-0.5).sample((20_000, 3))
    net = nn.Sequential(nn.BatchNorm1d(3, dtype=D, eps=0.0), nn.Linear(3, 1, bias=False, dtype=D))
    nn.init.ones_(net[1].weight)
    with torch.no_grad():
        net[0].running_mean.copy_(x.mean(0))
        net[0].running_var.copy_(x.var(0, correction=0))
    strength = reg.layer_strength(probe.capture(net, x, "half_squared")[0])
    u = (x - x.mean(0)) / x.std(0, correction=0)
    rho = u.pow(4).mean(0) - 3
    # half the squared error of a linear output: curvature 1, I(gamma) = E u^2 = 1
    torch.testing.assert_close(strength.mean_variance, torch.ones(3, dtype=D), rtol=1e-3, atol=0)
    torch.testing.assert_close(strength.square_variance, rho + 2, rtol=1e-3, atol=0)
    printed = reg.zeta_printed(u, 32, curvature="identity")
    expected = torch.stack(
        [reg.zeta_printed(u[:, c], 32, curvature="identity", kurtosis=float(rho[c])) for c in range(3)]
    )
    torch.testing.assert_close(strength.zeta(32), expected, rtol=0.1, atol=0)
    assert printed.shape == (3,)


def test_dead_channels_are_not_regularized():
    x = torch.randn(64, 3, dtype=D, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 2.0
    net = nn.Sequential(nn.BatchNorm1d(3, dtype=D), nn.Linear(3, 2, dtype=D))
    strength = reg.layer_strength(probe.capture(net, x)[0])
    zeta = strength.zeta(16)
    assert zeta[1] == 0
    assert zeta[0] > 0
    assert torch.isfinite(zeta).all()
    advice = reg.advise(net, [x], 16)
    assert math.isfinite(advice.penalty)


def test_advice():
    net = calibrated()
    batches = [(images(256, seed), torch.zeros(256)) for seed in (1, 2, 3)]
    advice = reg.advise(net, batches, 128, max_images=500)
    assert advice.images == 512
    row = advice.layers[0]
    gamma = net.bn.weight.detach()
    assert (row.layer, row.channels) == ("bn", 6)
    zeta = torch.tensor(row.zeta_per_channel, dtype=D)
    assert row.penalty == pytest.approx(float((zeta * gamma**2).sum()))
    assert advice.penalty == row.penalty
    assert 0 < row.mean_share < 1
    assert row.effective_batch_mean > 128
    assert row.effective_batch_std > 128
    add = torch.tensor(advice.compensation(1024)["bn"], dtype=D)
    other = torch.tensor(reg.advise(net, batches, 1024, max_images=500).layers[0].zeta_per_channel, dtype=D)
    torch.testing.assert_close(add + other, zeta)
    assert all(value < 0 for value in advice.compensation(64)["bn"])
    assert json.loads(json.dumps(advice.asdict()))["layers"][0]["layer"] == "bn"
    assert "add at 1024" in advice.table(1024)
    assert "bn" in advice.table().splitlines()[1]
    labels = [(images(64), torch.randint(0, 5, (64,), generator=torch.Generator().manual_seed(0)))]
    assert reg.advise(net, labels, 128, loss=F.cross_entropy).loss == "cross_entropy"


def test_empirical_information_at_true_labels_agrees_with_the_curvature_where_labels_follow_the_model():
    net = calibrated()
    x = images(2048)
    with torch.no_grad():
        labels = torch.multinomial(net(x).softmax(1), 1, generator=torch.Generator().manual_seed(4))[:, 0]
    curved = reg.advise(net, [x], 32).penalty
    empirical = reg.advise(net, [(x, labels)], 32, loss=F.cross_entropy).penalty
    assert empirical == pytest.approx(curved, rel=0.1)


def test_batches_must_agree():
    one, two = probe.capture(small_model(), torch.randn(4, 4)), []
    with pytest.raises(ValueError, match="differ between batches"):
        reg.merge_tables([one, two])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: reg.advise(small_model(), [], 32), ValueError, "no batches"),
        (lambda: reg.advise(small_model(), [torch.zeros(2, 4)], 32), ValueError, "at least 4 images"),
    ],
)
def test_errors_name_the_value(call, error, message):
    with pytest.raises(error, match=message):
        call()
