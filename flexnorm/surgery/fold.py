"""Fold normalizations that are a fixed scale and shift in evaluation into the linear map before them."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flexnorm._messages import nothing_done
from flexnorm.engine import FlexNorm, Moments
from flexnorm.nn import NoNorm, NormPropUnits, called_norms
from flexnorm.nn.rules import standardize
from flexnorm.probe import Place, Selection, channel_axis, find_places, select_places, unwrap
from flexnorm.surgery._producers import LINEAR, Producers, executed, traced
from flexnorm.surgery._reading import RefusedError, ThenAct, is_candidate, name_of, read
from flexnorm.surgery._targets import of_batches
from flexnorm.surgery.plan import Difference, Report, difference, first_three


@dataclass(frozen=True)
class FoldRow:
    """What folding does with one normalization layer.

    Attributes:
        name: Name of the layer (the first one, if it hangs in several places).
        names: All its names.
        layer: What it is.
        into: Name of the linear map that absorbs it, or what a NormProp layer becomes; empty if it stays.
        reason: Why it stays; empty if it is folded.
        fixed: Whether the layer is a fixed scale and shift in evaluation, so that it could be folded in another place.
    """

    name: str
    names: tuple[str, ...]
    layer: str
    into: str = ""
    reason: str = ""
    fixed: bool = False

    @property
    def folded(self) -> bool:
        """Whether the layer is folded."""
        return not self.reason


class FoldPlan(Report[FoldRow]):
    """What :func:`flexnorm.fold` would do; prints as a table.

    Attributes:
        rows: One :class:`FoldRow` per normalization layer, in the order of the model.
        difference: Measured :class:`Difference` in evaluation, if an example input was given.
    """

    headings = ("layer", "is", "folded into", "why not")

    def __init__(self, rows: Sequence[FoldRow], measured: Difference | None = None) -> None:
        super().__init__(rows)
        self.difference = measured

    @property
    def folded(self) -> list[FoldRow]:
        """Rows of the layers that are folded."""
        return [row for row in self.rows if row.folded]

    def cells(self, row: FoldRow) -> tuple[str, ...]:
        """The row as texts."""
        return (row.name or "(model)", row.layer, row.into, row.reason)

    def summary(self) -> list[str]:
        """Counts, and the measured difference."""
        lines = [f"{len(self.folded)} folded, {len(self.rows) - len(self.folded)} left"]
        return lines if self.difference is None else [*lines, f"function in evaluation: {self.difference}"]


def fold_plan(
    model: nn.Module, *, example_input: Any = None, include: Selection | None = None, exclude: Selection | None = None
) -> FoldPlan:
    """Say what :func:`fold` would do with the same arguments; the model is not changed.

    Args:
        model: As of :func:`fold`.
        example_input: As of :func:`fold`; the report then also holds the largest difference of the outputs.
        include: As of :func:`fold`.
        exclude: As of :func:`fold`.

    Returns:
        A :class:`FoldPlan`; ``print`` it.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.GroupNorm(2, 8))
        >>> print(fold_plan(model))
        layer  is           folded into  why not
        1      BatchNorm2d  0
        3      GroupNorm                 normalizes each sample by its own statistics
        <BLANKLINE>
        1 folded, 1 left
    """
    folded, rows = _fold(copy.deepcopy(model), example_input, _chosen(model, include, exclude))
    return FoldPlan(rows, None if example_input is None else _measured(model, folded, rows, example_input))


def fold(
    model: nn.Module,
    *,
    example_input: Any = None,
    include: Selection | None = None,
    exclude: Selection | None = None,
    inplace: bool = False,
    strict: bool = False,
) -> nn.Module:
    """Fold normalizations into the convolution, transposed convolution or linear map before them, for inference.

    Folded are the layers that are a fixed scale and shift in evaluation: ``BatchNorm*`` and ``SyncBatchNorm`` of torch,
    instance normalization with running statistics, frozen layers (of timm and torchvision too), and of this package
    batch, population, mean-only and variance-only normalization, batch renormalization, and unitized layers at
    alpha = 0. Their place is taken by ``nn.Identity`` (or by the activation that was part of the layer), so names do
    not move. NormProp layers become a plain linear map and at most two elementwise modules.

    A normalization is folded only if the output of the linear map goes into it and nowhere else, and each of the two is
    used once. That is read off a ``torch.fx`` trace; where the model cannot be traced, off one forward pass on
    ``example_input``. The arithmetic is in float64. The result computes the same function in evaluation up to rounding,
    and is meant for inference, ``torch.export`` and ONNX.

    Args:
        model: Any model.
        example_input: A tensor, a tuple of positional or a mapping of keyword arguments. The result is then compared
            with the model on it.
        include: Only these layers, as of :func:`flexnorm.freeze`.
        exclude: Not these layers.
        inplace: Change ``model`` itself instead of a deep copy.
        strict: Raise instead of warning if a layer with a fixed scale and shift cannot be folded.

    Returns:
        The folded model, in evaluation mode.

    Raises:
        RuntimeError: If ``strict`` and a layer is left, or if the result differs from the model on ``example_input``.
        ValueError: If ``include`` or ``exclude`` names a layer that does not exist.

    Warns:
        flexnorm.NothingDone: No layer was folded, with the reasons.
        UserWarning: Layers with a fixed scale and shift are left, with the reasons; :func:`fold_plan` lists all.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> fold(model)
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        )
    """
    reference = copy.deepcopy(model) if inplace and example_input is not None else model
    chosen = _chosen(model, include, exclude)
    folded, rows = _fold(model if inplace else copy.deepcopy(model), example_input, chosen)
    left = [row for row in rows if row.fixed and not row.folded]
    if not (strict and left) and not any(row.folded for row in rows):
        reasons = {row.name: f"{row.layer}, {row.reason}" for row in rows}
        unknown = {name: f"{type(norm).__name__}, not known" for name, norm in called_norms(unwrap(model)).items()}
        advice = "Only a fixed scale and shift behind a linear map can be folded; fold_plan says the same beforehand."
        nothing_done("fold(model) changed nothing", "norms", {**unknown, **reasons}.items(), advice)
    elif left:
        shown = first_three([f"{row.name} ({row.layer}): {row.reason}" for row in left], "fold_plan")
        text = f"{len(left)} of {len(rows)} normalization layers were not folded: {shown}"
        if strict:
            raise RuntimeError(text)
        warnings.warn(text, stacklevel=2)
    if example_input is not None:
        measured = _measured(reference, folded, rows, example_input)
        if not measured.preserved:
            raise RuntimeError(f"the folded model computes another function on example_input: {measured}")
    return folded


class _NeedsMomentsError(Exception):
    """The rule has looked at the moments of its input."""


def _unknown(_: bool) -> tuple[Tensor, Tensor]:
    raise _NeedsMomentsError


@torch.no_grad()
def as_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,), in float64, by which a layer acts in evaluation; RefusedError if its input matters."""
    if isinstance(norm, NoNorm):
        raise RefusedError("is no normalization, only the place of one")
    source = None if isinstance(norm, FlexNorm) else read(norm)
    declared: Any = norm if source is None else source.norm
    plain = norm.plain if isinstance(norm, ThenAct) else type(norm)
    held = {**norm._buffers, **norm._parameters}
    if source is not None:
        held |= {new: held[old] for new, old in source.names.items()} | dict(source.tables)
    tensors = {name: None if tensor is None else tensor.double() for name, tensor in held.items()}
    mean, var = tensors.get("running_mean"), tensors.get("running_var")
    why = "normalizes each sample by its own statistics"
    if of_batches(declared) and mean is None:
        why = "normalizes with the statistics of the batch in evaluation too"
    if (declared is not norm or name_of(plain)) and declared.same_as(training=False) == "batch":
        if mean is None or var is None:
            raise RefusedError(why)
        return standardize(mean, var, tensors.get("weight"), tensors.get("bias"), float(declared.eps))
    if not isinstance(norm, FlexNorm):
        raise RefusedError(why)
    exact = copy.deepcopy(norm).double().eval()
    try:
        scale, shift = exact.rule(Moments(count=1, _compute=_unknown))
    except _NeedsMomentsError:
        raise RefusedError(why) from None
    forward = next(base for base in type(norm).__mro__ if base is not ThenAct and "forward" in base.__dict__)
    if forward is not FlexNorm:
        raise RefusedError(f"{forward.__name__} has its own forward")
    channels = (1, norm.num_features)
    return scale.expand(channels)[0].clone(), shift.expand(channels)[0].clone()


