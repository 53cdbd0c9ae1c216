"""Normalization Propagation (arXiv 1603.01431): normalization by known constants instead of statistics."""

from evenkeel.nn.normprop.activations import ACTIVATIONS, Activation
from evenkeel.nn.normprop.base import NormPropLayer
from evenkeel.nn.normprop.constants import Gains, GaussianMoments, activation_gains, activation_moments
from evenkeel.nn.normprop.conv import NormPropConv1d, NormPropConv2d, NormPropConv3d
from evenkeel.nn.normprop.elementwise import UnitizeSamples, unitize_samples
from evenkeel.nn.normprop.input import NormPropInput
from evenkeel.nn.normprop.linear import NormPropLinear
from evenkeel.nn.normprop.residual import NormPropResidual, normprop_add
from evenkeel.nn.normprop.weights import normalize_weights_, register_unit_norm

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Gains",
    "GaussianMoments",
    "NormPropConv1d",
    "NormPropConv2d",
    "NormPropConv3d",
    "NormPropInput",
    "NormPropLayer",
    "NormPropLinear",
    "NormPropResidual",
    "UnitizeSamples",
    "activation_gains",
    "activation_moments",
    "normalize_weights_",
    "normprop_add",
    "register_unit_norm",
    "unitize_samples",
]
