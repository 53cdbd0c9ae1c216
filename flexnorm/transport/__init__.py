"""Wasserstein distances between sets of points and certified bounds on them: mathematics on tensors, no models."""

from flexnorm.transport.bounds import ShiftBounds, moment_lower_bound, shift_bounds
from flexnorm.transport.distances import gaussian_wasserstein, wasserstein
from flexnorm.transport.pair import safe_norm

__all__ = ["ShiftBounds", "gaussian_wasserstein", "moment_lower_bound", "safe_norm", "shift_bounds", "wasserstein"]
