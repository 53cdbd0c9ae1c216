"""The conversion of a whole network: trace, measure, rewrite, and check that the function is the same."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import fx, nn

from flexnorm._messages import unknown_name
from flexnorm.nn.normprop import NormPropConv2d
from flexnorm.probe import Selection, find_places, select_places, unwrap
from flexnorm.surgery._compare import Difference, difference, outputs
from flexnorm.surgery._edges import LINEAR
from flexnorm.surgery._kinds import RefusedError, is_candidate
from flexnorm.surgery.plan import ConversionPlan, ConversionRow
from flexnorm.surgery.propagation.rewrite import Options, Rewriter
from flexnorm.surgery.propagation.trace import Stats, measure, shapes, trace

__all__ = ["normprop_plan", "to_normprop"]

PADDINGS = ("keep", "zeros")
_LAYER = ("constants", "eps", "unitize", "border")


def to_normprop(
    model: nn.Module,
    *,
    example_input: Any,
    calibrate: Iterable[Any] | None,
    include: Selection | None,
    exclude: Selection | None,
    settings: Mapping[str, Any],
) -> nn.Module:
    """The conversion to Normalization Propagation; :func:`flexnorm.convert` describes it.

    Raises:
        ValueError: Without an example input, for unknown settings, or if there is nothing to convert.
        RuntimeError: If the result computes another function on the example.
    """
    new, rows, measured = _converted(model, example_input, calibrate, include, exclude, settings)
    _warn(rows)
    if _exact(settings) and not measured.preserved:
        raise RuntimeError(f"the converted model computes another function on example_input: {measured}")
    return new


def normprop_plan(
    model: nn.Module,
    *,
    example_input: Any,
    calibrate: Iterable[Any] | None,
    include: Selection | None,
    exclude: Selection | None,
    settings: Mapping[str, Any],
) -> ConversionPlan:
    """What :func:`to_normprop` would do, and how far the function would be preserved, on copies."""
    new, rows, measured = _converted(model, example_input, calibrate, include, exclude, settings)
    training = difference(model, new, example_input, lambda _, __: copy.deepcopy(new).double(), training=True)
    effect = "kept in evaluation" if measured.preserved else "changes"
    rows = [replace(row, effect=effect) if row.status == "convert" else row for row in rows]
    return ConversionPlan(rows, measured, training)


def _exact(settings: Mapping[str, Any]) -> bool:
    """Whether the settings promise the same function."""
    return settings.get("padding", "keep") == "keep" and not settings.get("unitize") and _border(settings) == "paper"


def _border(settings: Mapping[str, Any]) -> str:
    return str(settings.get("border", "paper"))


def _converted(
    model: nn.Module,
    example_input: Any,
    calibrate: Iterable[Any] | None,
    include: Selection | None,
    exclude: Selection | None,
    settings: Mapping[str, Any],
) -> tuple[nn.Module, list[ConversionRow], Difference]:
    inner = unwrap(model)
    options = _options(inner, example_input, include, exclude, settings)
    # What the model itself raises is the user's to see, not a finding about the conversion.
    outputs(inner, example_input, training=False)
    stats: Stats = {}
    try:
        graph = trace(inner)
        if calibrate is not None:
            known = shapes(inner, graph, example_input)
            stats = measure(inner, graph, [n for n in graph.nodes if n in known and len(known[n]) >= 2], calibrate)
        new, rows = _rewritten(copy.deepcopy(inner), example_input, stats, options)
    except RefusedError as reason:
        rows = [
            ConversionRow(p.name, tuple(p.names), type(p.module).__name__, status="refuse", reason=str(reason))
            for p in find_places(inner, is_candidate)
        ]
        return copy.deepcopy(inner), rows, Difference(0.0, 0.0)

    def change(copied: nn.Module, example: Any) -> nn.Module:
        return _rewritten(copied, example, stats, options)[0]

    return new, rows, difference(inner, new, example_input, change, training=False)


def _options(
    model: nn.Module,
    example_input: Any,
    include: Selection | None,
    exclude: Selection | None,
    settings: Mapping[str, Any],
) -> Options:
    for name in settings:
        if name not in (*_LAYER, "padding"):
            raise TypeError(unknown_name("argument for normprop", name, [*_LAYER, "padding"]))
    if example_input is None:
        raise ValueError("to='normprop' needs example_input: an input of the model, to see the shape of every value")
    padding = settings.get("padding", "keep")
    if padding not in PADDINGS:
        raise ValueError(unknown_name("padding", str(padding), PADDINGS))
    layer = {name: value for name, value in settings.items() if name in _LAYER}
    if padding == "keep" and _border(settings) == "exact":
        raise ValueError("border='exact' rescales the border, padding='keep' keeps it as it was; give padding='zeros'")
    # A wrong value is refused here and not in the middle of the walk.
    NormPropConv2d(1, 1, 1, **layer)
    places = find_places(model, lambda m: is_candidate(m) or isinstance(m, LINEAR))
    if not places:
        raise ValueError(f"{type(model).__name__} has no linear map or normalization that could be converted")
    left = {name for place in places for name in place.names}
    left -= {name for place in select_places(places, include, exclude) for name in place.names}
    return Options(layer, padding == "keep", lambda name: name not in left)


def _rewritten(
    model: nn.Module, example_input: Any, stats: Stats, options: Options
) -> tuple[nn.Module, list[ConversionRow]]:
    """Rewrite in place; what comes back is the model itself, or a graph of its modules where the forward changes."""
    graph = trace(model)
    hooked = [name for name, m in model.named_modules() if next(m.children(), None) is not None and _hooks(m)]
    rewriter = Rewriter(model, graph, shapes(model, graph, example_input), stats, options)
    rewriter.run()
    if not rewriter.rewired:
        return model, rewriter.rows
    if hooked:
        owners = ", ".join(name or "the model" for name in hooked[:3])
        raise RefusedError(f"its forward has to be rewritten, and the hooks of {owners} would not run")
    graph.lint()
    new = fx.GraphModule(model, graph, class_name=type(model).__name__)
    # GraphModule starts in training mode; its modules have kept their own flags.
    new.training = model.training
    for name, value in vars(model).items():
        if name not in vars(new) and not inspect.ismethod(value):
            new.__dict__[name] = value
    return new, rewriter.rows


def _hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _warn(rows: list[ConversionRow]) -> None:
    refused = [row for row in rows if row.status == "refuse"]
    if refused:
        shown = "; ".join(f"{row.name} ({row.source}): {row.reason}" for row in refused[:3])
        more = f"; and {len(refused) - 3} more, see conversion_plan()" if len(refused) > 3 else ""
        warnings.warn(f"{len(refused)} of {len(rows)} layers stay as they are: {shown}{more}", stacklevel=4)
