"""Internal covariate shift: Wasserstein distances, certified bounds, and a monitor for any model."""

from evenkeel.shift.bounds import ShiftBounds, shift_bounds
from evenkeel.shift.distances import wasserstein
from evenkeel.shift.gaussian import gaussian_wasserstein
from evenkeel.shift.layer_bounds import batch_norm_radius, layer_bound, statistics_noise, unitized_radius
from evenkeel.shift.moments import moment_lower_bound
from evenkeel.shift.monitor import ShiftMonitor
from evenkeel.shift.optimization import OptimizationMonitor, OptimizationRecord
from evenkeel.shift.records import Shift, ShiftRecord, measure_shift
from evenkeel.shift.schedules import AtSteps, EverySeconds, EverySteps, Logarithmic, Schedule
from evenkeel.shift.sinks import CSVSink, JSONLSink, MemorySink, Sink, TensorBoardSink
from evenkeel.shift.weights import WeightMonitor, WeightRecord

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
    "shift_bounds",
    "statistics_noise",
    "unitized_radius",
    "wasserstein",
]
