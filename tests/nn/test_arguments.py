"""Arguments that a constructor does not name are refused in the words of the class that was called."""

import copy
import inspect
import pickle

import pytest
from torch import nn

import flexnorm.nn as fx
from flexnorm.engine import FlexNorm
from flexnorm.nn.normprop import NormPropUnits

LAYERS = sorted(
    (cls for _, cls in inspect.getmembers(fx, inspect.isclass) if issubclass(cls, (FlexNorm, NormPropUnits))),
    key=lambda cls: cls.__name__,
)


@pytest.mark.parametrize("layer", LAYERS)
def test_unknown_arguments_name_the_class_and_the_valid_ones(layer: type[nn.Module]) -> None:
    with pytest.raises(TypeError, match=rf"^unknown argument of {layer.__name__} 'bogus'.*Valid: .*eps"):
        layer(4, bogus=1)


@pytest.mark.parametrize(
    ("layer", "sizes", "argument"),
    [
        (fx.LayerNorm2d, (6,), {"process_group": "world"}),
        (fx.RMSNorm2d, (6,), {"bias": False}),
        (fx.FilterResponseNorm2d, (6,), {"process_group": "world"}),
        (fx.LayerNorm2d, (6,), {"momentum": 0.1}),
        (fx.PopulationNorm2d, (6,), {"track_running_stats": False}),
        (fx.NormPropLinear, (6, 4), {"groups": 2}),
    ],
)
def test_arguments_that_mean_nothing_are_refused(layer: type[nn.Module], sizes: tuple, argument: dict) -> None:
    with pytest.raises(TypeError, match=f"unknown argument of {layer.__name__} '{next(iter(argument))}'"):
        layer(*sizes, **argument)


def test_copies_pickles_and_constructors_of_users_are_let_through() -> None:
    layer = fx.UnitizedBatchNorm2d(4, norm="rms")
    assert pickle.loads(pickle.dumps(copy.deepcopy(layer))).unit_norm == "rms"

    class Own(FlexNorm):
        def __init__(self, num_features: int, **kwargs: object) -> None:
            self.power = kwargs.pop("power")
            super().__init__(num_features, **kwargs)

    assert Own(4, power=2).power == 2


def test_both_spellings_of_the_unit_norm_must_agree() -> None:
    assert fx.UnitizedBatchNorm2d(4, unit_norm="rms", norm="rms").unit_norm == "rms"
    with pytest.raises(ValueError, match="norm is the old name of unit_norm"):
        fx.UnitizedBatchNorm2d(4, unit_norm="rms", norm="paper")
