"""Riemannian optimizers for the scale-invariant weights that normalization creates."""

from flexnorm.optim.diagnostics import SphereMonitor, StepStats
from flexnorm.optim.groups import InvarianceReport, ParamGroups, WeightReport, param_groups, scale_invariant_weights
from flexnorm.optim.manifold import angle
from flexnorm.optim.optimizers import SGDG, AdamG, adamg, sgdg
from flexnorm.optim.projected import SGDP, AdamP
from flexnorm.optim.reference import ReferenceAdamG, ReferenceSGDG
from flexnorm.optim.regularizers import BatchNoise, GammaDecay
from flexnorm.optim.rows import RowLayout, row_axis, to_rows

__all__ = [
    "SGDG",
    "SGDP",
    "AdamG",
    "AdamP",
    "BatchNoise",
    "GammaDecay",
    "InvarianceReport",
    "ParamGroups",
    "ReferenceAdamG",
    "ReferenceSGDG",
    "RowLayout",
    "SphereMonitor",
    "StepStats",
    "WeightReport",
    "adamg",
    "angle",
    "param_groups",
    "row_axis",
    "scale_invariant_weights",
    "sgdg",
    "to_rows",
]
