"""What a profile is: plain numbers by layer, what follows from them in words, and both as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from flexnorm.lab.files import plain

Level = Literal["fine", "look", "act"]
"""How urgent a finding is: nothing to do, worth a look, or change something."""

_LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True)
class Finding:
    """One sentence of a verdict, with the number behind it.

    Attributes:
        level: ``"fine"``, ``"look"`` or ``"act"``.
        topic: ``"shift"``, ``"noise"``, ``"statistics"``, ``"decay"``, ``"rate"``, ``"channels"``,
            ``"propagation"``, ``"loss"`` or ``"layers"``.
        value: The number that the sentence rests on; the sentence contains it.
        text: The sentence.
    """

    level: Level
    topic: str
    value: float
    text: str


@dataclass(frozen=True)
class LayerProfile:
    """The measurements of one layer. What does not apply to a layer, or could not be measured, is ``None``.

    Attributes:
        layer: Name in the model; a layer called more than once has ``#2``, ``#3`` ... appended.
        kind: Class of the layer.
        channels: C, the dimension of the space in which the shift is a distance.
        positions: Spatial positions of its output, P (1 for (N, C)).
        w1: Wasserstein-1 distance that one update moves the output of the probe, mean over the measurements.
        lower: Certified lower bound of it, mean over the measurements.
        upper: Certified upper bound of it, mean over the measurements.
        relative: ``w1`` over the spread of the output.
        relative_since_start: Distance between the first and the last measurement, over the spread at the start.
        bound: Bound on ``w1`` from the parameters of the layer alone, mean over the measurements
            (:func:`flexnorm.shift.layer_bound`).
        mixes_batch: Whether it normalizes with the statistics of the training batch.
        noise: Error of a standardized activation because the batch's statistics are not the population's, root mean
            square over channels and batches, in standard deviations: ``sqrt(Var(mu_B) + Var(sigma_B)) / sigma``. For
            a layer that does not mix the batch: what BatchNorm in its place would have.
        staleness: The same error for the running statistics, as the training left them.
        zeta: Mean over the channels of the gamma decay that the noise of BatchNorm amounts to here (Luo et al. 2019);
            for batch, unitized and population layers.
        decay: ``sum(zeta gamma^2)``: what this adds to the loss.
        weight: Name of the weight that was last used before the layer.
        invariant: Whether the length of that weight does not matter to the network.
        angle: Mean angle that its vectors turn in one update, in radians.
        norm: Root mean square length of its vectors at the last measurement.
        effective_rate: Learning rate over squared length, mean over the vectors.
        activation: Class of the activation that takes the output of the layer as it is.
        dead: Channels whose output is constant, or never positive where a rectifier follows, on all images looked at.
        saturated: Channels of which 95 % of the outputs lie where the activation that follows is flat (within 1 % of
            its limits).
        chi: For layers of Normalization Propagation: growth of a sample's deviation in mean square, from the
            parameters alone (:func:`flexnorm.nn.normprop.propagate`).
        input_var: For the same layers: variance of the normalized pre-activations, which propagation takes for 1.
        findings: The verdict.
    """

    layer: str
    kind: str
    channels: int
    positions: int
    w1: float | None = None
    lower: float | None = None
    upper: float | None = None
    relative: float | None = None
    relative_since_start: float | None = None
    bound: float | None = None
    mixes_batch: bool = False
    noise: float | None = None
    staleness: float | None = None
    zeta: float | None = None
    decay: float | None = None
    weight: str | None = None
    invariant: bool | None = None
    angle: float | None = None
    norm: float | None = None
    effective_rate: float | None = None
    activation: str | None = None
    dead: int | None = None
    saturated: int | None = None
    chi: float | None = None
    input_var: float | None = None
    findings: tuple[Finding, ...] = ()

    @property
    def level(self) -> Level:
        """The most urgent of its findings."""
        return _worst(self.findings)


@dataclass(frozen=True)
class Profile:
    """The measurements and verdicts of a model.

    Attributes:
        model: What was profiled: a name, or the class of the module.
        norm: Normalization the model was built with, where this package built it.
        data: Name of the data.
        checkpoint: File that the weights came from.
        steps: Updates made.
        batch_size: Images per update.
        lr: Learning rate.
        device: Where it ran.
        seed: Seed of weights, order and probe.
        measurements: Number of pairs of steps that the shift is a mean over.
        probe: Images that the shift was measured on.
        images: Images that noise, decay and channels were measured on.
        loss_first: Mean training loss of the first tenth of the updates.
        loss_last: Mean training loss of the last tenth; ``None`` if it is not finite.
        diverged_at: The update at which the loss was not finite any more, if that happened.
        layers: One entry per layer, in the order of the calls.
        findings: The verdict on the whole, most urgent first.
        environment: Versions and hardware.
        seconds: How long it took.
    """

    model: str
    norm: str | None
    data: str
    checkpoint: str | None
    steps: int
    batch_size: int
    lr: float
    device: str
    seed: int
    measurements: int
    probe: int
    images: int
    loss_first: float | None
    loss_last: float | None
    diverged_at: int | None
    layers: tuple[LayerProfile, ...]
    findings: tuple[Finding, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def level(self) -> Level:
        """The most urgent finding, of the layers too."""
        return _worst([*self.findings, *(finding for layer in self.layers for finding in layer.findings)])

    def asdict(self) -> dict[str, Any]:
        """Return plain values ready for strict JSON: numbers that are not finite become ``None``."""
        values: dict[str, Any] = plain(dataclasses.asdict(self)) | {"format": 1, "level": self.level}
        for row, layer in zip(values["layers"], self.layers, strict=True):
            row["level"] = layer.level
        return values


def urgency(finding: Finding) -> int:
    """Return 0 for a finding that is fine, 1 for one to look at, 2 for one to act upon."""
    return _LEVELS.index(finding.level)


def _worst(findings: Iterable[Finding]) -> Level:
    return _LEVELS[max(map(urgency, findings), default=0)]
