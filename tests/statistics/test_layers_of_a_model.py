"""Which layers have statistics, what these average, and which variance they keep: read from the norm's declaration."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import flexnorm.nn as fx
from flexnorm import FlexNorm
from flexnorm.statistics import has_statistics
from flexnorm.statistics.recalibrate import kept, new_pool, of_population, watching


class OwnSampleNorm(FlexNorm):
    """Declares what a newcomer's norm would."""

    statistics_from = "sample"


class OwnPopulationNorm(FlexNorm):
    """The same for the population."""

    statistics_from = "population"


BATCH, SAMPLE, POPULATION = (True, False), (False, False), (True, True)
KINDS = [
    (lambda: nn.BatchNorm2d(3), BATCH),
    (lambda: nn.SyncBatchNorm(3), BATCH),
    (lambda: nn.InstanceNorm2d(3, track_running_stats=True), SAMPLE),
    (lambda: fx.BatchNorm2d(3), BATCH),
    (lambda: fx.UnitizedBatchNorm2d(3), BATCH),
    (lambda: fx.SwitchableNorm2d(3), BATCH),
    (lambda: fx.InstanceNorm2d(3, track_running_stats=True), SAMPLE),
    (lambda: fx.PopulationNorm2d(3), POPULATION),
    (lambda: FlexNorm(3), BATCH),
    (lambda: OwnSampleNorm(3), SAMPLE),
    (lambda: OwnPopulationNorm(3), POPULATION),
]


@pytest.mark.parametrize(("build", "expected"), KINDS)
def test_a_norm_says_what_it_keeps(build, expected) -> None:
    layer, x = build(), torch.randn(4, 3, 2, 2)
    between, biased = expected
    assert has_statistics(layer)
    assert of_population(layer) == biased
    pool = new_pool(layer)
    assert pool.between == between
    pool.add_values(x)
    mean, var = kept(layer, pool)
    torch.testing.assert_close(mean.float(), x.mean((0, 2, 3)))
    whole = x.var((0, 2, 3), correction=0 if biased else 1)
    torch.testing.assert_close(var.float(), whole if between else x.var((2, 3)).mean(0))


def test_layers_without_statistics() -> None:
    for layer in (nn.BatchNorm2d(3, track_running_stats=False), nn.GroupNorm(1, 3), fx.GroupNorm(1, 3), nn.ReLU()):
        assert not has_statistics(layer)


def test_inputs_are_shown_with_a_batch_axis_and_hooks_go_even_after_an_error() -> None:
    layer, shapes = nn.InstanceNorm1d(3, track_running_stats=True), []
    for x in (torch.randn(3, 7), torch.randn(2, 3, 7)):
        with watching([layer], lambda _, values: shapes.append(tuple(values.x.shape))):
            layer(x)
    with (
        pytest.raises(ValueError, match="expected"),
        watching([layer], lambda _, values: shapes.append(tuple(values.x.shape))),
    ):
        layer(torch.randn(1, 2, 3, 7))
    assert shapes == [(1, 3, 7), (2, 3, 7), (1, 2, 3, 7)]
    assert not layer._forward_pre_hooks
