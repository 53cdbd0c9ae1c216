"""The experiments of Fig. 2 at a tiny scale, the partial norms, weight normalization and population estimates."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from evenkeel.nn import PopulationNorm1d, PopulationNorm2d
from evenkeel.theory import GammaDecay, PopulationEstimator, estimate_population
from evenkeel.theory import experiments as ex


@pytest.fixture(scope="module")
def data():
    """Two classes of 6x6 images that differ in the sign of a pattern."""
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (160,), generator=g)
    pattern = torch.randn(1, 1, 6, 6, generator=g)
    x = (2.0 * y - 1).view(-1, 1, 1, 1) * pattern + torch.randn(160, 1, 6, 6, generator=g)
    return ex.Images(x[:120], y[:120], x[120:], y[120:])


def test_weight_normalization():
    layer = ex.weight_normalized(nn.Conv2d(3, 5, 3, bias=False))
    torch.testing.assert_close(layer.weight.flatten(1).norm(dim=1), torch.ones(5))
    raw = layer.parametrizations.weight.original
    x = torch.randn(2, 3, 5, 5)
    out = layer(x)
    torch.testing.assert_close(out, F.conv2d(x, raw / raw.flatten(1).norm(dim=1).view(-1, 1, 1, 1)))
    with torch.no_grad():
        raw[0] = 0.0
    layer(x).sum().backward()  # a zero vector stays usable
    assert torch.isfinite(raw.grad).all()
    copied = copy.deepcopy(layer)
    torch.testing.assert_close(copied(x), layer(x))


@pytest.mark.parametrize("variant", ex.VARIANTS)
def test_conv_net(variant):
    one, two = (
        ex.conv_net(variant, in_channels=1, classes=2, width=4),
        ex.conv_net(variant, in_channels=1, classes=2, width=4),
    )
    x = torch.randn(6, 1, 8, 8)
    assert one(x).shape == (6, 2)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    assert sum(isinstance(m, nn.Conv2d) for m in one) == 4
    gammas = [p for n, p in one.named_parameters() if n.endswith(".weight") and p.dim() == 1]
    assert len(gammas) == 5
    assert all(torch.all(g == (2**0.5 if variant.startswith("weight") else 1.0)) for g in gammas)


def test_conv_net_errors():
    with pytest.raises(ValueError, match="did you mean 'batch'"):
        ex.conv_net("bathc")
    with pytest.raises(ValueError, match="got 2 names"):
        ex.conv_net(["batch", "none"])


def test_figure_2ab(data):
    figure, runs = ex.figure_2ab(data, batch_sizes=(20, 60), epochs=2, lr=0.02, width=2, pool=60)
    assert [run.label for run in runs] == ["BN, M=20", "BN, M=60", "PN, M=20", "PN + gamma decay, M=20"]
    assert len(figure.curves) == 8
    assert figure.curves[1].y == runs[0].test_loss
    assert runs[2].train_loss != runs[3].train_loss
    assert all(len(run.train_loss) == 2 for run in runs)


def test_training_learns_and_repeats(data):
    def once():
        model = ex.conv_net("population", in_channels=1, classes=2, width=4)
        decay = GammaDecay(model, 20, 0.01)
        return ex.train(model, data, batch_size=20, epochs=6, lr=0.05, pool=60, gamma_decay=decay)

    first, second = once(), once()
    assert first == second
    assert first.train_loss[-1] < 0.5 * 0.693
    assert first.test_accuracy[-1] > 0.7


def test_strong_gamma_decay_shrinks_gamma(data):
    norms = []
    for coefficient in (0.0, 0.3):
        model = ex.conv_net("population", in_channels=1, classes=2, width=2)
        decay = GammaDecay(model, 20, coefficient)
        norms.append(
            ex.train(model, data, batch_size=20, epochs=3, lr=0.05, pool=60, gamma_decay=decay).gamma_squared[-1]
        )
    assert norms[1] < 0.5 * norms[0]


def test_figure_2cd(data):
    figure, runs = ex.figure_2cd(data, batch_size=30, epochs=1, lr=0.02, width=2)
    assert [run.label for run in runs] == ["SGD", "WN", "BN", "WN + mean-only BN", "WN + variance-only BN"]
    assert figure.name == "figure-2cd"


def test_figure_2ef(data):
    gamma, loss, runs = ex.figure_2ef(data, layers=(0, 4), batch_sizes=(20, 60), epochs=1, width=2)
    assert len(gamma.curves) == len(loss.curves) == 2
    assert [run.label for run in runs] == ["layer 0, M=20", "layer 0, M=60", "layer 4, M=20", "layer 4, M=60"]
    assert loss.curves[0].y == (runs[0].test_loss[-1], runs[1].test_loss[-1])
    assert all(value > 0 for c in gamma.curves for value in c.y)


def deep():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        PopulationNorm2d(4, statistics="estimated"),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 3),
        PopulationNorm1d(3, statistics="estimated"),
    ).double()


def test_one_pass_sets_every_layer_to_the_moments_of_its_own_input():
    model, x = deep(), torch.randn(50, 2, 4, 4, dtype=torch.float64)
    assert estimate_population(model, x) == 2
    with torch.no_grad():
        h = model[0](x)
        tail = model[4](model[3](model[2](model[1].eval()(h))))
    torch.testing.assert_close(model[1].running_mean, h.mean((0, 2, 3)))
    torch.testing.assert_close(model[1].running_var, h.var((0, 2, 3), correction=0))
    torch.testing.assert_close(model[5].running_mean, tail.mean(0))
    torch.testing.assert_close(model[5].running_var, tail.var(0, correction=0))
    assert not model[1]._forward_pre_hooks
    assert model[5].training
    assert estimate_population(nn.Linear(2, 2), torch.zeros(1, 2)) == 0


def test_non_finite_channels_keep_their_statistics():
    norm = PopulationNorm1d(2, statistics="estimated")
    x = torch.randn(10, 2) + 3
    x[0, 1] = float("inf")
    estimate_population(norm, x)
    assert norm.running_mean[1] == 0
    assert norm.running_mean[0] == pytest.approx(float(x[:, 0].mean()))


def test_estimator_keeps_time_draws_anew_and_resumes():
    x = torch.randn(40, 2, 4, 4, dtype=torch.float64)
    model = deep()
    estimator = PopulationEstimator(model, x, size=10, every=3)
    assert estimator.cost == 0.0
    assert [estimator() for _ in range(3)] == [True, False, False]
    first = model[1].running_mean.clone()
    state = estimator.state_dict()
    estimator()
    second = model[1].running_mean.clone()
    assert not torch.equal(first, second)
    assert estimator.renewals == 2
    assert estimator.cost == estimator.seconds / 4 > 0
    other = deep()
    resumed = PopulationEstimator(other, x, size=10, every=3)
    resumed.load_state_dict(state)
    resumed()
    assert torch.equal(other[1].running_mean, second)
    whole = PopulationEstimator(deep(), x)
    assert whole.size == 40


def _worker(rank, path, pools, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    model = deep()
    estimate_population(model, pools[rank])
    queue.put((rank, model[1].running_var.tolist(), model[5].running_var.tolist()))
    torch.distributed.destroy_process_group()


def test_two_processes_estimate_the_statistics_of_both_pools(tmp_path):
    x = torch.randn(30, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    context = torch.multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_worker, args=(r, tmp_path / "store", (x[:20], x[20:]), queue)) for r in (0, 1)]
    for worker in workers:
        worker.start()
    answers = sorted(queue.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join(timeout=60)
    alone = deep()
    estimate_population(alone, x)
    for _, first, second in answers:
        torch.testing.assert_close(torch.tensor(first, dtype=torch.float64), alone[1].running_var)
        torch.testing.assert_close(torch.tensor(second, dtype=torch.float64), alone[5].running_var)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PopulationEstimator(nn.Linear(2, 2), torch.zeros(4, 2)), "no PopulationNorm layer"),
        (lambda: PopulationEstimator(PopulationNorm1d(2), torch.zeros(4, 2)), "statistics='estimated'"),
        (lambda: PopulationEstimator(deep(), torch.zeros(4, 2, 4, 4), every=0), "got 10000, 0 and 4"),
    ],
)
def test_estimator_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
