"""Internal covariate shift: Wasserstein distances, certified bounds, and a monitor for any model."""

from flexnorm.shift.base import AtSteps, EverySeconds, EverySteps, Logarithmic, Schedule
from flexnorm.shift.layer_bounds import batch_norm_radius, layer_bound, second_moment_excess, unitized_radius
from flexnorm.shift.monitor import ShiftMonitor
from flexnorm.shift.optimization import OptimizationMonitor, OptimizationRecord
from flexnorm.shift.records import (
    CSVSink,
    JSONLSink,
    MemorySink,
    Shift,
    ShiftRecord,
    Sink,
    TensorBoardSink,
    measure_shift,
)
from flexnorm.shift.weights import WeightMonitor, WeightRecord
from flexnorm.transport import ShiftBounds, gaussian_wasserstein, moment_lower_bound, shift_bounds, wasserstein

__all__ = [
    "AtSteps",
    "CSVSink",
    "EverySeconds",
    "EverySteps",
    "JSONLSink",
    "Logarithmic",
    "MemorySink",
    "OptimizationMonitor",
    "OptimizationRecord",
    "Schedule",
    "Shift",
    "ShiftBounds",
    "ShiftMonitor",
    "ShiftRecord",
    "Sink",
    "TensorBoardSink",
    "WeightMonitor",
    "WeightRecord",
    "batch_norm_radius",
    "gaussian_wasserstein",
    "layer_bound",
    "measure_shift",
    "moment_lower_bound",
    "second_moment_excess",
    "shift_bounds",
    "unitized_radius",
    "wasserstein",
]