@torch.no_grad()
def absorb(linear: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """Change a linear map of C channels in place so that it yields ``scale * y + shift``, (C,), where it yielded y."""
    weight = linear.get_parameter("weight")
    bias = linear._parameters.get("bias")
    if isinstance(linear, nn.modules.conv._ConvTransposeNd):
        # (C_in, C_out / groups, *kernel), the input channels of one group after those of the other.
        groups = linear.groups
        split = weight.double().reshape(groups, -1, *weight.shape[1:])
        new = (split * scale.view(groups, 1, -1, *(1,) * (weight.dim() - 2))).flatten(0, 1)
    else:
        new = weight.double() * scale.view(-1, *(1,) * (weight.dim() - 1))
    moved = shift if bias is None else shift + scale * bias.double()
    # In the memory format of the old weight.
    linear.weight = nn.Parameter(torch.empty_like(weight).copy_(new), requires_grad=weight.requires_grad)
    linear.bias = nn.Parameter(moved.to(weight), requires_grad=weight.requires_grad)


class MatrixOnly(nn.Module):
    """An identity in the place of a layer that was folded for (N, C) input; refuses any other.

    The axis that normalization treats as channels is the one that a linear map writes only if there are two.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` of shape (N, C)."""
        if x.dim() != 2:
            raise ValueError(f"the normalization was folded into a linear map for (N, C) input, got {tuple(x.shape)}")
        return x


def _chosen(model: nn.Module, include: Selection | None, exclude: Selection | None) -> set[str]:
    """Names that mean the same layers in a copy of the model, whose modules are other objects."""
    return {place.name for place in select_places(find_places(unwrap(model), is_candidate), include, exclude)}


def _fold(model: nn.Module, example_input: Any, chosen: set[str]) -> tuple[nn.Module, list[FoldRow]]:
    """Fold the layers of these names in place; the model comes back in evaluation mode."""
    model = unwrap(model).eval()
    places = [place for place in find_places(model, is_candidate) if place.name in chosen]
    producers, failure = Producers(), ""
    try:
        producers = traced(model)
    except Exception as error:  # noqa: BLE001 - tracing runs the user's code on proxies, anything can happen
        if example_input is None:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            failure = f"the model cannot be traced ({lines[0]}); pass example_input"
        else:
            producers = executed(model, example_input)
    names = {id(module): name for name, module in model.named_modules()}
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    rows = []
    for place in places:
        row = FoldRow(place.name, tuple(place.names), type(place.module).__name__)
        if isinstance(place.module, NormPropUnits):
            row, model = _fold_normprop(model, place, row)
        else:
            row = _fold_one(place, row, producers, failure, names, owners)
        rows.append(row)
    return model, rows


def _measured(model: nn.Module, folded: nn.Module, rows: Sequence[FoldRow], example_input: Any) -> Difference:
    names = {row.name for row in rows}
    return difference(model, folded, example_input, lambda m, example: _fold(m, example, names)[0], training=False)


def _fold_one(
    place: Place, row: FoldRow, producers: Producers, failure: str, names: dict[int, str], owners: Counter[int]
) -> FoldRow:
    norm = place.module
    try:
        scale, shift = as_affine(norm)
    except RefusedError as refusal:
        return replace(row, reason=str(refusal))
    row = replace(row, fixed=True)
    linear = producers.into.get(id(norm))
    if linear is None:
        return replace(row, reason=failure or producers.reasons.get(id(norm), "not reached in evaluation"))
    reason = _why_not(linear, norm, scale.numel(), producers.axes.get(id(norm), set()), owners)
    if reason:
        return replace(row, reason=reason)
    absorb(linear, scale, shift)
    matrix = isinstance(linear, nn.Linear) and channel_axis(norm) == 1
    rest: list[nn.Module] = [MatrixOnly()] if matrix else []
    if "act" in norm._modules:
        rest += [m for m in norm._modules.values() if m is not None and type(m) is not nn.Identity]
    substitute = nn.Identity() if not rest else rest[0] if len(rest) == 1 else nn.Sequential(*rest)
    place.put(substitute.eval())
    return replace(row, into=names[id(linear)])


def _why_not(linear: nn.Module, norm: nn.Module, channels: int, axes: set[int], owners: Counter[int]) -> str:
    above = itertools.takewhile(
        lambda cls: cls not in LINEAR, type(linear).__mro__
    )  # put on top of torch's by the user
    own = {name for cls in above for name in cls.__dict__}
    if own & {"forward", "_conv_forward", "_output_padding", "__call__"}:
        return f"the {type(linear).__name__} before it is a subclass with its own forward"
    if parametrize.is_parametrized(linear) or "weight" not in linear._parameters:
        return "the weight of the linear map before it is computed (parametrization, weight_norm)"
    if any(owners[id(p)] > 1 for p in linear.parameters(recurse=False)):
        return "the weight of the linear map before it is used elsewhere too"
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in (linear, norm)):
        return "it, or the linear map before it, has forward hooks or a replaced forward"
    matrix = isinstance(linear, nn.Linear)
    last = channel_axis(norm) == -1
    elsewhere = axes - {2} if matrix and not last else last and not matrix
    if channels != (linear.out_features if matrix else linear.out_channels) or elsewhere:
        return "its channels are not the outputs of the linear map before it"
    return ""


def _fold_normprop(model: nn.Module, place: Place, row: FoldRow) -> tuple[FoldRow, nn.Module]:
    layer = place.module
    row = replace(row, fixed=True)
    if layer._forward_hooks or layer._forward_pre_hooks or parametrize.is_parametrized(layer):
        return replace(row, reason="it has forward hooks or parametrizations"), model
    try:
        plain = layer.fold().eval()  # type: ignore[operator]
    except RuntimeError as error:
        return replace(row, reason=str(error)), model
    place.put(plain)
    parts = plain if isinstance(plain, nn.Sequential) else [plain]
    row = replace(row, into=" + ".join(type(part).__name__ for part in parts))
    return row, plain if layer is model else model
