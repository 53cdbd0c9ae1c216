"""Normalization Propagation: normalization by constants that follow from the parameters, instead of by statistics.

Paper: Arpit, Zhou, Kota, Govindaraju, "Normalization Propagation: A Parametric Technique for
Removing Internal Covariate Shift in Deep Networks" (ICML 2016, arXiv 1603.01431). The guide is ``docs/normprop.md``.
"""

from flexnorm.nn.normprop.activation import NormPropActivation
from flexnorm.nn.normprop.activations import ACTIVATIONS, Activation
from flexnorm.nn.normprop.base import NormPropLayer
from flexnorm.nn.normprop.border import border_variance
from flexnorm.nn.normprop.coherence import CanonicalError, canonical_error, coherence_penalty
from flexnorm.nn.normprop.constants import Gains, GaussianMoments, activation_gains, activation_moments
from flexnorm.nn.normprop.conv import NormPropConv1d, NormPropConv2d, NormPropConv3d
from flexnorm.nn.normprop.conv_transpose import (
    NormPropConvTranspose1d,
    NormPropConvTranspose2d,
    NormPropConvTranspose3d,
)
from flexnorm.nn.normprop.elementwise import UnitizeSamples, unitize_samples
from flexnorm.nn.normprop.input import NormPropInput
from flexnorm.nn.normprop.linear import NormPropLinear
from flexnorm.nn.normprop.pooling import (
    NormPropAvgPool1d,
    NormPropAvgPool2d,
    NormPropAvgPool3d,
    NormPropMaxPool1d,
    NormPropMaxPool2d,
    NormPropMaxPool3d,
    average_pool_variance,
    max_pool_moments,
    window_correlation,
)
from flexnorm.nn.normprop.propagate import LayerPropagation, PropagationReport, propagate
from flexnorm.nn.normprop.residual import NormPropAdd, NormPropConcat, NormPropResidual, normprop_add
from flexnorm.nn.normprop.units import NormPropUnits
from flexnorm.nn.normprop.weights import normalize_weights_, register_unit_norm

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "CanonicalError",
    "Gains",
    "GaussianMoments",
    "LayerPropagation",
    "NormPropActivation",
    "NormPropAdd",
    "NormPropAvgPool1d",
    "NormPropAvgPool2d",
    "NormPropAvgPool3d",
    "NormPropConcat",
    "NormPropConv1d",
    "NormPropConv2d",
    "NormPropConv3d",
    "NormPropConvTranspose1d",
    "NormPropConvTranspose2d",
    "NormPropConvTranspose3d",
    "NormPropInput",
    "NormPropLayer",
    "NormPropLinear",
    "NormPropMaxPool1d",
    "NormPropMaxPool2d",
    "NormPropMaxPool3d",
    "NormPropResidual",
    "NormPropUnits",
    "PropagationReport",
    "UnitizeSamples",
    "activation_gains",
    "activation_moments",
    "average_pool_variance",
    "border_variance",
    "canonical_error",
    "coherence_penalty",
    "max_pool_moments",
    "normalize_weights_",
    "normprop_add",
    "propagate",
    "register_unit_norm",
    "unitize_samples",
    "window_correlation",
]
