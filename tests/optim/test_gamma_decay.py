"""GammaDecay: its penalty, its averages, its state, and the shrinkage that real noise makes."""

import copy
import io

import pytest
import torch
from noisy_networks import small_model
from torch import nn

from flexnorm import nn as enn
from flexnorm import optim
from flexnorm.theory import regularization as reg

D = torch.float64


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
        torch.distributed.barrier()  # gloo is done with all tensors: its end must not wait for one
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
    ],
)
def test_errors_name_the_value(call, error, message):
    with pytest.raises(error, match=message):
        call()
