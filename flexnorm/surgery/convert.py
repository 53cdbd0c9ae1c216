"""Exchange the normalization layers of any model, with a report of what happens to each of them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flexnorm._messages import nothing_done
from flexnorm.engine import Norm
from flexnorm.nn import NormPropUnits
from flexnorm.probe import Place, Selection, find_places, select_places
from flexnorm.surgery._graft import UNKNOWN, effect, final_class, graft, graft_hooks, move_tensors, notes
from flexnorm.surgery._reading import RefusedError, Source, axes_of, common_ndim, is_candidate, read, restored
from flexnorm.surgery._targets import Target, To, resolve
from flexnorm.surgery.plan import ConversionPlan, ConversionRow, difference, first_three, outputs


@dataclass
class _Step:
    place: Place
    row: ConversionRow
    source: Source | None = None
    new: nn.Module | None = None
    fits: bool = False  # as it is: it is what was asked for, or a user's function has returned it


def conversion_plan(
    model: nn.Module,
    to: To,
    *,
    include: Selection | None = None,
    exclude: Selection | None = None,
    example_input: Any = None,
    **kwargs: Any,
) -> ConversionPlan:
    """Say what :func:`convert` would do with the same arguments, without doing it.

    Args:
        model: Any model. It is not changed: not its parameters, buffers, counters, flags, hooks, nor the random state.
        to: As of :func:`convert`.
        include: As of :func:`convert`.
        exclude: As of :func:`convert`.
        example_input: A tensor, a tuple of positional or a mapping of keyword arguments of the model. The report then
            says whether the function is preserved: the largest difference of the outputs before and after, in
            evaluation and in training mode, measured on copies.
        **kwargs: As of :func:`convert`.

    Returns:
        A :class:`ConversionPlan`; ``print`` it.

    Raises:
        ValueError: As of :func:`convert`.
        TypeError: As of :func:`convert`.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> plan = conversion_plan(model, "unitized", example_input=torch.randn(2, 3, 8, 8))
        >>> plan.preserved, plan["1"].target
        (True, 'UnitizedBatchNorm2d')
        >>> print(conversion_plan(model, "group", num_groups=2))
        layer  is           becomes    function  remarks
        1      BatchNorm2d  GroupNorm  changes   drops running statistics
        <BLANKLINE>
        1 converted, 0 kept, 0 refused
    """
    target = resolve(to, kwargs)
    if example_input is not None:
        # What the model itself raises is the user's to see, not a finding about the conversion.
        outputs(model, example_input, training=False)
    chosen = _chosen(model, include, exclude)
    rows = [step.row for step in _steps(model, target, chosen, example_input, dry=True)]
    if example_input is None:
        return ConversionPlan(rows)

    def change(copied: nn.Module, example: Any) -> nn.Module:
        return _apply(copied, _steps(copied, target, chosen, example), target)

    other = change(copy.deepcopy(model), example_input)
    measured = [difference(model, other, example_input, change, training=mode) for mode in (False, True)]
    return ConversionPlan(rows, *measured)


def convert(
    model: nn.Module,
    to: To,
    *,
    include: Selection | None = None,
    exclude: Selection | None = None,
    inplace: bool = False,
    example_input: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """Exchange the normalization layers of a model, and nothing else of it.

    Kept are: parameters (the same objects, where the new layer has them), running statistics and counters, eps,
    momentum, ``requires_grad``, device, dtype, training and frozen flags, hooks of all kinds, names, and the sharing of
    a layer between several places. A layer that cannot be exchanged without changing more than the normalization stays
    and is named in a warning with the reason; :func:`conversion_plan` says all that beforehand.

    Args:
        model: Any model with normalization layers of torch (``BatchNorm1d/2d/3d``, ``SyncBatchNorm``, ``GroupNorm``,
            ``InstanceNorm1d/2d/3d``, ``LayerNorm``, ``RMSNorm``), of this package, timm's ``BatchNormAct2d``,
            ``GroupNormAct`` and ``FrozenBatchNormAct2d``, or of any class that :func:`flexnorm.probe.recognize`
            recognizes by trying it. Those that it cannot read stay, with the reason.
        to: A name of :func:`flexnorm.nn.make_norm` (``"unitized"``, ``"population"``, ``"group"``, ...); ``"torch"``
            for the nearest layer of torch (and back to timm's, where it was one), or ``"torch.batch"``, ``".sync"``,
            ``".group"``, ``".layer"``, ``".instance"``; a class; or a function that gets the old layer and returns
            the new one (``None`` to leave it).
        include: Only these layers, as in :func:`flexnorm.probe.select`: a name (with everything below it), a glob
            pattern, ``"re:..."``, a class, a module, a function of (name, module), or a list of these; ``None``: all.
        exclude: Not these layers; takes the same.
        inplace: Change ``model`` itself instead of a deep copy. Optimizers of it keep working, but do not know
            parameters that are new, such as ``alpha``.
        example_input: Where the number of spatial axes decides the class and neither the layer nor its neighbours tell
            (``GroupNorm``, ``LayerNorm``), it is seen with this input. A tensor, tuple or mapping of arguments.
        **kwargs: Constructor arguments of the new layers; they win over those of the old ones.

    Returns:
        The converted copy (``model`` itself if ``inplace``; a new layer if ``model`` is itself a normalization).

    Raises:
        ValueError: For an unknown name, a model without normalization layers, ``include`` or ``exclude`` that fit
            nothing, or constructor arguments that no layer accepts; for ``"normprop"``, which exchanges more than
            normalizations: see :func:`flexnorm.surgery.convert_to_normprop`.
        TypeError: For ``to`` of another kind, unknown constructor arguments, or a scripted model.

    Warns:
        flexnorm.NothingDone: No layer was exchanged and none is what was asked for, with the reasons.
        UserWarning: Some were not, with the reasons; or they have no running statistics yet.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> unitized = convert(model, "unitized", unit_norm="rms")
        >>> unitized[1]
        UnitizedBatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True, unit_norm='rms', \
constrain_alpha=False)
        >>> type(convert(unitized, "torch")[1]).__name__
        'BatchNorm2d'
    """
    target = resolve(to, kwargs)
    chosen = _chosen(model, include, exclude)
    model = model if inplace else copy.deepcopy(model)
    steps = _steps(model, target, chosen, example_input)
    if not any(step.new is not None or step.fits for step in steps):
        stay = [(step.row.name, f"{step.row.source}, {step.row.reason}") for step in steps]
        nothing_done(
            f"convert to {target.label} changed nothing", "norms", stay, "conversion_plan says the same beforehand."
        )
        return model
    refused = [step.row for step in steps if step.row.status == "refuse"]
    if refused:
        shown = first_three([f"{row.name} ({row.source}): {row.reason}" for row in refused], "conversion_plan")
        warnings.warn(f"{len(refused)} of {len(steps)} normalization layers stay as they are: {shown}", stacklevel=2)
    blank = [step.row.name for step in steps if UNKNOWN in step.row.notes]
    if blank:
        names = ", ".join(blank[:3]) + (", ..." if len(blank) > 3 else "")
        text = f"{len(blank)} converted layers have no running statistics yet ({names}): train, or call recalibrate(),"
        warnings.warn(f"{text} before evaluation", stacklevel=2)
    return _apply(model, steps, target)


def _chosen(model: nn.Module, include: Selection | None, exclude: Selection | None) -> set[str]:
    """Names that mean the same layers in a copy of the model, whose modules are other objects."""
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("a scripted model cannot be converted; convert the model first, then script it")
    meant = _meant(model, include)
    if not (places := find_places(model, lambda module: is_candidate(module) or module in meant)):
        raise ValueError(f"{type(model).__name__} has no normalization layer that could be converted")
    return {place.name for place in select_places(places, include, exclude)}


def _meant(model: nn.Module, include: Selection | None) -> set[nn.Module]:
    """Layers that are no candidates, nor hold any, but are named outright: by class, full name, or themselves."""
    parts = include if isinstance(include, (list, tuple, set, frozenset)) else [include]
    classes = tuple(part for part in parts if isinstance(part, type))
    found = {
        module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, classes) or any(part is module or (part == name and name) for part in parts)
    }
    return {module for module in found if not any(map(is_candidate, module.modules()))}


def _steps(model: nn.Module, target: Target, chosen: set[str], example_input: Any, *, dry: bool = False) -> list[_Step]:
    """What happens to the layers of these names; in a dry run a user's function gets copies of them."""
    meant = {module for name, module in model.named_modules(remove_duplicate=False) if name in chosen}
    found = find_places(model, lambda module: is_candidate(module) or module in meant)
    places = [place for place in found if place.name in chosen]
    axes = {} if example_input is None else axes_of(model, [p.module for p in places], example_input)
    like = next((t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), torch.empty(0))
    neighbours = common_ndim(model)
    steps, errors = [], []
    for place in places:
        row = ConversionRow(place.name, tuple(place.names), type(place.module).__name__)
        try:
            steps.append(_step(place, row, target, axes.get(id(place.module), set()), neighbours, like, dry=dry))
        except (RefusedError, ValueError) as error:
            errors += [error] if isinstance(error, ValueError) else []
            steps.append(_Step(place, replace(row, status="refuse", reason=str(error))))
    if errors and len(errors) == len(steps):
        raise errors[0]
    return steps


