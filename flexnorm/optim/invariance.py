r"""Which weights of a network are scale invariant: found by trying, in any model.

A weight vector is scale invariant if the output of the network in training mode does not change when the vector is
multiplied by a positive number. Whether that holds depends on what comes behind it, so it is not read off the code but
tested: every row of one weight gets its own factor, and the outputs are compared.

How the test is made sharp:

- The factors are powers of two and the guard constants ``eps`` of all modules are set to nearly nothing for the time of
  the probe. Then an invariant weight changes nothing but the rounding of biases, and without a bias not one bit, while
  with the usual eps = 1e-5 a channel of variance 1e-3 would change by half a percent. (Training with eps is what it
  always was: invariance up to eps.)
- The change is compared with the change that another direction of the same weight makes. So a weight deep in a residual
  branch is judged by its own influence, and a weight without any influence is told apart from an invariant one.
- Parameters and inputs are random numbers, for the property is one of the architecture: a branch whose last gain is
  initialized to zero would otherwise look invariant.
- The model's own parameters and buffers are never written to; training flags, eps and the random number generators are
  restored.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flexnorm._messages import unknown_name
from flexnorm.optim.rows import RowLayout, from_rows, to_rows
from flexnorm.probe import arguments, tensors

__all__ = ["InvarianceReport", "WeightReport", "scale_invariant_weights"]

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
        row_dim: Axis of the output units (1 for transposed convolutions).
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


class InvarianceReport(Mapping[str, WeightReport]):
    """Verdicts by parameter name, in the order of ``model.named_parameters()``; prints as a table.

    Attributes:
        select: The rule that was applied, ``"probe"`` or ``"paper"``.
    """

    def __init__(self, reports: list[WeightReport], select: str) -> None:
        self.select = select
        self._reports = {report.name: report for report in reports}

    def __getitem__(self, name: str) -> WeightReport:
        return self._reports[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._reports)

    def __len__(self) -> int:
        return len(self._reports)

    @property
    def selected(self) -> list[str]:
        """Names of the weights that belong on the manifold."""
        return [name for name, report in self._reports.items() if report.selected]

    def __str__(self) -> str:
        width = max((len(name) for name in self._reports), default=0)
        lines = [
            f"{'manifold' if r.selected else '   -    '}  {name:<{width}}  {tuple(r.parameter.shape)!s:<18} {r.reason}"
            for name, r in self._reports.items()
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Candidate:
    name: str
    parameter: nn.Parameter
    row_dim: int
    row_groups: int
    convolution: bool
    modules: tuple[str, ...]


def scale_invariant_weights(
    model: nn.Module,
    example_input: Any = None,
    *,
    select: str = "probe",
    tolerance: float = 1e-3,
) -> InvarianceReport:
    """Find the weights of a model whose rows may be rescaled without changing its output in training mode.

    Args:
        model: Any module. It is left exactly as it was.
        example_input: What the model is called with: a tensor, a tuple of positional or a dict of keyword arguments,
            the batch on axis 0. Floating point tensors are replaced by Gaussian noise of that shape, in batches of 16.
        select: ``"probe"`` tests scale invariance. ``"paper"`` applies the rule of Cho and Lee (2017) instead:
            convolutions with more inputs than outputs (kernel elements times input channels > output channels), whether
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
        return InvarianceReport([_paper_rule(c) for c in candidates], select)
    if example_input is None:
        raise ValueError("probing needs example_input: what the model is called with, for example one batch of images")
    with Probe(model, example_input) as probe:
        return InvarianceReport([_test(c, probe, tolerance) for c in candidates], select)


def _candidates(model: nn.Module) -> list[_Candidate]:
    users: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {}
    for prefix, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(parameter, []).append((prefix, module))
    found = []
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"parameter {name!r} is lazy and has no shape yet: call the model once, then ask again")
        module = users[parameter][0][1]
        kernel = parameter.ndim >= 3 and hasattr(module, "kernel_size")
        transposed = kernel and bool(getattr(module, "transposed", False))
        groups = int(getattr(module, "groups", 1)) if kernel else 1
        prefixes = tuple(prefix for prefix, _ in users[parameter])
        found.append(_Candidate(name, parameter, int(transposed), groups, kernel, prefixes))
    if not found:
        raise ValueError("the model has no parameters")
    return found


def _report(c: _Candidate, selected: bool, reason: str, change: float = float("nan")) -> WeightReport:
    rows = n = 0
    if c.parameter.ndim >= 2:
        layout = RowLayout.of(c.parameter, c.row_dim, c.row_groups)
        rows, n = layout.rows, layout.n
    return WeightReport(
        c.name, c.parameter, selected, reason, change, rows, n, c.row_dim, c.row_groups if rows else 1, c.modules
    )


