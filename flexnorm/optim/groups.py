"""Param groups of a model: scale-invariant weights on the sphere, everything else off it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from flexnorm._messages import nothing_done, unknown_name
from flexnorm.optim.invariance import InvarianceReport, WeightReport, probing, scale_invariant_weights
from flexnorm.optim.manifold import row_norm, unit
from flexnorm.optim.rows import RowLayout, compute_dtype, from_rows, to_rows
from flexnorm.probe import Selection, hooked, select_parameters


class ParamGroups(list[dict[str, Any]]):
    """Param groups for an optimizer, an ordinary list with a report; prints as a summary.

    Attributes:
        report: What was found out about every parameter (:class:`flexnorm.optim.InvarianceReport`).
        notes: What the user should know: rows whose length mattered and was changed, statistics that could not follow.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], report: InvarianceReport, notes: list[str]) -> None:
        super().__init__(groups)
        self.report = report
        self.notes = notes

    def __str__(self) -> str:
        reports = {r.parameter: r for r in self.report.values()}
        lines = []
        for group in self:
            count = sum(p.numel() for p in group["params"])
            keys = ", ".join(f"{key}={value}" for key, value in group.items() if key != "params")
            lines.append(f"{len(group['params'])} tensors, {count:,} numbers: {keys}")
            weights = [reports[p] for p in group["params"] if p.ndim >= 2]
            lines += [f"    {r.name}  {tuple(r.parameter.shape)}  {r.reason}" for r in weights]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def param_groups(
    model: nn.Module,
    lr: float,
    lr_manifold: float,
    weight_decay: float = 0.0,
    example_input: Any = None,
    *,
    select: str = "probe",
    spheres: str = "rows",
    grad_clip: float | None = 0.1,
    ortho: float = 0.1,
    decay_vectors: bool = False,
    exclude: Selection = (),
    normalize: bool = True,
    verbose: bool = False,
) -> ParamGroups:
    r"""Sort the parameters of a model into groups for :class:`SGDG` and :class:`AdamG` (or any torch optimizer).

    Weights on the manifold get ``lr_manifold`` and the regularizer ``ortho``, other weights ``lr`` and
    ``weight_decay``, biases and gains ``lr`` and no decay, as in Cho and Lee (2017). The rows of manifold weights are
    brought to unit length in place. For scale-invariant weights this does not change the function: running statistics
    of a normalization that takes the output of the layer are scaled along, so that a trained network evaluates as
    before.

    Args:
        model: The network.
        lr: Learning rate outside the manifold.
        lr_manifold: Learning rate on the manifold, in radians per unit of clipped gradient. The paper: 0.2 for SGD-G
            and 0.05 for Adam-G where ``lr`` is 0.01.
        weight_decay: For weights outside the manifold.
        example_input: What the model is called with; see :func:`scale_invariant_weights`. Not needed for
            ``select="paper"``.
        select: ``"probe"`` or ``"paper"``, see :func:`scale_invariant_weights`.
        spheres: What may be on a sphere: ``"rows"``, each the weights of one output unit, as in the paper; ``"heads"``:
            also blocks of rows that are scale invariant together only (query and key, where each head is normalized);
            ``"matrices"``: also whole weights (in front of a LayerNorm, RMSNorm or GroupNorm). A vector of many numbers
            turns by the same angle at the same ``lr_manifold``.
        grad_clip: Bound on the Riemannian gradient of a weight vector, :math:`\nu`.
        ortho: Weight :math:`\alpha` of the orthogonality regularizer. Weights with more rows than inputs get 0: their
            rows cannot be orthogonal, and pushing them apart only makes them unstable. So do heads and matrices.
        decay_vectors: Whether biases and gains are decayed too, except those for which a norm declares ``no_decay``.
        exclude: Parameters to keep off the manifold, as in :func:`flexnorm.probe.select_parameters`: names, patterns
            (``"head.*"``), modules, or classes of modules that hold them, ..., or a list of these.
        normalize: Bring the rows of manifold weights to unit length now. (The optimizer does it at its first step in
            any case, without the care for running statistics.)
        verbose: Print what went where to standard output.

    Returns:
        The groups, with their report. Parameters that do not require gradients are left out.

    Warns:
        flexnorm.NothingDone: If no weight goes on the manifold; it says why not, and stands in ``notes`` too.

    Raises:
        ValueError: As :func:`scale_invariant_weights`; if ``spheres`` is unknown; or if a name or pattern of
            ``exclude`` matches nothing.

    Examples:
        >>> from flexnorm.optim import SGDG
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
        >>> groups = param_groups(model, 0.01, 0.2, 5e-4, torch.zeros(8, 1, 4, 4))
        >>> [(group["manifold"], group["lr"], len(group["params"])) for group in groups]
        [(True, 0.2, 1), (False, 0.01, 1), (False, 0.01, 4)]
        >>> optimizer = SGDG(groups, momentum=0.9)
    """
    from flexnorm.nn import undecayed  # here, not above: the layers bring in the compiler

    if spheres not in _SPHERES:
        raise ValueError(unknown_name("spheres", spheres, _SPHERES))
    report = scale_invariant_weights(model, example_input, select=select)
    excluded = set(select_parameters(model, report, exclude, "exclude"))
    free = [r for r in report.values() if r.parameter.requires_grad and r.name not in excluded]
    chosen = [r for r in free if r.together and _SPHERES[spheres](r)]
    notes = _normalize(model, chosen, example_input, exact=select == "probe") if normalize else []
    if not chosen:
        coarse = sum(r.together > 1 for r in free)
        more = f"spheres='matrices' takes {coarse} as heads or matrices. " if coarse and spheres != "matrices" else ""
        notes.append(_nothing_chosen(report, excluded, more))
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for r in chosen:
        alpha = ortho if r.together == 1 and r.rows // r.row_groups <= r.n else 0.0
        whole = r.together == r.rows > 1
        # Blocks are of no concern to a weight without the orthogonality term, so all such share one group; nor are
        # rows to a whole weight.
        blocks = r.row_groups if (alpha or r.row_dim) and not whole else 1
        units, row_dim = (0, 0) if whole else (r.together, r.row_dim)
        new: dict[str, Any] = {"params": [], "lr": lr_manifold, "weight_decay": 0.0, "manifold": True}
        new |= {"grad_clip": grad_clip, "ortho": alpha, "row_dim": row_dim, "row_groups": blocks}
        new |= {"row_units": units} if units != 1 else {}
        groups.setdefault((row_dim, blocks, units, alpha), new)["params"].append(r.parameter)
    on = {r.parameter for r in chosen}
    rest = [r.parameter for r in report.values() if r.parameter.requires_grad and r.parameter not in on]
    # Norms may declare parameters that take no decay; without decay_vectors, no vector does.
    undecaying = {p for p in undecayed(model) if decay_vectors or p.ndim >= 2}
    for parameters, decay in (
        ([p for p in rest if p.ndim >= 2 and p not in undecaying], weight_decay),
        ([p for p in rest if p.ndim < 2 and p not in undecaying], weight_decay if decay_vectors else 0.0),
        ([p for p in rest if p in undecaying], 0.0),
    ):
        if parameters:
            groups[(decay, len(groups))] = {"params": parameters, "lr": lr, "weight_decay": decay, "manifold": False}
    result = ParamGroups(groups.values(), report, notes)
    if verbose:
        sys.stdout.write(f"{result}\n")
    return result


