"""Internal covariate shift: Wasserstein distances, certified bounds, and a monitor for any model."""

from evenkeel.shift.bounds import ShiftBounds, shift_bounds
from evenkeel.shift.distances import wasserstein
from evenkeel.shift.gaussian import gaussian_wasserstein
from evenkeel.shift.moments import moment_lower_bound

__all__ = [
    "ShiftBounds",
    "gaussian_wasserstein",
    "moment_lower_bound",
    "shift_bounds",
    "wasserstein",
]
