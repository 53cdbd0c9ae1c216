"""The engine: moments of an activation, a rule on two small tables, one affine pass."""

from evenkeel.flexnorm._native import status as kernels
from evenkeel.flexnorm.engine import Rule, flex_norm
from evenkeel.flexnorm.module import FlexNorm
from evenkeel.flexnorm.moments import Moments

__all__ = ["FlexNorm", "Moments", "Rule", "flex_norm", "kernels"]
