"""What a user puts into a model: normalization modules as rules of the engine, and Normalization Propagation layers."""

from flexnorm.nn import normprop, rules
from flexnorm.nn.batch import (
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
from flexnorm.nn.factory import NORMS, NoNorm, is_norm, make_norm, needs_batch
from flexnorm.nn.mixture import (
    BatchInstanceNorm1d,
    BatchInstanceNorm2d,
    BatchInstanceNorm3d,
    SwitchableNorm1d,
    SwitchableNorm2d,
    SwitchableNorm3d,
)
from flexnorm.nn.normprop import *  # noqa: F403
from flexnorm.nn.partial import (
    MeanOnlyBatchNorm1d,
    MeanOnlyBatchNorm2d,
    MeanOnlyBatchNorm3d,
    VarianceOnlyBatchNorm1d,
    VarianceOnlyBatchNorm2d,
    VarianceOnlyBatchNorm3d,
)
from flexnorm.nn.population import PopulationNorm1d, PopulationNorm2d, PopulationNorm3d
from flexnorm.nn.renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from flexnorm.nn.sample import (
    FilterResponseNorm1d,
    FilterResponseNorm2d,
    FilterResponseNorm3d,
    RMSNorm1d,
    RMSNorm2d,
    RMSNorm3d,
)
from flexnorm.nn.unitized import UnitizedBatchNorm1d, UnitizedBatchNorm2d, UnitizedBatchNorm3d

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