def _unfit(c: _Candidate) -> str | None:
    """Say why a parameter is out of the question whatever the network does with it, or None."""
    if c.parameter.ndim < 2:
        return "a vector or scalar (bias, gain), no weight vectors"
    if not c.parameter.is_floating_point():
        return f"not a real floating point weight ({c.parameter.dtype})"
    if c.parameter.numel() == 0:
        return "empty"
    if RowLayout.of(c.parameter, c.row_dim, c.row_groups).n == 1:
        return "rows of length one have no direction"
    return None


def _paper_rule(c: _Candidate) -> WeightReport:
    if reason := _unfit(c):
        return _report(c, False, reason)
    if not c.convolution:
        return _report(c, False, "not a convolution")
    layout = RowLayout.of(c.parameter, c.row_dim, c.row_groups)
    sides = f"{layout.n} inputs, {layout.rows} outputs"
    if layout.n > layout.rows:
        return _report(c, True, f"undercomplete convolution: {sides}")
    return _report(c, False, f"overcomplete convolution: {sides}")


def _test(c: _Candidate, probe: Probe, tolerance: float) -> WeightReport:
    if reason := _unfit(c):
        return _report(c, False, reason)
    layout = RowLayout.of(c.parameter, c.row_dim, c.row_groups)
    weight = probe.parameters[c.name]
    influence = probe.distance(c.name, probe.another(weight))
    if not influence > 0:
        return _report(c, False, "has no influence on the output in training mode")
    exponents = torch.arange(layout.rows) % 5 - 1  # neighbouring rows get different factors, 1/2 to 8
    change = probe.distance(c.name, _scaled(weight, layout, 2.0**exponents)) / influence
    if change <= tolerance:
        return _report(c, True, "scale invariant", change)
    jointly = probe.distance(c.name, weight * 4) / influence
    if jointly <= tolerance:
        reason = "invariant only when all rows are scaled alike: the norm behind it mixes its outputs"
        return _report(c, False, reason, change)
    return _report(c, False, f"rescaling rows changes the output ({change:.2g} of what a new direction does)", change)


def _scaled(weight: Tensor, layout: RowLayout, factors: Tensor) -> Tensor:
    out = torch.empty_like(weight)
    rows = to_rows(weight, layout)
    from_rows(rows * factors.to(rows).unsqueeze(1), out, layout)
    return out


class Probe:
    """Runs a model with other parameters and inputs, leaving it as it was. A context manager.

    Attributes:
        parameters: The random parameters by name.
    """

    def __init__(self, model: nn.Module, example_input: Any) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self._generator = torch.Generator().manual_seed(0)
        self.args, self.kwargs = self._noise(example_input)
        self.parameters: dict[str, Tensor] = {}
        self._timid = False

    def __enter__(self) -> Probe:
        self._flags = {module: module.training for module in self.model.modules()}
        self._eps = [
            (module, name, value)
            for module in self.model.modules()
            for name in _EPS_NAMES
            if isinstance(value := getattr(module, name, None), float) and value > 0
        ]
        self.model.train()
        try:
            self._find_base()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for module, training in self._flags.items():
            module.training = training
        self._set_eps(None)

    def _set_eps(self, value: float | None) -> None:
        for module, name, original in self._eps:
            setattr(module, name, original if value is None else value)

    def _find_base(self) -> None:
        """Choose the parameters: random and without eps if the network bears it, else as they are."""
        own = {name: _wide(p.detach()) for name, p in self.model.named_parameters()}
        drawn = {name: self.another(p) for name, p in own.items()}
        for self.parameters, eps in ((drawn, _NO_EPS), (own, _NO_EPS), (own, None)):
            self._timid = self.parameters is own
            self._set_eps(eps)
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

    def _noise(self, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return arguments like the example: noise, in batches of 16, where all of it is floating point."""
        args, kwargs = arguments(example)
        given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        noisy = all(t.is_floating_point() and t.ndim > 0 and len(t) == len(given[0]) for t in given)

        def like(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            if noisy:
                t = torch.randn((_PROBE_BATCH, *t.shape[1:]), generator=self._generator, dtype=t.dtype)
            return _wide(t).to(self.device)

        return tuple(like(t) for t in args), {name: like(t) for name, t in kwargs.items()}

    @torch.no_grad()
    def run(self, changed: dict[str, Tensor]) -> Tensor:
        """Return the outputs as one vector, with some parameters exchanged."""
        buffers = {name: _wide(b).clone() for name, b in self.model.named_buffers()}
        devices = [self.device] if self.device.type == "cuda" else []
        state = random.getstate()
        try:
            with torch.random.fork_rng(devices=devices), torch.autocast(self.device.type, enabled=False):
                torch.manual_seed(0)
                random.seed(0)
                state_dict = {**self.parameters, **changed, **buffers}
                output = torch.func.functional_call(self.model, state_dict, self.args, self.kwargs)
        finally:
            random.setstate(state)
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
