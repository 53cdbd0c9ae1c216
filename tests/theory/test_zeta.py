"""Eq. 3 against Monte Carlo: a single-layer perceptron, several losses, Gaussian, heavy-tailed and skewed inputs."""

import math

import pytest
import torch

from flexnorm.lab import simulations
from flexnorm.theory import regularization as reg

SIZES = (16, 32, 128)
GAMMA, BETA = 0.9, 0.2
REMAINDER = 1.5  # of the expansion, times 1/M^2, for losses whose derivatives and inputs are of order one


def gaussian(n, generator):
    return torch.randn(n, generator=generator, dtype=torch.float64)


def laplace(n, generator):
    x = torch.rand(n, generator=generator, dtype=torch.float64) - 0.5
    return -torch.sign(x) * torch.log1p(-2 * x.abs()) / math.sqrt(2)


def skewed(n, generator):
    x = -torch.log1p(-torch.rand(n, 4, generator=generator, dtype=torch.float64)).sum(1)
    return (x - 4) / 2


INPUTS = {"gaussian": (gaussian, 0.0, 0.0), "laplace": (laplace, 3.0, 0.0), "skewed": (skewed, 1.5, 1.0)}
LOSSES = {
    "identity": lambda h, u: 0.5 * h**2,
    "relu": lambda h, u: 0.5 * torch.relu(h) ** 2,
    "softplus": lambda h, u: torch.nn.functional.softplus(h),
    "relu teacher": lambda h, u: 0.5 * (torch.relu(u) - torch.relu(h)) ** 2,
    "linear teacher": lambda h, u: 0.5 * (0.7 * u - h) ** 2,
}


@pytest.fixture(scope="module")
def population():
    return {name: make(1_000_000, torch.Generator().manual_seed(7)) for name, (make, _, _) in INPUTS.items()}