def _step(
    place: Place, row: ConversionRow, target: Target, seen: set[int], neighbours: int | None, like: Tensor, *, dry: bool
) -> _Step:
    module = place.module
    if target.function is not None:
        new = target.function(copy.deepcopy(module) if dry else module)
        if new is None or (new is module and not dry):
            row = replace(row, status="keep", reason=f"{target.label} leaves it")
            return _Step(place, row, fits=new is not None)
        if not isinstance(new, nn.Module):
            raise TypeError(f"{target.label} must return a module or None, got {type(new).__name__} for {row.name!r}")
        if dry and type(new) is type(module) and new.__dict__.keys() == module.__dict__.keys():
            row = replace(row, notes=("same class",))
        return _Step(place, replace(row, target=type(new).__name__, effect="changes"), None, new)
    if target.restores and not isinstance(module, (Norm, NormPropUnits)):
        return _Step(place, replace(row, status="keep", reason="not a layer of this package"), fits=True)
    source = replace(read(module), flat=seen == {2})
    if target.restores and (new := restored(source)) is not None:
        return _Step(place, replace(row, target=type(new).__name__), None, new)
    ndim = _spatial_axes(source, target, seen, neighbours)
    cls = target.class_for(source, ndim)
    if not target.kwargs and cls in type(module).__mro__ and not source.origin:
        return _Step(place, replace(row, status="keep", reason=f"already {cls.__name__}"), fits=True)
    tensor = next((t for t in (*module.parameters(False), *module.buffers(False)) if t.is_floating_point()), like)
    new = target.build(source, ndim, tensor.device, tensor.dtype)
    move_tensors(source, new)
    row = replace(
        row,
        target=final_class(source, new, restore=target.restores).__name__,
        effect=effect(source, new),
        notes=(*source.notes, *notes(source, new)),
    )
    return _Step(place, row, source, new)


