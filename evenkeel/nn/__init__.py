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
from evenkeel.nn.mixture import (
    BatchInstanceNorm1d,
    BatchInstanceNorm2d,
    BatchInstanceNorm3d,
    SwitchableNorm1d,
    SwitchableNorm2d,
    SwitchableNorm3d,
)
from evenkeel.nn.normprop import *  # noqa: F403
from evenkeel.nn.partial import (
    MeanOnlyBatchNorm1d,
    MeanOnlyBatchNorm2d,
    MeanOnlyBatchNorm3d,
    VarianceOnlyBatchNorm1d,
    VarianceOnlyBatchNorm2d,
    VarianceOnlyBatchNorm3d,
)
from evenkeel.nn.population import PopulationNorm1d, PopulationNorm2d, PopulationNorm3d
from evenkeel.nn.renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from evenkeel.nn.sample import (
    FilterResponseNorm1d,
    FilterResponseNorm2d,
    FilterResponseNorm3d,
    RMSNorm1d,
    RMSNorm2d,
    RMSNorm3d,
)
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
    "BatchInstanceNorm1d",
    "BatchInstanceNorm2d",
    "BatchInstanceNorm3d",
    "SwitchableNorm1d",
    "SwitchableNorm2d",
    "SwitchableNorm3d",
    "MeanOnlyBatchNorm1d",
    "MeanOnlyBatchNorm2d",
    "MeanOnlyBatchNorm3d",
    "VarianceOnlyBatchNorm1d",
    "VarianceOnlyBatchNorm2d",
    "VarianceOnlyBatchNorm3d",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "FilterResponseNorm1d",
    "FilterResponseNorm2d",
    "FilterResponseNorm3d",
    "RMSNorm1d",
    "RMSNorm2d",
    "RMSNorm3d",
    "is_norm",
    "make_norm",
    "needs_batch",
    "normprop",
    "rules",
    *normprop.__all__,
]
