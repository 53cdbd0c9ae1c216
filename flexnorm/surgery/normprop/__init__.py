"""Conversion of trained networks to Normalization Propagation."""

from flexnorm.surgery.normprop.convert import NormPropPlan, convert_to_normprop, normprop_plan

__all__ = ["NormPropPlan", "convert_to_normprop", "normprop_plan"]