def _spatial_axes(source: Source, target: Target, seen: set[int], neighbours: int | None) -> int:
    name = type(source.module).__name__
    last_axes = isinstance(source.module, (nn.LayerNorm, nn.RMSNorm))
    if target.where(source)[0] == -1:
        return target.ndim or source.ndim or 1
    if last_axes and source.ndim and seen - {source.ndim + 2}:
        raise RefusedError(f"normalizes the last {source.ndim + 1} of {sorted(seen)} axes, not channels and positions")
    if source.ndim is not None:
        ndim = max(source.ndim, 1)
    else:
        spatial = {max(axes - 2, 1) for axes in seen}
        if len(spatial) > 1:
            raise RefusedError(f"{name} is called with inputs of different numbers of axes: {sorted(seen)}")
        if not spatial and neighbours is None and target.needs_axes(source):
            raise RefusedError("the number of spatial axes of its input is not known; pass example_input")
        ndim = spatial.pop() if spatial else (neighbours or target.ndim or 2)
    if target.ndim is not None and ndim != target.ndim:
        raise RefusedError(f"{target.label} is for {target.ndim} spatial axes, the layer has {ndim}")
    return ndim


def _apply(model: nn.Module, steps: Sequence[_Step], target: Target) -> nn.Module:
    for step in steps:
        if step.new is None:
            continue
        new, old = step.new, step.place.module
        if step.source is not None:
            new = graft(step.source, new, step.source.ndim, restore=target.restores)
        elif all(module is not old for module in new.modules()):
            graft_hooks(old, new)
            new.train(old.training)
        step.place.put(new)
        if step.place.slots[0][0] is None:
            model = new
    for module in model.modules():
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)):
            _mind_the_fast_path(module)
    return model


def _mind_the_fast_path(module: nn.TransformerEncoderLayer | nn.TransformerEncoder) -> None:
    """Switch off a shortcut in evaluation that normalizes layers by the norms' parameters alone, unless that is right.

    torch takes it whatever class the norms are of. Its switch is the layer's own; on the way back it is as it was.
    """
    one = isinstance(module, nn.TransformerEncoderLayer)
    switch = "activation_relu_or_gelu" if one else "use_nested_tensor"
    layers = [m for m in module.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    alike = all(type(norm).forward is nn.LayerNorm.forward for m in layers for norm in (m.norm1, m.norm2))
    before = "_fast_path_before"
    if alike and before in module.__dict__:
        module.__dict__[switch] = module.__dict__.pop(before)
    elif not alike and module.__dict__.get(switch):
        module.__dict__[before], module.__dict__[switch] = module.__dict__[switch], 0 if one else False
