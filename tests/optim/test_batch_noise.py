"""BatchNoise: the emulation of BN costs what zeta says."""

import pytest
import torch
from noisy_networks import calibrated, images, small_model
from torch import nn
from torch.nn import functional as F

from flexnorm import nn as enn
from flexnorm import optim
from flexnorm.theory import regularization as reg

D = torch.float64


def test_batch_noise_costs_what_zeta_says():
    """The emulation on a conv layer with measured statistics against the prediction, and off in evaluation."""
    net, size = calibrated(False), 32
    x = images(1024)
    advice = reg.advise(net, [x], size)
    with torch.no_grad():
        labels = net(x).softmax(1)

        def loss():
            return -(labels * net(x).log_softmax(1)).sum(1).mean()

        base = loss()
        with optim.BatchNoise(net, size, strengths=advice.strengths, per="image") as noise:
            assert torch.equal(loss(), base)  # evaluation mode
            net.bn.training, net.bn.forward = (
                True,
                lambda h: F.batch_norm(
                    h, net.bn.running_mean, net.bn.running_var, net.bn.weight, net.bn.bias, False, 0.0, net.bn.eps
                ),
            )
            torch.manual_seed(0)
            costs = torch.stack([loss() - base for _ in range(60)])
        noise.remove()
        assert torch.equal(loss(), base)
    error = float(costs.std() / 60**0.5)
    assert abs(float(costs.mean()) - advice.penalty) < 3.5 * error + 0.1 * advice.penalty
    assert error < 0.15 * advice.penalty


@pytest.mark.parametrize(("mean", "variance"), [(True, False), (False, True), (True, True)])
def test_batch_noise_on_population_norm(mean, variance):
    norm = enn.PopulationNorm2d(3, statistics="estimated", affine=False).double()
    x = torch.randn(4, 3, 2, 2, dtype=D)
    plain = norm(x)
    torch.manual_seed(0)
    with optim.BatchNoise(norm, 16, mean=mean, variance=variance):
        gap = norm(x) - plain
    deviation = gap.flatten(2).movedim(1, 0).reshape(3, -1).std(1)
    if variance:
        assert torch.all(deviation > 0)
    else:
        assert torch.all(deviation < 1e-12)  # a shift of the channel only
        assert torch.all(gap.abs() > 0)
    if not mean:  # a factor only
        ratio = (gap / plain).movedim(1, 0).reshape(3, -1)
        torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: optim.BatchNoise(nn.Linear(2, 2), 32), ValueError, "no layer"),
        (lambda: optim.BatchNoise(small_model(), 32, per="batches"), ValueError, "did you mean 'batch'"),
        (lambda: optim.BatchNoise(small_model(), 32, distribution="xi"), ValueError, "chi"),
    ],
)
def test_errors_name_the_value(call, error, message):
    with pytest.raises(error, match=message):
        call()
