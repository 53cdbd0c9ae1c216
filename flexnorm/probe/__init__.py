"""Look into a model without leaving a trace: isolation, side forwards, points, one language to select layers."""

from flexnorm.probe.forward import Look, Mode, call, detached, side_forward
from flexnorm.probe.isolate import isolated, private_randomness
from flexnorm.probe.points import Samples, channel_axis, choose_rows, count_points, first_tensor, take_points
from flexnorm.probe.select import Layers, check_watchable, select_layers, unwrap

__all__ = [
    "Layers",
    "Look",
    "Mode",
    "Samples",
    "call",
    "channel_axis",
    "check_watchable",
    "choose_rows",
    "count_points",
    "detached",
    "first_tensor",
    "isolated",
    "private_randomness",
    "select_layers",
    "side_forward",
    "take_points",
    "unwrap",
]
