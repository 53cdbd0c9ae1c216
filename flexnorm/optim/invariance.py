r"""Which weights of a network are scale invariant, found by trying.

A weight vector is scale invariant if the output of the network in training mode does not change when the vector is
multiplied by a positive number. Whether that holds depends on what comes behind it, so it is not read off the code but
tested: every row of one weight gets its own factor, a power of two, and the outputs are compared. Parameters and inputs
are random meanwhile, and eps constants nearly nothing: docs/optim.md says why.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from flexnorm._messages import unknown_name
from flexnorm.optim.rows import RowLayout, from_rows, row_axis, to_rows
from flexnorm.probe import arguments, isolated, private_randomness, tensors

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
        change: Change of the output when rows are rescaled, relative to the change when their direction is; NaN where
            this was not tried.
        rows: Number of weight vectors; 0 for vectors and scalars.
        n: Length of one weight vector.
        row_dim: Axis of the output units (1 for transposed convolutions and weights ``(in, out)``).
        row_groups: Groups of the convolution.
        modules: Names of all modules that use the parameter (several for tied weights).
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
        return InvarianceReport([r if r.reason else _test(r, probe, tolerance) for r in candidates], select)


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
        return replace(report, selected=True, reason="scale invariant", change=change)
    reason = f"rescaling rows changes the output ({change:.2g} of what a new direction does)"
    if probe.distance(name, weight * 4) / influence <= tolerance:
        reason = "invariant only when all rows are scaled alike: the norm behind it mixes its outputs"
    return replace(report, reason=reason, change=change)


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

    def run(self, changed: dict[str, Tensor]) -> Tensor:
        """Return the outputs as one vector, with some parameters exchanged, from one state of buffers and one seed."""
        buffers = {name: _wide(b).clone() for name, b in self.model.named_buffers()}
        with private_randomness({self.device}, 0):
            state = {**self.parameters, **changed, **buffers}
            output = torch.func.functional_call(self.model, state, self.args, self.kwargs)
        return torch.cat([t.detach().double().flatten() for t in tensors(output) if t.is_floating_point()])

    def distance(self, name: str, weight: Tensor) -> float:
        """Return the length of the change of the outputs when one parameter is exchanged, relative to their length.

        Zero if it is below rounding, infinity if an output is no number.
        """
        other = self.run({name: weight})
        relative = float((other - self._base).norm() / self._base.norm().clamp(min=1e-300))
        if relative != relative:
            return float("inf")
        return relative if relative > 1e-9 else 0.0


def _wide(t: Tensor) -> Tensor:
    """Low precision to float32; everything else as it is."""
    return t.float() if t.is_floating_point() and t.dtype != torch.float64 else t
