"""The engine: moments of an activation, a rule on two small tables, one affine pass; what a norm declares of itself."""

from flexnorm.engine.declaration import NORMS, Norm, constructor_arguments
from flexnorm.engine.engine import Rule, flex_norm
from flexnorm.engine.module import FlexNorm
from flexnorm.engine.moments import Moments

__all__ = ["NORMS", "FlexNorm", "Moments", "Norm", "Rule", "constructor_arguments", "flex_norm"]
