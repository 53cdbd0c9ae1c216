"""The engine: moments of an activation, a rule on two small tables, one affine pass."""

from flexnorm.engine.engine import Rule, flex_norm
from flexnorm.engine.module import FlexNorm, recomputing
from flexnorm.engine.moments import Moments
from flexnorm.engine.pool import Pool, active_group, pool_processes

__all__ = ["FlexNorm", "Moments", "Pool", "Rule", "active_group", "flex_norm", "pool_processes", "recomputing"]
