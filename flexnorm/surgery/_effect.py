"""What a conversion does to the function of a layer, judged by the kinds of layers alone."""

from __future__ import annotations

from torch import Tensor, nn

from flexnorm.surgery._graft import dropped
from flexnorm.surgery._kinds import Source

__all__ = ["canonical", "effect", "notes"]

UNKNOWN = "statistics unknown: recalibrate() before evaluation"

# Their evaluation is that of batch normalization; in training they differ from it.
_LIKE_BATCH_IN_EVALUATION = frozenset({"batch", "population", "renorm"})


def effect(source: Source, new: nn.Module, family: str) -> str:
    """``"kept"``, ``"kept in evaluation"`` or ``"changes"``."""
    old = source.module
    before = canonical(source.family, old, source.features)
    if family == source.family and family in _OPTIONS:
        after = canonical(family, old, source.features)
        if after == family and any(getattr(old, n, None) != getattr(new, n, None) for n in _OPTIONS[family]):
            return "changes"
    else:
        after = canonical(family, new, source.features)
    if getattr(new, "eps", None) != source.config.get("eps") and "none" not in (before, after):
        return "changes"
    if getattr(new, "track_running_stats", False) != source.tracks:
        return "changes"
    if before == after:
        return "kept"
    if {before, after} <= _LIKE_BATCH_IN_EVALUATION and source.tracks:
        return "kept" if source.frozen else "kept in evaluation"
    return "changes"


# Constructor arguments that decide the function of a family.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "unitized": ("unit_norm", "constrain_alpha"),
    "renorm": ("r_max", "d_max", "warmup", "ramp"),
    "population": ("statistics", "gradient", "max_ratio"),
    "group": ("num_groups",),
}


def canonical(family: str, module: nn.Module, features: int) -> str:
    """The simplest family that computes the same function as this layer, with its present parameters."""
    if family == "sync":
        return "batch"
    if family == "unitized" and _all_equal(module._parameters.get("alpha"), 0.0):
        return "batch"
    if family == "batch_instance" and _all_equal(module._parameters.get("gate"), 1.0):
        return "batch"
    if family == "group":
        groups = int(module.num_groups)  # type: ignore[arg-type]
        return "layer" if groups == 1 else "instance" if groups == features else f"group {groups}"
    if family == "instance" and module._buffers.get("running_mean") is not None:
        return "tracking instance"
    return family


def _all_equal(table: Tensor | None, value: float) -> bool:
    if table is None or table.device.type == "meta":
        return table is not None
    return bool((table == value).all())


def notes(source: Source, new: nn.Module, batch_like: bool) -> tuple[str, ...]:
    """What a report should say about the step besides its effect."""
    found = [f"drops {', '.join(names)}"] if (names := dropped(source, new)) else []
    if batch_like and new._buffers.get("running_mean") is not None and not source.tracks:
        found.append(UNKNOWN)
    return tuple(found)
