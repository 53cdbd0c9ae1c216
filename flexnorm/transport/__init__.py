"""Wasserstein distances between samples and certified bounds on them: mathematics on tensors, no models."""

from flexnorm.transport.bounds import ShiftBounds, shift_bounds
from flexnorm.transport.distances import wasserstein
from flexnorm.transport.gaussian import gaussian_wasserstein
from flexnorm.transport.moments import moment_lower_bound

__all__ = ["ShiftBounds", "gaussian_wasserstein", "moment_lower_bound", "shift_bounds", "wasserstein"]
