"""Every norm, and every option of it, from a config; a norm declared elsewhere is one like the others."""

import dataclasses

import pytest
import torch
from norm_options import OPTIONS, OTHER, declared_for_now

from flexnorm.engine import FlexNorm, Norm
from flexnorm.lab.models import norm_names
from flexnorm.lab.profile import profile
from flexnorm.lab.run import Config, compare
from flexnorm.lab.run.loop import build_model
from flexnorm.nn import UnitizedBatchNorm2d


@pytest.fixture
def half():
    """A norm of our own, declared for the time of a test."""

    with declared_for_now():

        class HalfNorm2d(FlexNorm):
            """Divide by the batch's standard deviation to some power."""

            ndims = (4,)
            norm_name = "half"
            options = ("eps", "power")

            def __init__(self, num_features, power=0.5, **kwargs):
                super().__init__(num_features, **kwargs)
                self.power = power

            def rule(self, moments):
                mean, var = self.batch_or_running(moments)
                scale = self.weight * (var + self.eps).pow(-self.power / 2)
                return scale, self.bias - scale * mean

        yield HalfNorm2d


@pytest.mark.parametrize("option", ["unit_norm", "norm"])
def test_options_of_a_norm_from_a_config(small, images, option):
    config = Config.from_dict({**small.as_dict(), "norms": ["unitized"], "norm_args": {"unitized": {option: "rms"}}})
    model = build_model(config, images, "unitized")
    assert {m.unit_norm for m in model.modules() if isinstance(m, UnitizedBatchNorm2d)} == {"rms"}


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_every_option_that_a_norm_declares_from_a_config(small, images, name, option):
    config = dataclasses.replace(small, norms=(name,), norm_args={name: {option: OTHER[option]}})
    layers = [m for m in build_model(config, images, name).modules() if isinstance(m, Norm)]
    assert {getattr(layer, option) for layer in layers} == {OTHER[option]}


def test_a_norm_declared_elsewhere_is_compared_and_profiled(small, images, tmp_path, half):
    assert "half" in norm_names()
    config = dataclasses.replace(
        small, norms=("batch", "half"), norm_args={"half": {"power": 0.9}}, optims={"sgd": {}}, augment=("flip",)
    )
    own = compare(config, tmp_path, data=images).cells[1]
    assert (own.norm, len(own.complete)) == ("half", 1)
    assert own.difference.n == 1
    assert {m.power for m in build_model(config, images, "half").modules() if isinstance(m, half)} == {0.9}
    result = profile("convnet", images, norm="half", steps=4, measurements=2, batch_size=16, population=32)
    assert [row.kind for row in result.layers] == ["HalfNorm2d"] * 3
    assert all(row.mixes_batch and row.noise > 0 for row in result.layers)


def test_it_is_unknown_where_it_is_not_declared(small):
    with pytest.raises(ValueError, match="unknown norm 'half'"):
        dataclasses.replace(small, norms=("half",))
    assert torch.is_grad_enabled()
