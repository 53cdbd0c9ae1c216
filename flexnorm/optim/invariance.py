r"""Which weights of a network are scale invariant, found by trying.

A weight vector is scale invariant if the output of the network in training mode does not change when the vector is
multiplied by a positive number. Whether that holds depends on what comes behind it, so it is not read off the code but
tested. By Euler's identity the inner product of such a vector with the gradient of any output vanishes: one forward and
one backward, of a random projection of the output, tell that of every row of every weight at once, and of blocks of
rows that are only invariant together (heads, matrices). What passes is confirmed sharply: every vector gets its own
factor, a power of two, all in one forward, and the outputs are compared; where that fails, weight by weight. Parameters
and inputs are random meanwhile, and eps constants nearly nothing: docs/optim.md says why.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from flexnorm._messages import unknown_name
from flexnorm.optim.rows import RowLayout, from_rows, row_axis, to_rows
from flexnorm.probe import arguments, isolated, map_tensors, private_randomness, tensors

_PROBE_BATCH = 16  # batch normalization of two values gives +-1 whatever the weight, so a tiny batch proves nothing
_EPS_NAMES = ("eps", "epsilon", "variance_epsilon")
_NO_EPS = 1e-30


@dataclass(frozen=True)
class WeightReport:
    """The verdict on one parameter.

    Attributes:
        name: Name in ``model.named_parameters()``.
        parameter: The parameter itself.
        selected: Whether it belongs on the manifold.
        reason: Why, or why not, in words.
        change: How much the output depends on the lengths of rows. Where rows, or blocks of them, are invariant: its
            change when they are rescaled, relative to that when their direction is. Elsewhere the part of its
            derivatives that is along a row, 0 to 1, at most over rows. NaN where this was not tried.
        rows: Number of weight vectors; 0 for vectors and scalars.
        n: Length of one weight vector.
        row_dim: Axis of the output units (1 for transposed convolutions and weights ``(in, out)``).
        row_groups: Groups of the convolution.
        modules: Names of all modules that use the parameter (several for tied weights).
        together: How many neighbouring rows are scale invariant together: 1 if every row is by itself, the size of a
            head, or the number of rows for a whole matrix; 0 if not even that is.
    """

    name: str
    parameter: nn.Parameter = field(repr=False)
    selected: bool
    reason: str
    change: float = float("nan")
    rows: int = 0
    n: int = 0
    row_dim: int = 0
    row_groups: int = 1
    modules: tuple[str, ...] = ()
    together: int = 0


class InvarianceReport(dict[str, WeightReport]):
    """Verdicts by parameter name, in the order of ``model.named_parameters()``; prints as a table.

    Attributes:
        select: The rule that was applied, ``"probe"`` or ``"paper"``.
    """

    def __init__(self, reports: list[WeightReport], select: str) -> None:
        super().__init__({report.name: report for report in reports})
        self.select = select

    @property
    def selected(self) -> list[str]:
        """Names of the weights that belong on the manifold."""
        return [name for name, report in self.items() if report.selected]

    def __str__(self) -> str:
        width = max((len(name) for name in self), default=0)
        return "\n".join(
            f"{'manifold' if r.selected else '   -    '}  {name:<{width}}  {tuple(r.parameter.shape)!s:<18} {r.reason}"
            for name, r in self.items()
        )


def scale_invariant_weights(
    model: nn.Module, example_input: Any = None, *, select: str = "probe", tolerance: float = 1e-3
) -> InvarianceReport:
    """Find the weights of a model whose rows may be rescaled without changing its output in training mode.

    Args:
        model: Any module. It is left exactly as it was.
        example_input: What the model is called with: a tensor, a tuple of positional or a dict of keyword arguments,
            the batch on axis 0. Floating point tensors are replaced by Gaussian noise of that shape, in batches of 16.
        select: ``"probe"`` tests scale invariance. ``"paper"`` applies the rule of Cho and Lee (2017) instead:
            convolutions with more inputs than outputs (filter elements times input channels > output channels), whether
            or not a normalization follows directly; it needs no example.
        tolerance: Largest relative change that counts as none (see :class:`WeightReport`). Invariant weights come out
            at 0 or near 1e-6, others at 0.01 to 1; a model with eps constants in functional calls may need more.

    Returns:
        A report on every parameter: a mapping from names to :class:`WeightReport`, with the list ``selected``.

    Raises:
        ValueError: If ``select`` is unknown, no example is given, the model has no parameters or lazy ones, or its
            output is not finite or not the same twice.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
        >>> scale_invariant_weights(model, torch.zeros(8, 1, 4, 4)).selected
        ['0.weight']
    """
    if select not in ("probe", "paper"):
        raise ValueError(unknown_name("select", select, ["probe", "paper"]))
    candidates = _candidates(model)
    if select == "paper":
        return InvarianceReport([r if r.reason else _paper_rule(r, model) for r in candidates], select)
    if example_input is None:
        raise ValueError("probing needs example_input: what the model is called with, for example one batch of images")
    with probing(model, example_input) as probe:
        found = _verdicts([r for r in candidates if not r.reason], probe, tolerance)
        return InvarianceReport([found.get(r.name, r) for r in candidates], select)


def _candidates(model: nn.Module) -> list[WeightReport]:
    """Return a report on every parameter, with the reason why it is out of the question, or none yet."""
    users: dict[nn.Parameter, list[str]] = {}
    for prefix, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(parameter, []).append(prefix)
    found = []
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"parameter {name!r} is lazy and has no shape yet: call the model once, then ask again")
        report = WeightReport(name, parameter, False, "", modules=tuple(users[parameter]))
        if parameter.ndim >= 2:
            layout = RowLayout.of(parameter, *row_axis(model.get_submodule(report.modules[0]), parameter))
            groups = layout.blocks if layout.rows else 1
            report = replace(report, rows=layout.rows, n=layout.n, row_dim=layout.row_dim, row_groups=groups)
        found.append(replace(report, reason=_unfit(report)))
    if not found:
        raise ValueError("the model has no parameters")
    return found


def _unfit(report: WeightReport) -> str:
    """Say why a parameter is out of the question whatever the network does with it, or nothing."""
    if report.parameter.ndim < 2:
        return "a vector or scalar (bias, gain), no weight vectors"
    if not report.parameter.is_floating_point():
        return f"not a real floating point weight ({report.parameter.dtype})"
    if report.parameter.numel() == 0:
        return "empty"
    return "rows of length one have no direction" if report.n == 1 else ""


def _paper_rule(report: WeightReport, model: nn.Module) -> WeightReport:
    if report.parameter.ndim < 3 or not hasattr(model.get_submodule(report.modules[0]), "kernel_size"):
        return replace(report, reason="not a convolution")
    selected = report.n > report.rows
    report = replace(report, together=int(selected))
    kind = "undercomplete" if selected else "overcomplete"
    reason = f"{kind} convolution: {report.n} inputs, {report.rows} outputs"
    return replace(report, selected=selected, reason=reason)


def _test(report: WeightReport, probe: Probe, tolerance: float) -> WeightReport:
    name, weight = report.name, probe.parameters[report.name]
    influence = probe.distance(name, probe.another(weight))
    if not influence > 0:
        return replace(report, reason="has no influence on the output in training mode")
    layout = RowLayout.of(weight, report.row_dim, report.row_groups)
    factors = 2.0 ** (torch.arange(layout.rows) % 5 - 1)  # neighbouring rows get different ones, 1/2 to 8
    scaled = torch.empty_like(weight)
    from_rows(to_rows(weight, layout) * factors.to(weight).unsqueeze(1), scaled, layout)
    change = probe.distance(name, scaled) / influence
    if change <= tolerance:
        return _invariant(report, 1, change)
    if probe.distance(name, weight * 4) / influence <= tolerance:
        return _invariant(report, report.rows, change)
    return replace(report, reason=_CHANGES.format(change, "what a new direction does"), change=change, together=0)


def _invariant(report: WeightReport, together: int, change: float) -> WeightReport:
    reason = f"invariant only in blocks of {together} rows: heads, each with a norm of its own behind it"
    if together == report.rows:
        reason = "invariant only when all rows are scaled alike: the norm behind it mixes its outputs"
    if together == 1:
        reason = "scale invariant"
    return replace(report, selected=together == 1, reason=reason, change=change, together=together)


_ROUNDING = 1e-4  # of a deep network in float32; what is not invariant, and passed by chance, changes far more
_CHANGES = "rescaling rows changes the output ({:.2g} of {})"


def _verdicts(reports: list[WeightReport], probe: Probe, tolerance: float) -> dict[str, WeightReport]:
    """Verdicts on parameters that could be invariant: by Euler's identity, confirmed in one forward."""
    try:
        slopes = probe.slopes([report.name for report in reports])
    except Exception:  # noqa: BLE001 - what has no gradient is tried forwards
        return {report.name: _test(report, probe, tolerance) for report in reports}
    found, hopeful = {}, []
    for report in reports:
        weight, grad = probe.parameters[report.name], slopes[report.name]
        if not bool(grad.any()):
            found[report.name] = _test(report, probe, tolerance)
            continue
        share, together = _euler(report, weight, grad, tolerance)
        if together:
            hopeful.append(replace(report, together=together))
        else:
            found[report.name] = replace(
                report, reason=_CHANGES.format(share, "a derivative is along a row"), change=share
            )
    return found | {report.name: report for report in _confirmed(hopeful, probe, tolerance)}


