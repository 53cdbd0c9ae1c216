"""The engine: moments of an activation, a rule on two small tables, one affine pass; what a norm declares of itself."""

from flexnorm.engine.declaration import NORMS, Checked, Norm, constructor_arguments
from flexnorm.engine.functional import Rule, flex_norm, in_one, twin_of
from flexnorm.engine.module import FlexNorm, recomputing
from flexnorm.engine.moments import Moments, Pool, active_group, pool_processes
from flexnorm.engine.segments import Segments
from flexnorm.engine.standardize import standardize_at_once

__all__ = ["NORMS", "Checked", "FlexNorm", "Moments", "Norm", "Pool", "Rule", "Segments", "active_group", "in_one"]
__all__ += ["constructor_arguments", "flex_norm", "pool_processes", "recomputing"]
__all__ += ["standardize_at_once", "twin_of"]
