"""Look into a model without leaving a trace: isolation, side forwards, points, one language to select layers."""

from flexnorm.probe.capture import CURVED_LOSSES, ImageTables, Loss, batch_norm_layers, capture
from flexnorm.probe.forward import Look, Mode, side_forward
from flexnorm.probe.isolate import isolated, private_randomness
from flexnorm.probe.nested import arguments, batch_inputs, call, detached, first_tensor, map_tensors, tensors
from flexnorm.probe.points import Samples, channel_axis, take_points
from flexnorm.probe.select import (
    Place,
    Selection,
    check_watchable,
    find_places,
    select,
    select_layers,
    select_parameters,
    select_places,
    unwrap,
)

__all__ = [
    "CURVED_LOSSES",
    "ImageTables",
    "Look",
    "Loss",
    "Mode",
    "Place",
    "Samples",
    "Selection",
    "arguments",
    "batch_inputs",
    "batch_norm_layers",
    "call",
    "capture",
    "channel_axis",
    "check_watchable",
    "detached",
    "find_places",
    "first_tensor",
    "isolated",
    "map_tensors",
    "private_randomness",
    "select",
    "select_layers",
    "select_parameters",
    "select_places",
    "side_forward",
    "take_points",
    "tensors",
    "unwrap",
]