def _euler(report: WeightReport, weight: Tensor, grad: Tensor, tolerance: float) -> tuple[float, int]:
    """Return the largest part of a gradient along a row, and how many rows together have none of it (0: no number)."""
    layout = RowLayout.of(weight, report.row_dim, report.row_groups)
    products = to_rows(weight * grad, layout)
    along, size = products.sum(1, dtype=torch.float64), products.abs().sum(1, dtype=torch.float64)
    share = along.abs() / size.clamp_min(torch.finfo(size.dtype).tiny)
    if float(share.max()) <= tolerance:
        return float(share.max()), 1
    for units in range(2, layout.rows + 1):
        if (layout.rows // layout.blocks) % units == 0 or units == layout.rows:
            # Blocks whose rows do depend on their length, but in sum do not; the rest is rounding. Few blocks may
            # seem to by chance, hence sharper.
            total, parts = along.view(-1, units).sum(1).abs(), along.abs().view(-1, units).sum(1)
            rounding = 1e-6 * size.view(-1, units).sum(1)
            if bool((total <= tolerance / 10 * parts + rounding).all()):
                return float(share.max()), units
    return float(share.max()), 0


def _confirmed(
    reports: list[WeightReport], probe: Probe, tolerance: float, change: float | None = None
) -> list[WeightReport]:
    """Rescale all vectors of all these weights in one forward; where that shows, halves of them, then single ones."""
    change = _joint_change(reports, probe) if change is None else change
    if change <= _ROUNDING or (len(reports) == 1 and change <= tolerance):
        return [_invariant(report, report.together, change) for report in reports]
    if len(reports) == 1:
        return [_test(reports[0], probe, tolerance)]
    middle = len(reports) // 2
    halves = [(half, _joint_change(half, probe)) for half in (reports[:middle], reports[middle:])]
    if all(change > _ROUNDING for _, change in halves):  # few are sharply invariant: eps constants in functions
        return [found for report in reports for found in _confirmed([report], probe, tolerance)]
    return [found for half, change in halves for found in _confirmed(half, probe, tolerance, change)]


def _joint_change(reports: list[WeightReport], probe: Probe) -> float:
    """Change of the output when all vectors are rescaled, relative to that when all have new directions.

    If that is more than rounding in the precision of the model, it is measured in float64.
    """
    scaled, other = {}, {}
    for report in reports:
        weight = probe.parameters[report.name]
        layout = RowLayout.of(weight, report.row_dim, report.row_groups, report.together)
        factors = 2.0 ** (torch.arange(layout.rows) % 5 - 1)  # neighbours get different ones, 1/2 to 8
        scaled[report.name] = torch.empty_like(weight)
        from_rows(to_rows(weight, layout) * factors.to(weight).unsqueeze(1), scaled[report.name], layout)
        other[report.name] = probe.another(weight)
    influence = probe.change(other)
    if not influence > 0:
        return math.inf
    change = probe.change(scaled) / influence
    return change if change <= _ROUNDING else probe.change(scaled, exact=True) / influence


@contextmanager
def probing(model: nn.Module, example_input: Any) -> Iterator[Probe]:
    """Within the block, a :class:`Probe` of a model; afterwards the model is as before."""
    device = next(model.parameters()).device
    with isolated(model, 0), torch.autocast(device.type, enabled=False):
        yield Probe(model, example_input)


class Probe:
    """Runs a model, in training mode, with other parameters and inputs; see :func:`probing`.

    Attributes:
        parameters: The random parameters by name.
    """

    def __init__(self, model: nn.Module, example_input: Any) -> None:
        self.model = model.train()
        self.device = next(model.parameters()).device
        self._generator = torch.Generator().manual_seed(0)
        self.args, self.kwargs = self._noise(example_input)
        self._exact_base: Tensor | None = None
        self._eps = [
            (module, name, value)
            for module in model.modules()
            for name in _EPS_NAMES
            if isinstance(value := getattr(module, name, None), float) and value > 0
        ]
        # Random parameters and no eps if the network bears it, else as they are.
        self._timid = False
        own = {name: _wide(p.detach()) for name, p in model.named_parameters()}
        drawn = {name: self.another(p) for name, p in own.items()}
        for self.parameters, eps in ((drawn, _NO_EPS), (own, _NO_EPS), (own, None)):
            self._timid = self.parameters is own
            for module, name, original in self._eps:
                setattr(module, name, original if eps is None else eps)
            self._base = self.run({})
            if bool(self._base.isfinite().all()):
                break
        else:
            raise ValueError("the output of the model is not finite, in training mode, for Gaussian inputs")
        if not torch.equal(self.run({}), self._base):
            raise ValueError("the model gives two outputs for one input and one random seed; it cannot be probed")

    def another(self, p: Tensor) -> Tensor:
        """Return random numbers in place of a parameter: Gaussian rows of length near 1, gains near 1.

        In a network that only works with parameters like its own, those are changed by up to a half instead.
        """
        if not p.is_floating_point() or p.numel() == 0:
            return p
        if self._timid:
            return p * (1 + 0.5 * torch.rand(p.shape, generator=self._generator).to(p))
        noise = torch.randn(p.shape, generator=self._generator).to(p)
        return 1 + noise / 4 if p.ndim < 2 else noise / p[0].numel() ** 0.5

    def _noise(self, example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return arguments like the example: noise, in batches of 16, where all of it is floating point."""
        args, kwargs = arguments(example_input)
        given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        noisy = all(t.is_floating_point() and t.ndim > 0 and len(t) == len(given[0]) for t in given)

        def like(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            if noisy:
                t = torch.randn((_PROBE_BATCH, *t.shape[1:]), generator=self._generator, dtype=t.dtype)
            return _wide(t).to(self.device)

        return tuple(like(t) for t in args), {name: like(t) for name, t in kwargs.items()}

    def run(self, changed: dict[str, Tensor], *, exact: bool = False) -> Tensor:
        """Return the outputs as one vector, with some parameters exchanged, from one state of buffers and one seed.

        ``exact``: in float64.
        """
        buffers = {name: _wide(b).clone() for name, b in self.model.named_buffers()}
        state, args, kwargs = {**self.parameters, **changed, **buffers}, self.args, self.kwargs
        if exact:
            state, args, kwargs = map_tensors(_exact, (state, args, kwargs))
        with private_randomness({self.device}, 0):
            output = torch.func.functional_call(self.model, state, args, kwargs)
        return _flat(output).detach().double()

    def distance(self, name: str, weight: Tensor) -> float:
        """Return the length of the change of the outputs when one parameter is exchanged, relative to their length.

        Zero if it is below rounding, infinity if an output is no number.
        """
        return _relative(self.run({name: weight}), self._base)

    def change(self, changed: dict[str, Tensor], *, exact: bool = False) -> float:
        """Return the same for many parameters exchanged at once; ``exact``: in float64 where the model runs in it."""
        if exact and self._exact_base is None:
            try:
                self._exact_base = self.run({}, exact=True)
            except Exception:  # noqa: BLE001 - what a model that is not ours raises for another dtype
                self._exact_base = self._base
        if not exact or self._exact_base is None or self._exact_base is self._base:
            return _relative(self.run(changed), self._base)
        return _relative(self.run(changed, exact=True), self._exact_base)

    def slopes(self, names: list[str]) -> dict[str, Tensor]:
        """Return the gradients of a random projection of the outputs with respect to some parameters."""
        buffers = {name: _wide(b).clone() for name, b in self.model.named_buffers()}
        leaves = {name: self.parameters[name].detach().requires_grad_() for name in names}
        state = {f"model.{name}": t for name, t in {**self.parameters, **buffers, **leaves}.items()}
        call = _Projected(self.model, list(leaves.values()), self._generator)
        with private_randomness({self.device}, 0), torch.enable_grad():
            grads = torch.func.functional_call(call, state, (self.args, self.kwargs))
        return {
            name: torch.zeros_like(leaf) if g is None else g
            for (name, leaf), g in zip(leaves.items(), grads, strict=True)
        }


class _Projected(nn.Module):
    """Runs a model and its backward, for some leaves, in one call: whatever is computed anew in it sees the leaves."""

    def __init__(self, model: nn.Module, leaves: list[Tensor], generator: torch.Generator) -> None:
        super().__init__()
        self.model, self.leaves, self.generator = model, leaves, generator

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, ...]:
        output = _flat(self.model(*args, **kwargs))
        along = torch.randn(output.shape, generator=self.generator).to(output)
        return torch.autograd.grad(output, self.leaves, along, allow_unused=True)


def _flat(output: Any) -> Tensor:
    return torch.cat([t.flatten() for t in tensors(output) if t.is_floating_point()])


def _relative(other: Tensor, base: Tensor) -> float:
    relative = float((other - base).norm() / base.norm().clamp(min=1e-300))
    if relative != relative:
        return math.inf
    return relative if relative > 1e-9 else 0.0


def _exact(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def _wide(t: Tensor) -> Tensor:
    """Low precision to float32; everything else as it is."""
    return t.float() if t.is_floating_point() and t.dtype != torch.float64 else t