_SPHERES: dict[str, Callable[[WeightReport], bool]] = {
    "rows": lambda r: r.together == 1,
    "heads": lambda r: r.together == 1 or r.together < r.rows,
    "matrices": lambda _: True,
}


def _nothing_chosen(report: InvarianceReport, excluded: set[str], more: str) -> str:
    """Warn that no weight goes on the manifold."""

    def reason(r: WeightReport) -> str:
        frozen = "does not require a gradient" if r.selected and not r.parameter.requires_grad else r.reason
        return "excluded" if r.name in excluded else frozen

    return nothing_done(
        "param_groups puts nothing on the sphere",
        "weights",
        [(r.name, reason(r)) for r in report.values() if r.parameter.ndim >= 2],
        f"{more}All are in groups off the sphere: SGDG moves those by SGD, AdamG by AdamW. Rows are scale invariant "
        "where a norm per output, such as BatchNorm, reads what they give; a LayerNorm, RMSNorm or GroupNorm behind "
        "them mixes outputs, and one in front of them (pre-norm transformers) does not see them.",
        stacklevel=4,
    )


@torch.no_grad()
def _normalize(model: nn.Module, chosen: list[WeightReport], example_input: Any, *, exact: bool) -> list[str]:
    """Bring rows to unit length, and running statistics along; return notes."""
    modules = dict(model.named_modules())
    used = [m for m in model.modules() if isinstance(getattr(m, "running_var", None), Tensor) and _has_history(m)]
    layers = {modules[name] for r in chosen for name in r.modules}
    followers = _followers(model, layers, used, example_input) if used and example_input is not None else []
    notes = []
    for r in chosen:
        layout = RowLayout.of(r.parameter, r.row_dim, r.row_groups, r.together)
        rows = to_rows(r.parameter.detach(), layout).to(compute_dtype(r.parameter))
        length = row_norm(rows).squeeze(1)
        lengths = f"{r.name}: rows had lengths {float(length.min()):.3g} to {float(length.max()):.3g}"
        if bool((length == 0).any()):
            notes.append(f"{r.name}: {int((length == 0).sum())} rows are zero and stay so")
        if not exact:
            notes.append(f"{lengths}; if no normalization follows directly, bringing them to 1 changed the function")
        from_rows(unit(rows), r.parameter.data, layout)
        length = torch.where(length > 0, length, 1.0).repeat_interleave(r.together)
        mine = {modules[name] for name in r.modules}
        behind = [(layer, norm) for layer, norm in followers if layer in mine and len(norm.running_var) == r.rows]
        for layer, norm in behind:
            _scale_statistics(layer, norm, length)
        if used and exact and not behind and not torch.allclose(length, torch.ones_like(length), rtol=1e-5):
            notes.append(
                f"{lengths} and no running statistics were found directly behind; re-estimate any that stand further "
                "on before evaluating"
            )
    return notes


