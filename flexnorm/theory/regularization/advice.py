"""How strongly the BN layers of a network regularize it, and the gamma decay that another batch size would need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flexnorm.probe import Loss, Selection, batch_norm_layers, capture
from flexnorm.theory.regularization.strength import (
    DecayRow,
    LayerStrength,
    joint_strength,
    layer_strength,
    merge_tables,
)
from flexnorm.theory.regularization.zeta import statistics_noise


@dataclass(frozen=True)
class LayerAdvice(DecayRow):
    """The regularization of one layer at the batch size asked for: zeta is the gamma decay that BN amounts to.

    Attributes:
        zeta_per_channel: All of them, as a tuple.
        joint_penalty: `penalty` with the channels of a batch noisy together, which is what happens.
        mean_share: Part of `penalty` that comes from the batch mean, in [0, 1]; the rest is the batch variance's.
        effective_batch_mean: Median over channels of the effective number of independent values behind the batch mean:
            the batch size for (N, C) inputs, more for images; batch size times positions where these are uncorrelated.
        effective_batch_std: The same for the batch standard deviation (in Gaussian values).
    """

    zeta_per_channel: tuple[float, ...]
    joint_penalty: float
    mean_share: float
    effective_batch_mean: float
    effective_batch_std: float


@dataclass(frozen=True)
class Advice:
    """The answer of `advise`.

    Attributes:
        batch_size: The batch size M that it is about.
        images: Number of images that it was estimated from.
        loss: Name of the loss (or of the function) whose curvature was used.
        layers: One entry per layer and call.
        strengths: The estimates behind them, by layer, independent of the batch size; for `BatchNoise`.
    """

    batch_size: int
    images: int
    loss: str
    layers: tuple[LayerAdvice, ...]
    strengths: dict[str, LayerStrength] = field(repr=False)

    @property
    def penalty(self) -> float:
        """Sum of the layers' penalties, in units of the loss."""
        return sum(layer.penalty for layer in self.layers)

    def compensation(self, batch_size: int) -> dict[str, tuple[float, ...]]:
        """Return the decay per channel that keeps the regularization when the batch size changes.

        Added to the loss as ``sum(value gamma^2)`` it keeps the regularization that `self.batch_size` exerts:
        ``zeta(M) - zeta(M')``. Negative where the new batch is smaller: then BN itself regularizes more than before,
        which no decay can undo (lower other regularization instead).

        Args:
            batch_size: The new batch size M', at least 2.

        Raises:
            ValueError: If it is below 2.
        """
        statistics_noise(batch_size)
        factor = 1.0 - self.batch_size / batch_size
        return {layer.layer: tuple(factor * value for value in layer.zeta_per_channel) for layer in self.layers}

    def asdict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts, ready for JSON."""
        rows = [{**vars(layer), "zeta_per_channel": list(layer.zeta_per_channel)} for layer in self.layers]
        values = {name: value for name, value in vars(self).items() if name != "strengths"}
        return {**values, "penalty": self.penalty, "layers": rows}

    def table(self, batch_size: int | None = None) -> str:
        """Return the advice as lines of text, with the decay that another batch size needs if one is given."""
        change = None if batch_size is None else self.compensation(batch_size)
        lines = [f"{'layer':<28} {'zeta':>9} {'gamma^2':>9} {'penalty':>9} {'joint':>9} {'mean part':>9} {'values':>8}"]
        for r in self.layers:
            line = f"{r.layer:<28} {r.zeta:9.2e} {r.gamma_squared:9.3g} {r.penalty:9.2e} {r.joint_penalty:9.2e}"
            lines.append(f"{line} {r.mean_share:9.0%} {r.effective_batch_mean:8.0f}")
            if change:
                lines[-1] += f" {sum(change[r.layer]) / r.channels:12.2e}"
        lines[0] += f" {f'add at {batch_size}':>12}" if change else ""
        total = f"total penalty at batch size {self.batch_size}: {self.penalty:.3g} of the loss ({self.images} images)"
        return "\n".join([*lines, total])


def advise(
    model: nn.Module,
    batches: Iterable[Tensor | Sequence[Any]],
    batch_size: int,
    *,
    loss: Loss = "cross_entropy",
    layers: Selection | None = None,
    max_images: int = 2048,
    seed: int = 0,
) -> Advice:
    """Measure how strongly the batch noise of every BN layer regularizes a model (Luo et al. 2019, Eq. 3, generalized).

    One forward and one backward pass per batch in evaluation mode; the model, its gradients and the random state stay
    as they were. Each layer is taken alone, with population statistics in all others.

    Args:
        model: A model whose BN layers have meaningful running statistics (trained, or recalibrated). Population and
            unitized layers are reported too: for population normalization, what BN in their place would exert.
        batches: Inputs (N, *), or ``(inputs, targets, ...)``; their size has nothing to do with `batch_size`.
        batch_size: The training batch size M to report for, at least 2.
        loss: Loss whose curvature counts; see `CURVED_LOSSES`, or a function ``loss(outputs, targets)``.
        layers: Which layers, as in :func:`flexnorm.probe.select`; all batch-normalized ones by default.
        max_images: Where to stop reading batches.
        seed: Of the draws of the curvature.

    Returns:
        The advice, layer by layer.

    Raises:
        ValueError: If there are no batches, fewer than 4 images, no such layers, or an argument is out of range.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        >>> advice = advise(model, [torch.randn(256, 4)], batch_size=32)
        >>> round(advice.layers[0].effective_batch_mean)
        32
    """
    statistics_noise(batch_size)
    found = batch_norm_layers(model, layers)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator(device).manual_seed(seed)
    seen, collected = 0, []
    for batch in batches:
        inputs, *rest = (batch,) if isinstance(batch, Tensor) else batch
        inputs, targets = inputs.to(device), rest[0].to(device) if rest and isinstance(rest[0], Tensor) else None
        collected.append(capture(model, inputs, loss, targets, layers=layers, generator=generator))
        seen += len(inputs)
        if seen >= max_images:
            break
    rows, strengths = [], {}
    for table in merge_tables(collected):
        strength = layer_strength(table)
        strengths[table.name] = strength
        weight = getattr(found[table.name.split("#")[0]], "weight", None)
        gamma = torch.ones_like(strength.mean_part) if weight is None else weight.detach().to(strength.mean_part)
        zeta = strength.zeta(batch_size)
        from_mean, from_std = (
            float((part * gamma.square()).sum()) / batch_size for part in (strength.mean_part, strength.std_part)
        )
        means, deviations = (
            round(batch_size * float(variance.clamp_min(1e-12).reciprocal().median()), 6)
            for variance in (strength.mean_variance, strength.square_variance / 2)
        )
        row = LayerAdvice.of(
            table.name,
            zeta,
            gamma,
            zeta_per_channel=tuple(zeta.tolist()),
            joint_penalty=joint_strength(table, gamma) / batch_size,
            mean_share=from_mean / (from_mean + from_std) if from_mean + from_std > 0 else 0.0,
            effective_batch_mean=means,
            effective_batch_std=deviations,
        )
        rows.append(row)
    name = loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
    return Advice(batch_size, seen, name, tuple(rows), strengths)
