"""Riemannian optimizers for the scale-invariant weights that normalization creates."""

from flexnorm.optim.adamg import AdamG, adamg
from flexnorm.optim.batch_noise import BatchNoise
from flexnorm.optim.diagnostics import SphereMonitor, StepStats
from flexnorm.optim.gamma_decay import GammaDecay
from flexnorm.optim.groups import ParamGroups, param_groups
from flexnorm.optim.invariance import InvarianceReport, WeightReport, scale_invariant_weights
from flexnorm.optim.manifold import angle
from flexnorm.optim.projected import SGDP, AdamP
from flexnorm.optim.reference import ReferenceAdamG, ReferenceSGDG
from flexnorm.optim.rows import RowLayout, row_axis, to_rows
from flexnorm.optim.sgdg import SGDG, sgdg

__all__ = ["SGDG", "SGDP", "AdamG", "AdamP", "ReferenceAdamG", "ReferenceSGDG", "adamg", "sgdg"]
__all__ += ["BatchNoise", "GammaDecay", "SphereMonitor", "StepStats"]
__all__ += ["InvarianceReport", "ParamGroups", "WeightReport", "param_groups", "scale_invariant_weights"]
__all__ += ["RowLayout", "angle", "row_axis", "to_rows"]
