"""Every function that changes a model says so where there is nothing to change: what it saw, and why it took none."""

import warnings

import pytest
import torch
from torch import nn

import flexnorm
from flexnorm.nn.normprop import coherence_penalty, normalize_weights_, register_unit_norm
from flexnorm.optim import SGDG, AdamG, BatchNoise, GammaDecay, SphereMonitor, param_groups
from flexnorm.statistics import estimate_population


class TheirRMSNorm(nn.Module):
    """As Llama's: a class of its own, over the last axis."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Frozen(nn.Module):
    """As FrozenBatchNorm2d of detectors, under another name of the kind."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - self.running_mean


class TheirFrozenNorm(Frozen):
    """One that is called a norm."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = TheirRMSNorm(4), nn.LayerNorm(4), TheirFrozenNorm(4)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 1e9:  # no trace gets past this
            return x
        return x + self.third(self.down(self.up(self.second(self.first(x))).relu()))


X = torch.randn(6, 4)


def sgdg(model):
    return SGDG(model.parameters(), 0.1, manifold=False)


CALLS = {
    "freeze": (flexnorm.freeze, "freeze.* 0 of 3 norms .first: TheirRMSNorm, keeps none; second: LayerNorm, .*"
               "third: TheirFrozenNorm, has some, in a class"),
    "unfreeze": (flexnorm.unfreeze, "unfreeze.* 0 of 3 norms"),
    "accumulate": (flexnorm.accumulate, "accumulate.* 0 of 3 norms"),
    "estimate_population": (lambda m: estimate_population(m, X), "renewed nothing: 0 of 3 norms by the population"),
    "fold": (flexnorm.fold, "fold.* 0 of 3 norms .first: TheirRMSNorm, .*LayerNorm, normalizes each sample"),
    "convert": (lambda m: flexnorm.convert(m, "torch.batch", include="second"),
                r"convert to torch.batch changed nothing: 0 of 1 norms .second: LayerNorm, torch's batch layer has no"),
    "convert by a function": (lambda m: flexnorm.convert(m, lambda _: None, include="second"), "leaves it"),
    "convert_to_normprop": (lambda m: flexnorm.convert_to_normprop(m, X),
                            "convert_to_normprop.* 0 of 5 layers .first, second, third, up and 1 more: the model"),
    "param_groups": (lambda m: param_groups(m, 0.1, 0.1, 0.0, X), "0 of 2 weights .up.weight, down.weight"),
    "SphereMonitor": (lambda m: SphereMonitor(sgdg(m), m.named_parameters()), "sees nothing: 0 of 7 parameters"),
    "normalize_weights_": (normalize_weights_, "the model has no NormProp layers"),
    "register_unit_norm": (lambda m: register_unit_norm(sgdg(m), m), "the model has no NormProp layers"),
    "coherence_penalty": (coherence_penalty, "is 0: the model has no NormProp layers"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_it_is_said_where_the_user_called(name):
    function, text = CALLS[name]
    model = Block()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.warns(flexnorm.NothingDone, match=text) as caught:
        function(model)
    assert [record.filename for record in caught] == [__file__]
    assert issubclass(flexnorm.NothingDone, UserWarning)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "call",
    [
        lambda m: flexnorm.recalibrate(m, [X]),
        lambda m: GammaDecay(m, 32),
        lambda m: BatchNoise(m, 32),
    ],
)
def test_where_it_is_an_error_it_names_what_was_seen(call):
    with pytest.raises(ValueError, match=r"0 of 3 norms \(.*first.*TheirRMSNorm"):
        call(Block())


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    model(X)
    return model


@pytest.mark.parametrize(
    "call",
    [
        lambda m: flexnorm.freeze(flexnorm.freeze(m)),  # as it should be already: nothing is amiss
        flexnorm.unfreeze,
        lambda m: flexnorm.accumulate(m).close(),
        flexnorm.fold,
        lambda m: flexnorm.convert(m, "torch"),
        lambda m: flexnorm.convert(m, torch.nn.BatchNorm1d),
        lambda m: flexnorm.convert(m, lambda norm: norm),
        lambda m: flexnorm.convert_to_normprop(m, X),
        lambda m: AdamG(param_groups(m, 0.1, 0.1, 0.0, X)),
    ],
)
def test_where_something_is_done_nothing_is_said(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error", flexnorm.NothingDone)
        warnings.filterwarnings("ignore", "1 of 4 layers stay")
        call(network())


def test_frozen_layers_have_no_updates_to_hold_back():
    with pytest.warns(flexnorm.NothingDone, match=r"holds back nothing: 0 of 1 norms \(1: is frozen\)"):
        flexnorm.accumulate(flexnorm.freeze(network()))
    with pytest.warns(flexnorm.NothingDone, match=r"0 of 1 norms \(1: left out by include or exclude\)"):
        flexnorm.freeze(network(), exclude="1")
    with pytest.raises(ValueError, match=r"0 of 1 norms \(1: is frozen\)"):
        flexnorm.recalibrate(flexnorm.freeze(network()), [X])


def test_a_model_that_is_a_norm_of_its_own_is_named():
    with pytest.warns(flexnorm.NothingDone, match=r"0 of 1 norms \(the model itself: BatchNorm1d, track_running"):
        flexnorm.freeze(nn.BatchNorm1d(3, track_running_stats=False))


def test_a_llama_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model, tokens = transformers.LlamaForCausalLM(config).eval(), torch.randint(0, 32, (2, 6))
    for call in (
        flexnorm.freeze,
        lambda m: flexnorm.convert_to_normprop(m, tokens),
        lambda m: param_groups(m, 0.1, 0.1, 0.0, {"input_ids": tokens}),
    ):
        with pytest.warns(flexnorm.NothingDone):
            call(model)
