"""What a user puts into a model: normalization modules as rules of the engine, and Normalization Propagation layers."""

from evenkeel.nn import normprop, rules
from evenkeel.nn.batch import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm1d,
    LayerNorm2d,
    LayerNorm3d,
)
from evenkeel.nn.factory import NORMS, NoNorm, is_norm, make_norm, needs_batch
from evenkeel.nn.normprop import *  # noqa: F403
from evenkeel.nn.population import PopulationNorm1d, PopulationNorm2d, PopulationNorm3d
from evenkeel.nn.unitized import UnitizedBatchNorm1d, UnitizedBatchNorm2d, UnitizedBatchNorm3d

__all__ = [
    "NORMS",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm1d",
    "LayerNorm2d",
    "LayerNorm3d",
    "NoNorm",
    "PopulationNorm1d",
    "PopulationNorm2d",
    "PopulationNorm3d",
    "UnitizedBatchNorm1d",
    "UnitizedBatchNorm2d",
    "UnitizedBatchNorm3d",
    "is_norm",
    "make_norm",
    "needs_batch",
    "normprop",
    "rules",
    *normprop.__all__,
]
