"""zeta of real layers, GammaDecay, the emulation of BN and the advice, against simulation of the batch noise."""

import copy
import io
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flexnorm import nn as enn
from flexnorm import optim
from flexnorm.optim import batch_noise
from flexnorm.theory import regularization as reg

D = torch.float64


class ConvNet(nn.Module):
    def __init__(self, activation=True, inplace=False):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1, dtype=D)
        self.bn = nn.BatchNorm2d(6, dtype=D)
        self.act = nn.ReLU(inplace=inplace) if activation else nn.Identity()
        self.head = nn.Linear(24, 5, dtype=D)
        nn.init.normal_(self.head.weight, std=0.5)
        nn.init.uniform_(self.bn.weight, 0.5, 1.5)
        nn.init.normal_(self.bn.bias, std=0.3)

    def tail(self, y):
        return self.head(F.adaptive_avg_pool2d(self.act(y), 2).flatten(1))

    def forward(self, x):
        return self.tail(self.bn(self.conv(x)))


def images(n, seed=1):
    """Images whose positions are correlated and whose values have heavy tails."""
    g = torch.Generator().manual_seed(seed)
    coarse = F.interpolate(torch.randn(n, 2, 3, 3, generator=g, dtype=D), size=6, mode="bilinear")
    return coarse + 0.3 * torch.randn(n, 2, 6, 6, generator=g, dtype=D) ** 3


def calibrated(activation=True, inplace=False):
    torch.manual_seed(0)
    net = ConvNet(activation, inplace)
    with torch.no_grad():
        h = net.conv(images(2048))
        net.bn.running_mean.copy_(h.mean((0, 2, 3)))
        net.bn.running_var.copy_(h.var((0, 2, 3), correction=0))
    return net.eval()


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
    table = reg.merge_tables([reg.capture(net, images(2048)[i : i + 512]) for i in range(0, 2048, 512)])[0]
    gamma = net.bn.weight.detach()
    for joint in (False, True):
        cost, error = noise_cost(net, size, 600, not joint)
        strength = reg.layer_strength(table)
        expected = reg.joint_strength(table, gamma) / size if joint else float((strength.zeta(size) * gamma**2).sum())
        assert abs(cost - expected) < 3.5 * error + 0.08 * expected  # 2048 images estimate it within a few percent
        assert error < 0.1 * cost


def test_effective_batch_size_of_correlated_positions():
    net = calibrated()
    strength = reg.layer_strength(reg.capture(net, images(2048))[0])
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
    strength = reg.layer_strength(reg.capture(net, x, "half_squared")[0])
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


@pytest.mark.parametrize("inplace", [False, True])
def test_capture_against_autograd_image_by_image(inplace):
    net = calibrated(True, inplace)
    x, y = images(6), torch.tensor([0, 1, 2, 3, 4, 0])
    table = reg.capture(net, x, F.cross_entropy, y)[0]
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
    reg.capture(net, x)
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
    tables = reg.capture(net, x)
    assert [t.name for t in tables] == ["0", "0#2"]
    assert tables[1].shift.abs().sum() > 0
    decay = optim.GammaDecay(net, 32, momentum=1.0)
    decay.update(x)
    generator = torch.Generator().manual_seed(0)
    again = [reg.layer_strength(t) for t in reg.capture(net, x, generator=generator)]
    total = sum(s.mean_part + s.std_part + s.cross_part for s in again) / 32
    torch.testing.assert_close(decay.zeta()["0"], total.clamp_min(0))


def test_a_branch_without_influence_has_no_strength():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            self.unused(x)
            return self.used(x)

    tables = reg.capture(Net(), torch.randn(8, 3))
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
@pytest.mark.parametrize("name", reg.CURVED_LOSSES)
def test_draws_have_the_hessian_as_their_covariance(name, shape):
    z = torch.randn(shape, dtype=D, generator=torch.Generator().manual_seed(2))
    n = z.numel()
    draws = 40_000
    many = z.expand(draws, *shape[1:])
    root = reg.CURVED_LOSSES[name](many, torch.Generator().manual_seed(1)).reshape(draws, n)
    torch.testing.assert_close(root.T @ root / draws, exact_hessian(name, z, n), atol=0.04, rtol=0.04)


def test_dead_channels_are_not_regularized():
    x = torch.randn(64, 3, dtype=D, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 2.0
    net = nn.Sequential(nn.BatchNorm1d(3, dtype=D), nn.Linear(3, 2, dtype=D))
    strength = reg.layer_strength(reg.capture(net, x)[0])
    zeta = strength.zeta(16)
    assert zeta[1] == 0
    assert zeta[0] > 0
    assert torch.isfinite(zeta).all()
    advice = reg.advise(net, [x], 16)
    assert math.isfinite(advice.penalty)


def small_model(norm=nn.BatchNorm1d):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), norm(8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, enn.BatchNorm1d, enn.PopulationNorm1d, enn.UnitizedBatchNorm1d])
def test_gamma_decay_finds_every_batch_normalization(norm):
    model = small_model(norm)
    decay = optim.GammaDecay(model, 32)
    decay.update(torch.randn(64, 4))
    zeta = decay.zeta()["1"]
    assert zeta.shape == (8,)
    assert zeta.min() >= 0
    assert zeta.max() > 0
    assert reg.advise(model, [torch.randn(64, 4)], 32).layers[0].channels == 8


