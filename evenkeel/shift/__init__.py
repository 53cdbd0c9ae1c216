"""Internal covariate shift: Wasserstein distances, certified bounds, and a monitor for any model."""

from evenkeel.shift.bounds import ShiftBounds, shift_bounds
from evenkeel.shift.distances import wasserstein
from evenkeel.shift.gaussian import gaussian_wasserstein
from evenkeel.shift.moments import moment_lower_bound
from evenkeel.shift.monitor import ShiftMonitor
from evenkeel.shift.records import Shift, ShiftRecord, measure_shift
from evenkeel.shift.schedules import AtSteps, EverySeconds, EverySteps, Logarithmic, Schedule
from evenkeel.shift.sinks import CSVSink, JSONLSink, MemorySink, Sink, TensorBoardSink

__all__ = [
    "AtSteps",
    "CSVSink",
    "EverySeconds",
    "EverySteps",
    "JSONLSink",
    "Logarithmic",
    "MemorySink",
    "Schedule",
    "Shift",
    "ShiftBounds",
    "ShiftMonitor",
    "ShiftRecord",
    "Sink",
    "TensorBoardSink",
    "gaussian_wasserstein",
    "measure_shift",
    "moment_lower_bound",
    "shift_bounds",
    "wasserstein",
]
