"""The conversion of a whole network: trace, measure, rewrite, and check that the function is the same."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypedDict, Unpack

from torch import fx, nn

from flexnorm._messages import nothing_done, unknown_name
from flexnorm.nn.normprop import DEFAULT_EPS, NormPropConv2d
from flexnorm.probe import Selection, find_places, select_places, unwrap
from flexnorm.surgery._producers import LINEAR
from flexnorm.surgery._reading import RefusedError, is_candidate
from flexnorm.surgery.normprop.graph import Network, Stats
from flexnorm.surgery.normprop.rewrite import Options, Rewriter
from flexnorm.surgery.plan import ConversionPlan, ConversionRow, Difference, difference, first_three, outputs


class NormPropPlan(ConversionPlan):
    """What :func:`flexnorm.convert_to_normprop` would do; prints as a table.

    A :class:`ConversionPlan` with a row per linear map, normalization, activation and sum, in the order of execution.
    In training mode, whose difference is measured too, batch normalization takes the statistics of the batch.
    """


class ConversionArguments(TypedDict, total=False):
    """Keyword arguments of :func:`convert_to_normprop`, which explains them."""

    batches: Iterable[Any] | None
    include: Selection | None
    exclude: Selection | None
    constants: str
    eps: float
    unitize: bool
    border: str
    padding: str


def convert_to_normprop(
    model: nn.Module,
    example_input: Any,
    *,
    batches: Iterable[Any] | None = None,
    include: Selection | None = None,
    exclude: Selection | None = None,
    constants: str = "exact",
    eps: float = DEFAULT_EPS,
    unitize: bool = False,
    border: str = "paper",
    padding: str = "keep",
) -> nn.Module:
    """Turn a trained network into one of Normalization Propagation that computes the same function.

    A layer of Normalization Propagation is a linear map, its normalization and its activation in one. Such layers are
    made out of ``linear map -> normalization -> activation`` (any part of which may be missing) and weighted sums out
    of residual sums; what is not understood stays, and is named in a warning with the reason (:func:`normprop_plan`
    says all that beforehand). The result computes what the model computes in evaluation, in which batch normalization
    is a fixed scale and shift, with values that are standardized in between; from there it may be trained further,
    with any batch size. Names of modules, ``requires_grad``, device, dtype and training flags are kept. A model whose
    forward has to change, as that of residual networks does, comes back as a ``torch.fx.GraphModule``.

    Args:
        model: Any model that ``torch.fx`` can trace. It is not changed.
        example_input: A tensor, a tuple of positional or a mapping of keyword arguments of the model: shows the shape
            of every value, and the result is checked on it.
        batches: A few batches (tensors, tuples whose first element is the input, or mappings) on which mean and
            variance of every value are measured. Without them the running statistics of the normalizations are taken,
            and residual summands to be independent.
        include: Only these layers, as in :func:`flexnorm.probe.select`: a name (with everything below it), a glob
            pattern, ``"re:..."``, a class, a module, a function of (name, module), or a list of these; ``None``: all.
        exclude: Not these layers; takes the same.
        constants: ``"exact"`` or ``"paper"``, as of the NormProp layers, like ``eps``, ``unitize`` and ``border``.
        eps: Added to the exact variance.
        unitize: Divide every sample by its root mean square before each linear map; changes the function.
        border: ``"paper"``, or ``"exact"`` (with ``padding="zeros"``): unit variance at borders too; changes the
            function.
        padding: ``"keep"``: pad with the values that stand for the original's zeros. ``"zeros"``: cheaper by a pass,
            and the function changes at borders.

    Returns:
        The converted copy.

    Raises:
        ValueError: Without an example input, for unknown names, an empty ``batches``, ``include`` or ``exclude`` that
            fit nothing, or a model without anything to convert.
        RuntimeError: If the result computes another function on ``example_input`` than settings promise.

    Warns:
        flexnorm.NothingDone: Nothing was converted, with the reasons.
        UserWarning: Some layers stay, with the reasons.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
        >>> convert_to_normprop(model, torch.randn(2, 3, 8, 8))[0].activation.name
        'relu'
    """
    layer = {"constants": constants, "eps": eps, "unitize": unitize, "border": border}
    new, rows, measured = _converted(model, example_input, batches, include, exclude, padding, **layer)
    refused = [f"{row.name} ({row.source}): {row.reason}" for row in rows if row.status == "refuse"]
    if not any(row.status == "convert" for row in rows):
        stay = [(row.name, row.reason) for row in rows]
        nothing_done(
            "convert_to_normprop(model) changed nothing", "layers", stay, "normprop_plan says the same beforehand."
        )
    elif refused:
        shown = first_three(refused, "normprop_plan")
        warnings.warn(f"{len(refused)} of {len(rows)} layers stay as they are: {shown}", stacklevel=2)
    if padding == "keep" and not unitize and border == "paper" and not measured.preserved:
        raise RuntimeError(f"the converted model computes another function on example_input: {measured}")
    return new


def normprop_plan(model: nn.Module, example_input: Any, **arguments: Unpack[ConversionArguments]) -> NormPropPlan:
    """Say what :func:`convert_to_normprop` would do with the same arguments, without doing it.

    Args:
        model: Any model. It is not changed: not its parameters, buffers, flags, hooks, nor the random state.
        example_input: As of :func:`convert_to_normprop`.
        **arguments: The keyword arguments of :func:`convert_to_normprop`.

    Returns:
        A :class:`NormPropPlan`; ``print`` it.

    Raises:
        ValueError: As of :func:`convert_to_normprop`.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
        >>> plan = normprop_plan(model, torch.randn(2, 3, 8, 8))
        >>> plan["1"].target, plan["3"].reason, plan.evaluation.preserved
        ('(part of 0)', 'no normalization, activation or sum after it', True)
    """
    new, rows, measured = _converted(model, example_input, **arguments)
    training = difference(model, new, example_input, lambda _, __: copy.deepcopy(new).double(), training=True)
    effect = "kept in evaluation" if measured.preserved else "changes"
    rows = [replace(row, effect=effect) if row.status == "convert" else row for row in rows]
    return NormPropPlan(rows, measured, training)


def _converted(
    model: nn.Module,
    example_input: Any,
    batches: Iterable[Any] | None = None,
    include: Selection | None = None,
    exclude: Selection | None = None,
    padding: str = "keep",
    **layer: Any,
) -> tuple[nn.Module, list[ConversionRow], Difference]:
    inner = unwrap(model)
    if example_input is None:
        raise ValueError("conversion needs example_input: an input of the model, to see the shape of every value")
    if padding not in ("keep", "zeros"):
        raise ValueError(unknown_name("padding", padding, ("keep", "zeros")))
    if padding == "keep" and layer.get("border") == "exact":
        raise ValueError("border='exact' rescales the border, padding='keep' keeps it as it was; give padding='zeros'")
    # A wrong value is refused here and not in the middle of the conversion.
    NormPropConv2d(1, 1, 1, **layer)
    places = find_places(inner, lambda m: is_candidate(m) or isinstance(m, LINEAR))
    if not places:
        raise ValueError(f"{type(inner).__name__} has no linear map or normalization that could be converted")
    left = {name for place in places for name in place.names}
    left -= {name for place in select_places(places, include, exclude) for name in place.names}
    options = Options(layer, padding == "keep", lambda name: name not in left)
    # What the model itself raises is the user's to see, not a finding about the conversion.
    outputs(inner, example_input, training=False)
    try:
        stats = {} if batches is None else Network(inner, example_input).measure(batches)
        new, rows = _rewritten(copy.deepcopy(inner), example_input, stats, options)
    except RefusedError as reason:
        rows = [
            ConversionRow(p.name, tuple(p.names), type(p.module).__name__, status="refuse", reason=str(reason))
            for p in places
            if p.name not in left
        ]
        return copy.deepcopy(inner), rows, Difference(0.0, 0.0)
    return (
        new,
        rows,
        difference(
            inner, new, example_input, lambda copied, x: _rewritten(copied, x, stats, options)[0], training=False
        ),
    )


def _rewritten(
    model: nn.Module, example_input: Any, stats: Stats, options: Options
) -> tuple[nn.Module, list[ConversionRow]]:
    """Rewrite in place; what comes back is the model itself, or a graph of its modules where the forward changes."""
    network = Network(model, example_input)
    parents = [(name, m) for name, m in model.named_modules() if next(m.children(), None) is not None]
    hooked = [name for name, m in parents if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks]
    rewriter = Rewriter(network, stats, options)
    rewriter.run()
    if not rewriter.rewired:
        return model, rewriter.rows
    if hooked:
        owners = ", ".join(name or "the model" for name in hooked[:3])
        raise RefusedError(f"its forward has to be rewritten, and the hooks of {owners} would not run")
    network.graph.lint()
    new = fx.GraphModule(model, network.graph, class_name=type(model).__name__)
    # GraphModule starts in training mode; its modules have kept their own flags.
    new.training = model.training
    for name, value in vars(model).items():
        if name not in vars(new) and not inspect.ismethod(value):
            new.__dict__[name] = value
    return new, rewriter.rows