def test_penalty_and_its_gradient():
    model = small_model()
    decay = optim.GammaDecay(model, 32, momentum=1.0)
    decay.update(torch.randn(64, 4))
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 2.0)
    penalty = decay.penalty()
    penalty.backward()
    zeta, gamma = decay.zeta()["1"], model[1].weight.detach()
    torch.testing.assert_close(penalty.detach(), (zeta * gamma**2).sum())
    torch.testing.assert_close(model[1].weight.grad, 2 * zeta * gamma)
    assert model[0].weight.grad is None
    row = decay.report()[0]
    assert (row.layer, row.channels) == ("1", 8)
    assert row.zeta == pytest.approx(float(zeta.mean()))
    assert row.penalty == pytest.approx(float(penalty.detach()))
    assert row.gamma_squared == pytest.approx(float((gamma**2).mean()))
    assert row.zeta_max == float(zeta.max())


def test_decoupled_decay_is_one_gradient_step_of_the_penalty():
    model = small_model()
    decay = optim.GammaDecay(model, 32, coefficient=0.25)
    before = model[1].weight.detach().clone()
    decay.decay(lr=0.1)
    torch.testing.assert_close(model[1].weight.detach(), before * (1 - 0.05))
    decay.decay(lr=100.0)
    assert torch.all(model[1].weight == 0)  # never past zero


def test_adaptive_zeta_scales_with_the_batch_size_and_averages():
    model = small_model()
    x = torch.randn(64, 4)
    small, large = (optim.GammaDecay(model, size, momentum=0.3) for size in (16, 64))
    for decay in (small, large):
        decay.update(x)
    first = small.zeta()["1"]
    torch.testing.assert_close(first, 4 * large.zeta()["1"])
    once = optim.GammaDecay(model, 16, momentum=1.0)
    once.update(x)
    torch.testing.assert_close(first, once.zeta()["1"])  # the average is bias-corrected
    second = optim.GammaDecay(model, 16, momentum=1.0, seed=1)
    second.update(x)
    small.update(x)
    expected = (0.7 * first + second.zeta()["1"]) / 1.7
    torch.testing.assert_close(small.zeta()["1"], expected)


def test_state_goes_through_a_file_and_is_a_copy():
    model = small_model()
    decay = optim.GammaDecay(model, 32)
    decay.update(torch.randn(64, 4))
    file = io.BytesIO()
    torch.save(decay.state_dict(), file)
    file.seek(0)
    other = optim.GammaDecay(copy.deepcopy(model), 32)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(decay.zeta()["1"], other.zeta()["1"])
    kept = decay.state_dict()
    value = kept["average"]["1"].clone()
    x = torch.randn(64, 4)
    decay.update(x)
    assert torch.equal(kept["average"]["1"], value)
    other.update(x)
    assert torch.equal(decay.zeta()["1"], other.zeta()["1"])
    with pytest.raises(ValueError, match="layer '1'"):
        optim.GammaDecay(nn.Sequential(nn.BatchNorm1d(3)), 32).load_state_dict(kept)
    copied = copy.deepcopy(decay)
    copied.decay(0.1)
    assert torch.equal(decay._scales["1"], model[1].weight)


def test_estimates_are_averaged_over_processes(tmp_path):
    model, x = small_model(), torch.randn(64, 4)
    alone = optim.GammaDecay(model, 32)
    alone.update(x)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        together = optim.GammaDecay(model, 32)
        together.update(x)
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(alone.zeta()["1"], together.zeta()["1"])


def test_gamma_decay_matches_the_shrinkage_that_bn_noise_makes():
    """On a linear teacher, PN + GammaDecay and PN + BN noise end at the same gamma."""
    torch.manual_seed(0)
    x = torch.randn(4096, 1, dtype=D)
    x = (x - x.mean()) / x.std(correction=0)
    y = x.clone()
    size, results = 8, {}
    for kind in ("decay", "noise"):
        norm = nn.BatchNorm1d(1, dtype=D, eps=0.0).eval()  # population statistics 0 and 1
        optimizer = torch.optim.SGD(norm.parameters(), lr=0.05)
        decay = optim.GammaDecay(norm, size, loss="squared", momentum=0.5)
        noise = optim.BatchNoise(norm, size, per="image", distribution="gaussian") if kind == "noise" else None
        trace = []
        for step in range(150):
            if noise is not None:
                norm.training = True
                norm.track_running_stats, norm.momentum = True, 0.0
                out = noise._noisy("", norm, norm.eval()(x))
            else:
                out = norm(x)
            cost = (out - y).square().mean()
            if kind == "decay":
                decay.update(x)
                cost = cost + decay.penalty()
            optimizer.zero_grad()
            cost.backward()
            optimizer.step()
            if step >= 100:
                trace.append(float(norm.weight.detach()))
        results[kind] = sum(trace) / len(trace)
    # loss (y - h)^2: zeta = 1/M + 1/(2M), so gamma = 1/(1 + 3/(2M))
    assert results["decay"] == pytest.approx(1 / (1 + 1.5 / size), rel=0.01)
    assert results["noise"] == pytest.approx(1 / (1 + 1.5 / size), rel=0.01)


