"""What a user puts into a model: normalization modules as rules of the engine, and Normalization Propagation layers."""

# isort: skip_file
from flexnorm.engine import NORMS
from flexnorm.nn import normprop, reference, rules
from flexnorm.nn.batch import BatchNorm1d, BatchNorm2d, BatchNorm3d
from flexnorm.nn.mean_only import MeanOnlyBatchNorm1d, MeanOnlyBatchNorm2d, MeanOnlyBatchNorm3d
from flexnorm.nn.variance_only import VarianceOnlyBatchNorm1d, VarianceOnlyBatchNorm2d, VarianceOnlyBatchNorm3d
from flexnorm.nn.batch_instance import BatchInstanceNorm1d, BatchInstanceNorm2d, BatchInstanceNorm3d
from flexnorm.nn.factory import TORCH_LAYERS, NoNorm, called_norms, is_norm, make_norm, needs_batch, norm_class
from flexnorm.nn.factory import norm_of, undecayed
from flexnorm.nn.filter_response import FilterResponseNorm1d, FilterResponseNorm2d, FilterResponseNorm3d
from flexnorm.nn.group import GroupNorm
from flexnorm.nn.layer import LayerNorm, LayerNorm1d, LayerNorm2d, LayerNorm3d
from flexnorm.nn.instance import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from flexnorm.nn.normprop import NormPropActivation, NormPropAdd, NormPropConcat, NormPropInput, NormPropLayer
from flexnorm.nn.normprop import NormPropAvgPool1d, NormPropAvgPool2d, NormPropAvgPool3d, NormPropLinear
from flexnorm.nn.normprop import NormPropConv1d, NormPropConv2d, NormPropConv3d, NormPropResidual, NormPropUnits
from flexnorm.nn.normprop import NormPropConvTranspose1d, NormPropConvTranspose2d, NormPropConvTranspose3d
from flexnorm.nn.normprop import NormPropMaxPool1d, NormPropMaxPool2d, NormPropMaxPool3d
from flexnorm.nn.population import PopulationNorm1d, PopulationNorm2d, PopulationNorm3d
from flexnorm.nn.renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from flexnorm.nn.rms import RMSNorm, RMSNorm1d, RMSNorm2d, RMSNorm3d
from flexnorm.nn.switchable import SwitchableNorm1d, SwitchableNorm2d, SwitchableNorm3d
from flexnorm.nn.unitized import UnitizedBatchNorm1d, UnitizedBatchNorm2d, UnitizedBatchNorm3d

__all__ = [
    "NORMS",
    "TORCH_LAYERS",
    "NoNorm",
    "called_norms",
    "is_norm",
    "make_norm",
    "needs_batch",
    "norm_class",
    "norm_of",
]
__all__ += ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "GroupNorm"]
__all__ += ["BatchInstanceNorm1d", "BatchInstanceNorm2d", "BatchInstanceNorm3d"]
__all__ += ["FilterResponseNorm1d", "FilterResponseNorm2d", "FilterResponseNorm3d"]
__all__ += ["InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"]
__all__ += ["LayerNorm", "LayerNorm1d", "LayerNorm2d", "LayerNorm3d"]
__all__ += ["MeanOnlyBatchNorm1d", "MeanOnlyBatchNorm2d", "MeanOnlyBatchNorm3d"]
__all__ += ["NormPropActivation", "NormPropAdd", "NormPropAvgPool1d", "NormPropAvgPool2d", "NormPropAvgPool3d"]
__all__ += ["NormPropConcat", "NormPropConv1d", "NormPropConv2d", "NormPropConv3d", "NormPropConvTranspose1d"]
__all__ += ["NormPropConvTranspose2d", "NormPropConvTranspose3d", "NormPropInput", "NormPropLayer", "NormPropLinear"]
__all__ += ["NormPropMaxPool1d", "NormPropMaxPool2d", "NormPropMaxPool3d", "NormPropResidual", "NormPropUnits"]
__all__ += ["PopulationNorm1d", "PopulationNorm2d", "PopulationNorm3d"]
__all__ += ["BatchRenorm1d", "BatchRenorm2d", "BatchRenorm3d"]
__all__ += ["RMSNorm", "RMSNorm1d", "RMSNorm2d", "RMSNorm3d"]
__all__ += ["SwitchableNorm1d", "SwitchableNorm2d", "SwitchableNorm3d"]
__all__ += ["UnitizedBatchNorm1d", "UnitizedBatchNorm2d", "UnitizedBatchNorm3d"]
__all__ += ["VarianceOnlyBatchNorm1d", "VarianceOnlyBatchNorm2d", "VarianceOnlyBatchNorm3d"]
__all__ += ["normprop", "reference", "rules", "undecayed"]
