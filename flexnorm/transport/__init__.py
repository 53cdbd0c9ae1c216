"""Wasserstein distances between sets of points and certified bounds on them: mathematics on tensors, no models."""

from flexnorm.transport.bounds import ShiftBounds, shift_bounds
from flexnorm.transport.distances import wasserstein
from flexnorm.transport.gaussian import gaussian_wasserstein
from flexnorm.transport.inequalities import moment_lower_bound
from flexnorm.transport.pair import safe_norm

__all__ = ["ShiftBounds", "gaussian_wasserstein", "moment_lower_bound", "safe_norm", "shift_bounds", "wasserstein"]
