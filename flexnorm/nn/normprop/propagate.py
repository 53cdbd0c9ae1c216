"""What every NormProp layer of a network does to mean, variance and perturbations: predicted, and measured.

How to read the report: ``docs/normprop.md``, "Looking inside".
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flexnorm.nn.normprop.activation import NormPropUnits
from flexnorm.nn.normprop.elementwise import per_channel
from flexnorm.nn.normprop.integrals import GaussianMoments
from flexnorm.nn.normprop.layer import NormPropLayer, normprop_layers

_SEED_OFFSET = 0x6B65656C


class CanonicalError(NamedTuple):
    """Coherence of a layer's filters and the canonical error of its pre-activations.

    Attributes:
        coherence: mu, the largest absolute cosine between two filters that see the same channels; 0 if there is no
            such pair.
        error: ||W W^T - I||_F of the unit filters: the distance of the covariance from diagonal under white input.
        bound: Its upper bound, ``mu sqrt(number of ordered pairs)``.
    """

    coherence: float
    error: float
    bound: float


def _off_diagonal(layer: NormPropLayer) -> Tensor:
    """Cosines between filters of the same group, ``(groups, m, m)``, diagonal zero."""
    rows = layer.unit_rows()
    rows = rows.reshape(layer.groups, -1, rows.shape[1])
    gram = rows @ rows.transpose(1, 2)
    eye = torch.eye(gram.shape[-1], dtype=torch.bool, device=gram.device)
    return gram.masked_fill(eye, 0.0)


@torch.no_grad()
def canonical_error(layer: NormPropLayer) -> CanonicalError:
    """Return coherence, canonical error and its bound (Proposition 1) of one layer.

    Filters of different groups see different channels and are orthogonal by construction; for convolutions the rows
    are whole filters, which compares responses at the same position.

    Args:
        layer: Any NormProp layer.
    """
    cosines = _off_diagonal(layer).double()
    groups, m, _ = cosines.shape
    mu = float(cosines.abs().amax())
    return CanonicalError(mu, float(cosines.square().sum().sqrt()), mu * (groups * m * (m - 1)) ** 0.5)


def coherence_penalty(model: nn.Module) -> Tensor:
    """Mean squared cosine between filters, averaged over the NormProp layers of ``model``: a regularizer.

    It is the squared canonical error per pair of filters, between 0 (orthogonal filters) and 1; random filters of
    fan-in K give 1/K, which is also about the least that more filters than K can reach. Add ``strength *
    coherence_penalty(model)`` to the loss.

    Args:
        model: The network.

    Returns:
        A differentiable scalar; 0 if no layer has two filters that could be compared.

    Warns:
        flexnorm.NothingDone: If the model has no NormProp layer.
    """
    terms: list[Tensor] = []
    for module in normprop_layers(model, "coherence_penalty(model) is 0"):
        if module.out_channels > module.groups:
            cosines = _off_diagonal(module)
            groups, m, _ = cosines.shape
            terms.append(cosines.square().sum() / (groups * m * (m - 1)))
    return torch.stack(terms).mean() if terms else torch.zeros(())


@dataclass(frozen=True)
class LayerPropagation:
    """One call of one layer.

    Attributes:
        name: Name of the module in the model, with ``#2``, ``#3``, ... for further calls of a shared layer.
        kind: Class of the layer.
        activation: Name of its activation, None for an affine layer.
        units: Number of units (filters).
        fan_in: Length of a filter.
        chi: Slope of the map of a sample's mean square, averaged over units; 0 where samples are unitized.
        cumulative_chi: Product of chi up to this layer, in the order of listing: the growth of a sample's deviation
            along a plain chain. Skips make the growth slower than that.
        jacobian_gain: Expected squared gain of a random perturbation.
        correlation_gain: Slope at 0 of the map of the correlation of two samples.
        predicted_mean: Mean of the output, averaged over units.
        predicted_var: Variance of the output over data and units.
        coherence: Largest cosine between two filters.
        canonical_error: Distance of the pre-activations' covariance from diagonal, under white input.
        canonical_bound: Its bound by Proposition 1.
        measured_mean: Mean of the output on the batch; None without a batch.
        measured_var: Variance of the output on the batch, over samples, positions and units.
        conditional_mean: Predicted mean if each unit's pre-activation is Gaussian with the mean and variance measured
            on the batch.
        conditional_var: Predicted variance likewise.
        measured_chi: Slope of the output's mean square under a common scaling of the batch.
        measured_jacobian_gain: Squared gain of one random perturbation of the batch.
        input_var: Variance of the normalized pre-activations within units; prediction assumes 1.
        input_mean: Root mean square over units of their mean; prediction assumes 0.
        input_skewness: Skewness of the pre-activations within units, averaged; 0 for a Gaussian.
        input_kurtosis: Excess kurtosis likewise; 0 for a Gaussian.
    """

    name: str
    kind: str
    activation: str | None
    units: int
    fan_in: int
    chi: float
    cumulative_chi: float
    jacobian_gain: float
    correlation_gain: float
    predicted_mean: float
    predicted_var: float
    coherence: float
    canonical_error: float
    canonical_bound: float
    measured_mean: float | None = None
    measured_var: float | None = None
    conditional_mean: float | None = None
    conditional_var: float | None = None
    measured_chi: float | None = None
    measured_jacobian_gain: float | None = None
    input_var: float | None = None
    input_mean: float | None = None
    input_skewness: float | None = None
    input_kurtosis: float | None = None

    def asdict(self) -> dict[str, Any]:
        """All fields as plain Python values."""
        return dataclasses.asdict(self)


class PropagationReport(tuple[LayerPropagation, ...]):
    """Result of :func:`propagate`: the rows in the order of execution where a batch was given, else of the model.

    Prints as a table.
    """

    __slots__ = ()

    @property
    def layers(self) -> tuple[LayerPropagation, ...]:
        """The rows as a plain tuple."""
        return tuple(self)

    def asdicts(self) -> list[dict[str, Any]]:
        """One dictionary of plain Python values per layer."""
        return [layer.asdict() for layer in self]

    def __str__(self) -> str:
        measured = any(layer.measured_var is not None for layer in self)
        columns = {**_PREDICTED, **(_MEASURED if measured else {})}
        rows = [list(columns)]
        for layer in self:
            values = [getattr(layer, field) for field in columns.values()]
            rows.append(["-" if v is None else v if isinstance(v, str) else f"{v:.3g}" for v in values])
        first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
        lines = [
            "  ".join([row[0].ljust(first), *(cell.rjust(w) for cell, w in zip(row[1:], widths, strict=True))])
            for row in rows
        ]
        return "\n".join(lines + ["* measured on the batch"] * measured)


_PREDICTED = {"layer": "name", "chi": "chi", "cum. chi": "cumulative_chi", "J gain": "jacobian_gain"}
_PREDICTED |= {"mean": "predicted_mean", "var": "predicted_var", "coherence": "coherence"}
_MEASURED = {"mean*": "measured_mean", "var*": "measured_var", "cond. var*": "conditional_var", "chi*": "measured_chi"}
_MEASURED |= {"J gain*": "measured_jacobian_gain", "in var*": "input_var", "in kurt*": "input_kurtosis"}


def _predict(name: str, layer: NormPropUnits, before: float) -> tuple[Any, ...]:
    """The fields of a row that need no batch, in their order; ``before`` is the cumulative chi of the row before."""
    kind, activation = type(layer).__name__, None if layer.activation is None else layer.activation.name
    gains = [float(gain.mean()) for gain in layer.gains()]
    # Without a linear map there are no filters that could be coherent.
    fan_in, coherence = 1, CanonicalError(0.0, 0.0, 0.0)
    if isinstance(layer, NormPropLayer):
        fan_in, coherence = layer.weight.numel() // layer.out_channels, canonical_error(layer)
    slopes, moments = (gains[0], before * gains[0], *gains[1:]), _pooled(layer.predicted_moments())
    return name, kind, activation, layer.out_channels, fan_in, *slopes, *moments, *coherence


def _pooled(moments: GaussianMoments) -> tuple[float, float]:
    """Mean and variance over data and units: variances pool as the mean of variances plus the variance of means."""
    return float(moments.mean.mean()), float(moments.var.mean() + moments.mean.var(correction=0))


def _measure(layer: NormPropUnits, x: Tensor, generator: torch.Generator) -> dict[str, Any]:
    # (units, everything else)
    z = layer.preactivations(x).movedim(-1 - layer.spatial, 0).flatten(1).double()
    mean, var = z.mean(1), z.var(1, correction=0)
    scaled = (z - mean.unsqueeze(1)) * var.clamp_min(1e-30).rsqrt().unsqueeze(1)
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)
    y, radial = torch.func.jvp(layer.forward, (x,), (x,))[:2]
    change = torch.func.jvp(layer.forward, (x,), (direction,))[1]
    # A unit filter turns a white perturbation of unit variance into one of unit variance, borders aside: measure
    # against that.
    linear = layer.preactivations(x + direction) - layer.preactivations(x) if not layer.unitize else direction
    if layer.spread is not None and not layer.unitize:
        linear = linear * per_channel(layer.spread, layer.spatial, linear)
    flat = y.double()
    conditional_mean, conditional_var = _pooled(layer.predicted_moments(mean, var))
    return {
        "measured_mean": float(flat.mean()),
        "measured_var": float(flat.var(correction=0)),
        "conditional_mean": conditional_mean,
        "conditional_var": conditional_var,
        "measured_chi": float((y * radial).double().mean() / max(float(z.square().mean()), 1e-30)),
        "measured_jacobian_gain": float(change.double().square().mean() / linear.double().square().mean()),
        "input_var": float(var.mean()),
        "input_mean": float(mean.square().mean().sqrt()),
        "input_skewness": float(scaled.pow(3).mean()),
        "input_kurtosis": float(scaled.pow(4).mean() - 3),
    }


def propagate(model: nn.Module, batch: Any = None, *, seed: int = 0) -> PropagationReport:
    """Describe the propagation of mean, variance and perturbations through every NormProp layer of ``model``.

    Args:
        model: A network with NormProp layers.
        batch: What the model is called with (a tuple: its positional arguments), to measure beside the predictions;
            the model is put into evaluation mode for the call and back, without gradients. None: predictions from the
            parameters alone.
        seed: Of the random perturbation that measures the Jacobian gain. The global generator is not touched.

    Returns:
        A :class:`PropagationReport`; ``print`` it for a table.

    Raises:
        ValueError: If the model has no NormProp layer.

    Examples:
        >>> from flexnorm.nn.normprop import NormPropLinear
        >>> report = propagate(nn.Sequential(NormPropLinear(8, 8), NormPropLinear(8, 2, activation=None)))
        >>> round(report[0].chi, 2), report[1].activation
        (0.81, None)
    """
    named = {name: module for name, module in model.named_modules() if isinstance(module, NormPropUnits)}
    if not named:
        raise ValueError("the model has no NormProp layer; nothing propagates by constants in it")
    rows: list[LayerPropagation] = []

    def add(name: str, layer: NormPropUnits, measured: dict[str, Any]) -> None:
        rows.append(LayerPropagation(*_predict(name, layer, rows[-1].cumulative_chi if rows else 1.0), **measured))

    # Shifted, so that the perturbation is not the very noise that a user made with the same small seed.
    generator = torch.Generator().manual_seed(seed + _SEED_OFFSET)
    calls = Counter[str]()

    def after(name: str, layer: Any, args: tuple[Any, ...], _output: Any) -> None:
        calls[name] += 1
        # The measurement calls layer.forward, not the layer: it does not come back here.
        add(name + f"#{calls[name]}" * (calls[name] > 1), layer, _measure(layer, args[0], generator))

    with torch.no_grad(), ExitStack() as stack:
        if batch is None:
            for name, layer in named.items():
                add(name, layer, {})
            return PropagationReport(rows)
        for name, layer in named.items():
            stack.enter_context(layer.register_forward_hook(functools.partial(after, name)))
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        model.eval()
        model(*batch) if isinstance(batch, tuple) else model(batch)
    return PropagationReport(rows)