@pytest.mark.quick(3)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", INPUTS)
def test_zeta_is_the_gap_between_bn_and_pn(population, kind, loss):
    sample, kurtosis, skewness = INPUTS[kind]
    bend = reg.curvature(LOSSES[loss], population[kind], GAMMA, BETA)
    gaps = {}
    for size in SIZES:
        expected = reg.zeta(bend, reg.statistics_noise(size, kurtosis, skewness)) * GAMMA**2
        setting = {"gamma": GAMMA, "beta": BETA, "batches": 320_000 // size}
        independent = simulations.bn_gap(sample, LOSSES[loss], size, mode="independent", **setting)
        assert abs(independent.value - expected) < 3.5 * independent.standard_error + REMAINDER / size**2
        own = simulations.bn_gap(sample, LOSSES[loss], size, mode="own", **setting)
        expected += reg.own_batch_term(LOSSES[loss], population[kind], size, GAMMA, BETA)
        assert abs(own.value - expected) < 3.5 * own.standard_error + REMAINDER / size**2
        gaps[size] = independent
    # As 1/M: 128 times the gap at 128 equals 32 times that at 32, within errors and the remainder.
    a, b = 32 * gaps[32].value, 128 * gaps[128].value
    error = math.hypot(32 * gaps[32].standard_error, 128 * gaps[128].standard_error)
    assert abs(a - b) < 3.5 * error + REMAINDER / 32
    assert b > 10 * 128 * gaps[128].standard_error


@pytest.mark.parametrize(("mean", "variance"), [(True, False), (False, True)])
@pytest.mark.parametrize("loss", ["relu", "linear teacher"])
def test_mean_only_and_variance_only(population, loss, mean, variance):
    size, parts = 32, {"mean": mean, "variance": variance}
    bend = reg.curvature(LOSSES[loss], population["gaussian"], GAMMA, BETA)
    expected = reg.zeta(bend, reg.statistics_noise(size), **parts) * GAMMA**2
    setting = {"gamma": GAMMA, "beta": BETA, "batches": 20_000, **parts}
    independent = simulations.bn_gap(gaussian, LOSSES[loss], size, mode="independent", **setting)
    assert abs(independent.value - expected) < 3.5 * independent.standard_error + REMAINDER / size**2
    own = simulations.bn_gap(gaussian, LOSSES[loss], size, **setting)
    expected += reg.own_batch_term(LOSSES[loss], population["gaussian"], size, GAMMA, BETA, **parts)
    assert abs(own.value - expected) < 3.5 * own.standard_error + REMAINDER / size**2


def test_real_batches_leave_the_square_alone():
    """The mean of h_hat^2 over a batch is gamma^2 exactly, so zeta and the first-order term cancel."""
    own = simulations.bn_gap(gaussian, LOSSES["identity"], 16, batches=20_000)
    assert abs(own.value) < 3.5 * own.standard_error
    assert own.standard_error < 0.05 * 0.75 / 16  # zeta alone would be 0.75/16
    u = gaussian(1_000_000, torch.Generator().manual_seed(3))
    total = reg.zeta(reg.curvature(LOSSES["identity"], u), reg.statistics_noise(16))
    assert abs(total + reg.own_batch_term(LOSSES["identity"], u, 16)) < 1e-3


def test_uncompensated_noise_is_biased_at_first_order():
    size = 32
    biased = simulations.bn_gap(gaussian, LOSSES["identity"], size, mode="uncompensated", mean=False, batches=40_000)
    # E[1/sigma_B^2] - 1 = M/(M - 3) - 1 for the biased variance of M Gaussian values around their mean
    assert abs(biased.value - 0.5 * 3 / (size - 3)) < 3.5 * biased.standard_error
    assert biased.value > 5 / (8 * size)  # the second-order effect that is to be imitated is 1/(8M)


@pytest.mark.parametrize("size", SIZES)
def test_linear_student_with_a_linear_teacher_only_rescales_gamma(size):
    """Exact for real batches: the loss of PN at gamma s plus (1/s^2 - 1) (gamma s)^2 / 2 with s = E[sigma_B]."""
    teacher = 0.7
    s = math.sqrt(2 / size) * math.exp(math.lgamma(size / 2) - math.lgamma((size - 1) / 2))
    own = simulations.bn_gap(gaussian, LOSSES["linear teacher"], size, gamma=GAMMA, batches=640_000 // size)
    bn = 0.5 * (teacher**2 - 2 * teacher * GAMMA * s + GAMMA**2)
    pn = 0.5 * (teacher - GAMMA) ** 2
    assert abs(own.value - (bn - pn)) < 3.5 * own.standard_error
    at_rescaled = 0.5 * (teacher - GAMMA * s) ** 2 + 0.5 * (1 / s**2 - 1) * (GAMMA * s) ** 2
    assert bn == pytest.approx(at_rescaled)
    both = 2 * reg.zeta(reg.Curvature(1, 1), reg.statistics_noise(size))
    assert 1 / s**2 - 1 == pytest.approx(both, abs=3 / size**2)  # 3/(2M) for the loss without one half


def test_printed_zeta_is_the_general_one_with_its_curvature(population):
    u = population["gaussian"]
    h = GAMMA * u + BETA
    for name in ("identity", "relu", "sigmoid"):
        loss = LOSSES["softplus"] if name == "sigmoid" else LOSSES[name]
        bend = reg.CURVATURES[name](h)
        general = reg.zeta(
            reg.Curvature(float(bend.mean()), float((bend * u**2).mean())), reg.statistics_noise(32, kurtosis=0.0)
        )
        printed = reg.zeta_printed(h, 32, curvature=name, gamma=GAMMA, beta=BETA)
        assert float(printed) == pytest.approx(general)
        if name != "sigmoid":  # softplus as a mean function has curvature sigmoid; as a loss, sigmoid (1 - sigmoid)
            c = reg.curvature(loss, u, GAMMA, BETA)
            assert general == pytest.approx(reg.zeta(reg.Curvature(c.shift, c.scale), reg.statistics_noise(32)))
    score = torch.relu(h) * u
    by_score = reg.zeta_printed(h[:, None], 32, score=score[:, None], curvature="relu")
    assert by_score.shape == (1,)
    assert float(by_score) == pytest.approx(float((score**2).mean()) / 128 + float((h > 0).double().mean()) / 64)


@pytest.mark.parametrize("size", SIZES)
def test_special_values_are_the_std_part_of_the_full_square(size):
    u = gaussian(1_000_000, torch.Generator().manual_seed(5))
    for name in ("identity", "relu"):
        twice = reg.curvature(lambda h, u, name=name: 2 * LOSSES[name](h, u), u)
        value = reg.zeta(twice, reg.statistics_noise(size), mean=False)
        assert reg.special_zeta(name, size) == pytest.approx(value, rel=0.01)


@pytest.mark.slow
def test_noise_of_statistics_by_sampling():
    for kind, (sample, kurtosis, skewness) in INPUTS.items():
        size, batches = 256, 20_000
        u = sample(size * batches, torch.Generator().manual_seed(1)).reshape(batches, size)
        a, b = u.mean(1), u.std(1, correction=0) - 1
        noise = reg.statistics_noise(size, kurtosis, skewness)
        for got, expected in ((a.var(), noise.mean), (b.var(), noise.std)):
            assert float(got) == pytest.approx(expected, rel=0.06), kind
        correlation = noise.covariance / math.sqrt(noise.mean * noise.std)
        assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) == pytest.approx(correlation, abs=0.03)


def test_loss_without_curvature():
    u = torch.linspace(-1, 1, 5, dtype=torch.float64)
    assert reg.curvature(lambda h, u: h, u) == reg.Curvature(0.0, 0.0, 0.0)
    assert reg.curvature(lambda h, u: torch.relu(h), u) == reg.Curvature(0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reg.statistics_noise(1), "at least 2, got 1"),
        (lambda: reg.statistics_noise(8, kurtosis=-3), "below -2, got -3"),
        (lambda: reg.special_zeta("rely", 8), "did you mean 'relu'"),
        (lambda: reg.zeta_printed(torch.zeros(3), 8, curvature="sigmoids"), "did you mean 'sigmoid'"),
        (lambda: simulations.bn_gap(gaussian, LOSSES["relu"], 8, mode="owm"), "did you mean 'own'"),
        (lambda: simulations.bn_gap(gaussian, LOSSES["relu"], 3), "at least 4, got 3"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("size", SIZES)
def test_the_printed_fixed_point_is_that_of_the_effective_gamma(size):
    """ReLU in the right direction, own batches, known mean: gamma ends at s, and gamma s at the printed value."""
    u = gaussian(1_600_000, torch.Generator().manual_seed(2)).reshape(-1, size)
    sigma = u.square().mean(1, keepdim=True).sqrt()
    teacher, student = torch.relu(u), torch.relu(u / sigma)
    best = float((teacher * student).mean() / student.square().mean())
    s = math.sqrt(2 / size) * math.exp(math.lgamma((size + 1) / 2) - math.lgamma(size / 2))
    error = float((teacher * student).mean(1).std() / (len(u) ** 0.5 * 0.5))
    assert abs(best - s) < 4 * error
    printed = 1 / (2 * reg.special_zeta("relu", size) + 1)
    assert abs(s * s - printed) < 0.5 / size**2
    assert s - printed > 0.2 / size  # what is printed is not gamma itself
