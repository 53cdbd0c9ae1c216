"""Estimates of population statistics: one pass, in chunks, step by step, in any loop, and over two processes."""

import io

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flexnorm import NothingDone
from flexnorm.nn import PopulationNorm1d, PopulationNorm2d
from flexnorm.optim import GammaDecay
from flexnorm.statistics import PopulationEstimator, estimate_population


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
    with pytest.warns(NothingDone, match=r"renewed nothing: 0 of 1 norms by the population \(0: BatchNorm1d, another"):
        assert estimate_population(nn.Sequential(nn.BatchNorm1d(2)), torch.zeros(1, 2)) == 0


def test_compiled_models_are_looked_into():
    x = torch.randn(50, 2, 4, 4, dtype=torch.float64)
    model, other = deep(), deep()
    compiled = torch.compile(model, backend="eager")
    compiled(x)  # compiled code does not see hooks that come later
    assert estimate_population(compiled, x) == estimate_population(other, x) == 2
    torch.testing.assert_close(model[5].running_var, other[5].running_var, rtol=0, atol=0)


def test_non_finite_channels_keep_their_statistics():
    norm = PopulationNorm1d(2, statistics="estimated")
    x = torch.randn(10, 2) + 3
    x[0, 1] = float("inf")
    estimate_population(norm, x)
    assert norm.running_mean[1] == 0
    assert norm.running_mean[0] == pytest.approx(float(x[:, 0].mean()))
    norm.reset_running_stats()
    estimate_population(norm, x.flip(0), chunk=5)  # the first chunk alone would be usable
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


def test_chunks_pool_to_the_statistics_of_all():
    x = torch.randn(400, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 1
    whole, parts = deep(), deep()
    estimate_population(whole, x)
    assert estimate_population(parts, x, chunk=150) == 2
    torch.testing.assert_close(parts[1].running_mean, whole[1].running_mean)  # exact in the first layer ...
    torch.testing.assert_close(parts[1].running_var, whole[1].running_var)
    assert not torch.equal(parts[5].running_var, whole[5].running_var)  # ... and of the order of 1/150 behind it
    torch.testing.assert_close(parts[5].running_var, whole[5].running_var, rtol=0.05, atol=0)
    with pytest.raises(ValueError, match="at least 2 samples, whose statistics stand for the pool's, got 1"):
        estimate_population(parts, x, chunk=1)


def test_a_shared_layer_has_the_statistics_of_both_its_calls():
    norm = PopulationNorm1d(3, statistics="estimated", affine=False, eps=0.0).double()
    x = torch.randn(30, 3, dtype=torch.float64) * 2 + 1
    model = nn.Sequential(norm, nn.Linear(3, 3).double(), norm)
    estimate_population(model, x)
    with torch.no_grad():
        inner = model[1]((x - x.mean(0)) / x.std(0, correction=0))
    torch.testing.assert_close(norm.running_mean, torch.cat([x, inner]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.cat([x, inner]).var(0, correction=0))


def test_estimator_as_a_context_counts_forward_passes_in_training_mode():
    x = torch.randn(40, 2, 4, 4, dtype=torch.float64)
    model = deep()
    estimator = PopulationEstimator(model, x, every=2)
    state = torch.get_rng_state()
    with estimator:
        model(x[:5])
        assert (estimator.steps, estimator.renewals) == (1, 1)
        model.eval()(x[:5])
        assert estimator.steps == 1
        model.train()
        model(x[:5])
        model(x[:5])
        assert (estimator.steps, estimator.renewals) == (3, 2)
    model(x[:5])
    assert estimator.steps == 3
    assert torch.equal(torch.get_rng_state(), state)
    file = io.BytesIO()
    torch.save(estimator.state_dict(), file)
    file.seek(0)
    other = PopulationEstimator(deep(), x, every=2)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert (other.steps, other.renewals, other.seconds) == (3, 2, estimator.seconds)


def _train(rank, path, pools, queue):
    """Three steps of data-parallel training, each process with its own batches and its own part of the pool."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    model = deep()
    parallel, optimizer = DistributedDataParallel(model), torch.optim.SGD(model.parameters(), 0.05)
    decay = GammaDecay(model, 16, momentum=1.0)
    x = pools[rank]
    with PopulationEstimator(model, x, every=2, seed=rank) as estimator:
        for step in range(3):
            loss = parallel(x[step * 5 : step * 5 + 5]).square().mean()
            if step == 0:
                decay.update(x)
            loss = loss + decay.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        estimator.renew()
    # numpy arrays: a tensor in a queue is shared memory that ends with its process
    values = {name: value.numpy() for name, value in model.state_dict().items()}
    queue.put((rank, values, estimator.renewals, decay.zeta()["1"].numpy()))
    torch.distributed.barrier()
    torch.distributed.barrier()  # gloo is done with all tensors: its end must not wait for one
    torch.distributed.destroy_process_group()


def test_two_processes_share_their_statistics_and_decay(tmp_path):
    x = torch.randn(30, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pools = (x[:18], x[12:] * 2 + 1)
    context = torch.multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_train, args=(r, tmp_path / "store", pools, queue)) for r in (0, 1)]
    for worker in workers:
        worker.start()
    answers = sorted((queue.get(timeout=60) for _ in workers), key=lambda answer: answer[0])
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    (_, one, renewals, zeta_one), (_, two, _, zeta_two) = answers
    assert renewals == 3
    for name, value in one.items():
        torch.testing.assert_close(torch.tensor(value), torch.tensor(two[name]), msg=name)
    # the statistics are those of both pools under the final weights
    alone = deep()
    alone.load_state_dict({name: torch.tensor(value) for name, value in one.items()})
    estimate_population(alone, torch.cat(pools))
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(value, torch.tensor(one[name]), msg=name)
    # zeta is the mean of what each process finds on its own part
    torch.testing.assert_close(torch.tensor(zeta_one), torch.tensor(zeta_two))
    start = deep()
    estimate_population(start, torch.cat(pools))
    found = []
    for pool in pools:
        decay = GammaDecay(start, 16, momentum=1.0)
        decay.update(pool)
        found.append(decay.zeta()["1"])
    torch.testing.assert_close(torch.tensor(zeta_one), (found[0] + found[1]) / 2)


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
