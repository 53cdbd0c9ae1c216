"""Look into a model without leaving a trace: isolation, side forwards, points, one language to select layers."""

from flexnorm.probe.axes import channel_axes, channel_axis, channels_first
from flexnorm.probe.capture import CURVED_LOSSES, ImageTables, Loss, batch_norm_layers, capture
from flexnorm.probe.forward import (
    Look,
    Mode,
    Samples,
    hooked,
    isolated,
    private_randomness,
    side_forward,
    take_points,
    watched,
)
from flexnorm.probe.masks import Mask, Masks
from flexnorm.probe.nested import arguments, batch_inputs, call, detached, first_tensor, map_tensors, tensors
from flexnorm.probe.recognition import NormBehavior, Over, normalizes, recognize, unread_norm
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
    "Mask",
    "Masks",
    "Mode",
    "NormBehavior",
    "Over",
    "Place",
    "Samples",
    "Selection",
    "arguments",
    "batch_inputs",
    "batch_norm_layers",
    "call",
    "capture",
    "channel_axes",
    "channel_axis",
    "channels_first",
    "check_watchable",
    "detached",
    "find_places",
    "first_tensor",
    "hooked",
    "isolated",
    "map_tensors",
    "normalizes",
    "private_randomness",
    "recognize",
    "select",
    "select_layers",
    "select_parameters",
    "select_places",
    "side_forward",
    "take_points",
    "tensors",
    "unread_norm",
    "unwrap",
    "watched",
]
