"""Riemannian optimizers for the scale-invariant weights that normalization creates."""

from evenkeel.optim.adamg import AdamG
from evenkeel.optim.groups import ParamGroups, param_groups
from evenkeel.optim.invariance import InvarianceReport, WeightReport, scale_invariant_weights
from evenkeel.optim.sgdg import SGDG

__all__ = [
    "SGDG",
    "AdamG",
    "InvarianceReport",
    "ParamGroups",
    "WeightReport",
    "param_groups",
    "scale_invariant_weights",
]