@pytest.mark.parametrize("distribution", ["chi", "gaussian"])
def test_noise_moments(distribution):
    torch.manual_seed(0)
    v_m, v_q, size = torch.tensor([1.0, 0.2], dtype=D), torch.tensor([2.0, 5.0], dtype=D), 64
    r, s = batch_noise.sample_noise(v_m, v_q, size, distribution=distribution, rows=200_000)
    assert r.shape == s.shape == (200_000, 2)
    torch.testing.assert_close(r.mean(0), torch.ones(2, dtype=D), atol=2e-3, rtol=0)
    torch.testing.assert_close(s.mean(0), torch.zeros(2, dtype=D), atol=2e-3, rtol=0)
    torch.testing.assert_close(s.var(0), v_m / size, rtol=0.12, atol=0)
    torch.testing.assert_close(r.var(0), v_q / (4 * size), rtol=0.25, atol=0)


def test_compensation_removes_the_inflation():
    torch.manual_seed(0)
    one, two = torch.ones(1, dtype=D), 2 * torch.ones(1, dtype=D)
    size = 32
    r, _ = batch_noise.sample_noise(one, two, size, compensate=False, rows=400_000)
    error = float(r.std() / 400_000**0.5)
    assert abs(float(r.mean()) - 1 - batch_noise.inverse_std_bias(size)) < 4 * error
    assert batch_noise.inverse_std_bias(size) == pytest.approx(3 / (4 * size), rel=0.1)
    assert float(r.square().mean()) - 1 == pytest.approx(2 / (size - 2), rel=0.05)  # six times 1/(2M), as documented
    r, _ = batch_noise.sample_noise(one, two, size, rows=400_000)
    assert abs(float(r.mean()) - 1) < 4 * error
    assert float(r.square().mean()) - 1 == pytest.approx(1 / (2 * size), rel=0.1)


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
    spread = gap.flatten(2).movedim(1, 0).reshape(3, -1).std(1)
    if variance:
        assert torch.all(spread > 0)
    else:
        assert torch.all(spread < 1e-12)  # a shift of the channel only
        assert torch.all(gap.abs() > 0)
    if not mean:  # a factor only
        ratio = (gap / plain).movedim(1, 0).reshape(3, -1)
        torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))


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


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: optim.GammaDecay(small_model(), 1), ValueError, "at least 2, got 1"),
        (lambda: optim.GammaDecay(small_model(), 32, "adaptve"), ValueError, "'adaptve'"),
        (lambda: optim.GammaDecay(small_model(), 32, None), TypeError, "NoneType"),
        (lambda: optim.GammaDecay(small_model(), 32, -1.0), ValueError, "-1.0"),
        (lambda: optim.GammaDecay(small_model(), 32, momentum=0.0), ValueError, "0.0"),
        (lambda: optim.GammaDecay(small_model(), 32, layers=["l"]), ValueError, "Valid: 1"),
        (lambda: optim.GammaDecay(nn.Linear(2, 2), 32), ValueError, "no layer with a scale"),
        (lambda: optim.GammaDecay(small_model(), 32).penalty(), RuntimeError, "call update"),
        (lambda: optim.GammaDecay(small_model(), 32, 0.1).decay(-1.0), ValueError, "-1.0"),
        (lambda: reg.capture(nn.Linear(2, 2), torch.zeros(4, 2)), ValueError, "no layer"),
        (lambda: reg.capture(small_model(), torch.zeros(4, 4), "mae"), ValueError, "did you mean 'mse'"),
        (lambda: reg.capture(small_model(), torch.zeros(4, 4), F.cross_entropy), ValueError, "needs targets"),
        (lambda: reg.advise(small_model(), [], 32), ValueError, "no batches"),
        (lambda: reg.advise(small_model(), [torch.zeros(2, 4)], 32), ValueError, "at least 4 images"),
        (lambda: optim.BatchNoise(nn.Linear(2, 2), 32), ValueError, "no layer"),
        (lambda: optim.BatchNoise(small_model(), 32, per="batches"), ValueError, "did you mean 'batch'"),
        (lambda: optim.BatchNoise(small_model(), 32, distribution="xi"), ValueError, "chi"),
        (lambda: batch_noise.sample_noise(torch.ones(1), torch.ones(1), 8, distribution="xi"), ValueError, "chi"),
        (lambda: batch_noise.inverse_std_bias(4, kurtosis=10.0), ValueError, "batch_size 4 is too small"),
    ],
)
def test_errors_name_the_value(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_batches_must_agree():
    one, two = reg.capture(small_model(), torch.randn(4, 4)), []
    with pytest.raises(ValueError, match="differ between batches"):
        reg.merge_tables([one, two])
