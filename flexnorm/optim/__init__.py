"""Riemannian optimizers for the scale-invariant weights that normalization creates."""

from flexnorm.optim.diagnostics import SphereMonitor, StepStats
from flexnorm.optim.groups import InvarianceReport, ParamGroups, WeightReport, param_groups, scale_invariant_weights
from flexnorm.optim.manifold import angle
from flexnorm.optim.optimizers import SGDG, AdamG, adamg, sgdg
from flexnorm.optim.projected import SGDP, AdamP
from flexnorm.optim.reference import ReferenceAdamG, ReferenceSGDG
from flexnorm.optim.regularizers import BatchNoise, GammaDecay
from flexnorm.optim.rows import RowLayout, row_axis, to_rows

__all__ = ["SGDG", "SGDP", "AdamG", "AdamP", "ReferenceAdamG", "ReferenceSGDG", "adamg", "sgdg"]
__all__ += ["BatchNoise", "GammaDecay", "SphereMonitor", "StepStats"]
__all__ += ["InvarianceReport", "ParamGroups", "WeightReport", "param_groups", "scale_invariant_weights"]
__all__ += ["RowLayout", "angle", "row_axis", "to_rows"]