def _has_history(norm: nn.Module) -> bool:
    """Tell whether running statistics have ever been updated: fresh ones must stay at 0 and 1."""
    mean, var = norm.running_mean, norm.running_var
    return bool((torch.as_tensor(mean) != 0).any() or (torch.as_tensor(var) != 1).any())


def _scale_statistics(layer: nn.Module, norm: Any, length: Tensor) -> None:
    """Divide the statistics behind a layer by the lengths of its rows; the bias of the layer is not divided."""
    bias = getattr(layer, "bias", None)
    shift = bias.detach().to(norm.running_mean) if isinstance(bias, Tensor) else torch.zeros_like(norm.running_mean)
    norm.running_mean.sub_(shift).div_(length.to(shift)).add_(shift)
    norm.running_var.div_(length.to(norm.running_var).square())


def _followers(
    model: nn.Module, layers: set[nn.Module], norms: list[nn.Module], example_input: Any
) -> list[tuple[nn.Module, Any]]:
    """Find by identity of tensors which normalization takes the output of which layer."""
    produced: dict[int, tuple[nn.Module, Tensor]] = {}
    found: list[tuple[nn.Module, Any]] = []

    def after(module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            produced[id(output)] = (module, output)  # holding the tensor keeps its id from being used again

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and id(args[0]) in produced:
            found.append((produced[id(args[0])][0], module))

    with probing(model, example_input) as probe, hooked(layers, after=after), hooked(norms, before):
        probe.run({})
    return found
