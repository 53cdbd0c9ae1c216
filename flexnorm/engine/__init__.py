"""The engine: moments of an activation, a rule on two small tables, one affine pass."""

from flexnorm.engine.engine import Rule, flex_norm
from flexnorm.engine.module import FlexNorm
from flexnorm.engine.moments import Moments

__all__ = ["FlexNorm", "Moments", "Rule", "flex_norm"]
