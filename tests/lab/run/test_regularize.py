import dataclasses

import pytest
import torch

from flexnorm.lab.run import Config, compare, train_run
from flexnorm.lab.run.loop import build_model
from flexnorm.lab.run.optimizers import StepHooks
from flexnorm.nn.normprop import coherence_penalty
from flexnorm.optim import GammaDecay

ADAPTIVE = {"coefficient": "adaptive", "batch_size": 8, "every": 2}


def hooks(config: Config, images, norm: str, **changes):
    config = dataclasses.replace(config, norms=(norm,), **changes)
    torch.manual_seed(0)
    model = build_model(config, images, norm)
    return model, StepHooks(config, model, images.x_train, seed=3)


def test_nothing_is_added_by_default(small, images):
    model, none = hooks(small, images, "batch")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    none.before(images.x_train[:8])
    none.after(torch.optim.SGD(model.parameters(), lr=1.0))
    assert none.penalty() is None
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_penalties_are_those_of_their_definitions(small, images):
    model, decay = hooks(small, images, "batch", gamma_decay={"coefficient": 0.5})
    torch.testing.assert_close(decay.penalty(), torch.tensor(0.5 * (4 + 8)))
    model, both = hooks(small, images, "normprop", gamma_decay={"coefficient": 0.5}, coherence=2.0)
    gammas = sum(float(layer.gamma.detach().square().sum()) for layer in model.modules() if hasattr(layer, "gamma"))
    torch.testing.assert_close(both.penalty(), 2 * coherence_penalty(model) + 0.5 * gammas)


def test_adaptive_decay_follows_its_schedule_and_draws_no_common_random_number(small, images):
    model, ours = hooks(small, images, "population", gamma_decay=ADAPTIVE)
    reference = GammaDecay(model, 8, seed=3)
    state = torch.get_rng_state()
    for step in range(3):
        x = images.x_train[8 * step : 8 * step + 8]
        ours.before(x)
        if step % 2 == 0:
            reference.update(x)
    assert torch.equal(state, torch.get_rng_state())
    assert float(reference.penalty().detach()) > 0
    torch.testing.assert_close(ours.penalty(), reference.penalty())


@pytest.mark.parametrize("norm", ["batch", "normprop"])
def test_decoupled_decay_shrinks_gamma_at_the_learning_rate_of_its_group(small, images, norm):
    model, decay = hooks(small, images, norm, gamma_decay={"coefficient": 0.5, "decoupled": True})
    gammas = [
        p
        for name, p in model.named_parameters()
        if name.endswith("norm.gamma" if norm == "normprop" else "norm.weight")
    ]
    rest = [p for p in model.parameters() if not any(p is gamma for gamma in gammas)]
    before = [gamma.detach().clone() for gamma in gammas]
    optimizer = torch.optim.SGD([{"params": rest, "lr": 7.0}, {"params": gammas, "lr": 0.1}])
    decay.after(optimizer)
    assert decay.penalty() is None
    assert len(gammas) == 2
    for old, new in zip(before, gammas, strict=True):
        torch.testing.assert_close(new.detach(), 0.9 * old)
    # momentum 0.5 adds the steps of a penalty up to twice one of them
    decay.after(torch.optim.SGD([{"params": rest, "lr": 7.0}, {"params": gammas, "lr": 0.1}], momentum=0.5))
    for old, new in zip(before, gammas, strict=True):
        torch.testing.assert_close(new.detach(), 0.9 * 0.8 * old)


def test_statistics_are_those_of_the_weights_that_are_evaluated(small, images):
    arguments = {"norm_args": {"population": {"statistics": "estimated"}}, "estimate": {"every": 99, "samples": 10_000}}
    model, ours = hooks(small, images, "population", **arguments)
    other, chunked = hooks(small, images, "population", **arguments | {"estimate": {"samples": 10_000, "chunk": 48}})
    layers = [[m for m in net.modules() if hasattr(m, "running_mean")] for net in (model, other)]
    ours.before(images.x_train[:8])
    before = layers[0][0].running_mean.clone()
    for net in (model, other):
        with torch.no_grad():
            next(p for p in net.parameters() if p.ndim == 4).add_(0.1)
    ours.before_evaluation()
    chunked.before_evaluation()
    assert not torch.allclose(layers[0][0].running_mean, before)
    seen = []
    layers[0][0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.eval()(images.x_train)
    torch.testing.assert_close(layers[0][0].running_mean, seen[0].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layers[1][0].running_mean, layers[0][0].running_mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("norm", "changes", "message"),
    [
        ("normprop", {"gamma_decay": {"coefficient": "adaptive"}}, "give gamma_decay a number as coefficient"),
        ("none", {"gamma_decay": {"coefficient": 0.1}}, "no layer with a scale"),
        ("batch", {"coherence": 0.1}, "coherence is a penalty on layers of Normalization Propagation"),
    ],
)
def test_what_does_not_apply_is_said_before_the_first_run(small, images, tmp_path, norm, changes, message):
    with pytest.raises(ValueError, match=message):
        compare(dataclasses.replace(small, norms=(norm,), **changes), tmp_path / "out", data=images)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("norm", "changes"),
    [
        ("population", {"gamma_decay": ADAPTIVE}),
        ("population", {"gamma_decay": {**ADAPTIVE, "decoupled": True}}),
        (
            "population",
            {"norm_args": {"population": {"statistics": "estimated"}}, "estimate": {"every": 3, "samples": 20}},
        ),
        ("normprop", {"gamma_decay": {"coefficient": 0.01}, "coherence": 0.1}),
    ],
)
def test_regularized_runs_resume_bit_for_bit(one, images, tmp_path, summaries, norm, changes):
    config = dataclasses.replace(one, norms=(norm,), epochs=3, **changes)
    train_run(config, images, tmp_path / "a" / "runs" / norm / "sgd" / "seed0")

    def stop(epoch):
        if epoch.epoch == 1:
            raise KeyboardInterrupt

    folder = tmp_path / "b" / "runs" / norm / "sgd" / "seed0"
    with pytest.raises(KeyboardInterrupt):
        train_run(config, images, folder, on_epoch=stop)
    train_run(config, images, folder)
    assert summaries(tmp_path / "a") == summaries(tmp_path / "b")
    plain = dataclasses.replace(config, gamma_decay={}, coherence=0.0, norm_args={}, estimate={})
    train_run(plain, images, tmp_path / "c" / "runs" / norm / "sgd" / "seed0")
    assert summaries(tmp_path / "c") != summaries(tmp_path / "a")
