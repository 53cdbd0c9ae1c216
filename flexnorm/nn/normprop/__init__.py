"""Normalization Propagation: normalization by constants that follow from the parameters, instead of by statistics.

Paper: Arpit, Zhou, Kota, Govindaraju, "Normalization Propagation: A Parametric Technique for
Removing Internal Covariate Shift in Deep Networks" (ICML 2016, arXiv 1603.01431). The guide is ``docs/normprop.md``.
"""

from flexnorm.nn.normprop.activation import DEFAULT_EPS, NormPropActivation, NormPropUnits, UnitOptions
from flexnorm.nn.normprop.conv import (
    NormPropConv,
    NormPropConv1d,
    NormPropConv2d,
    NormPropConv3d,
    NormPropConvTranspose,
    NormPropConvTranspose1d,
    NormPropConvTranspose2d,
    NormPropConvTranspose3d,
    border_variance,
)
from flexnorm.nn.normprop.elementwise import (
    ACTIVATION_MODULES,
    ACTIVATIONS,
    Activation,
    ChannelAffine,
    UnitizeSamples,
    resolve_activation,
    unitize_samples,
)
from flexnorm.nn.normprop.input import NormPropInput
from flexnorm.nn.normprop.integrals import Gains, GaussianMoments, activation_gains, activation_moments
from flexnorm.nn.normprop.layer import (
    LayerOptions,
    NormPropLayer,
    NormPropLinear,
    length_or_one,
    normalize_weights_,
    register_unit_norm,
)
from flexnorm.nn.normprop.pooling import (
    NormPropAvgPool,
    NormPropAvgPool1d,
    NormPropAvgPool2d,
    NormPropAvgPool3d,
    NormPropMaxPool,
    NormPropMaxPool1d,
    NormPropMaxPool2d,
    NormPropMaxPool3d,
    average_pool_variance,
    max_pool_moments,
    window_correlation,
)
from flexnorm.nn.normprop.propagate import (
    CanonicalError,
    LayerPropagation,
    PropagationReport,
    canonical_error,
    coherence_penalty,
    propagate,
)
from flexnorm.nn.normprop.residual import NormPropAdd, NormPropConcat, NormPropResidual, normprop_add

__all__ = ["ACTIVATIONS", "ACTIVATION_MODULES", "DEFAULT_EPS", "Activation", "CanonicalError", "ChannelAffine"]
__all__ += ["Gains", "GaussianMoments", "LayerOptions", "LayerPropagation", "NormPropActivation", "NormPropAdd"]
__all__ += ["NormPropAvgPool", "NormPropAvgPool1d", "NormPropAvgPool2d", "NormPropAvgPool3d", "NormPropConcat"]
__all__ += ["NormPropConv", "NormPropConv1d", "NormPropConv2d", "NormPropConv3d", "NormPropConvTranspose"]
__all__ += ["NormPropConvTranspose1d", "NormPropConvTranspose2d", "NormPropConvTranspose3d", "NormPropInput"]
__all__ += ["NormPropLayer", "NormPropLinear", "NormPropMaxPool", "NormPropMaxPool1d", "NormPropMaxPool2d"]
__all__ += ["NormPropMaxPool3d", "NormPropResidual", "NormPropUnits", "PropagationReport", "UnitOptions"]
__all__ += ["UnitizeSamples", "activation_gains", "activation_moments", "average_pool_variance", "border_variance"]
__all__ += ["canonical_error", "coherence_penalty", "length_or_one", "max_pool_moments", "normalize_weights_"]
__all__ += ["normprop_add", "propagate", "register_unit_norm", "resolve_activation", "unitize_samples"]
__all__ += ["window_correlation"]
