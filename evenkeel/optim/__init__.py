"""Riemannian optimizers for the scale-invariant weights that normalization creates."""

from evenkeel.optim.adamg import AdamG, adamg
from evenkeel.optim.diagnostics import SphereMonitor, StepStats
from evenkeel.optim.groups import ParamGroups, param_groups
from evenkeel.optim.invariance import InvarianceReport, WeightReport, scale_invariant_weights
from evenkeel.optim.projected import SGDP, AdamP
from evenkeel.optim.reference import ReferenceAdamG, ReferenceSGDG
from evenkeel.optim.sgdg import SGDG, sgdg

__all__ = [
    "SGDG",
    "SGDP",
    "AdamG",
    "AdamP",
    "InvarianceReport",
    "ParamGroups",
    "ReferenceAdamG",
    "ReferenceSGDG",
    "SphereMonitor",
    "StepStats",
    "WeightReport",
    "adamg",
    "param_groups",
    "scale_invariant_weights",
    "sgdg",
]
