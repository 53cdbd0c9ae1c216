"""What a profile is: plain numbers by layer, and the sentences that follow from them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
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


@dataclass(frozen=True)
class Limits:
    """Where a number becomes a finding. Rules of thumb, not theorems: change them where yours differ.

    Attributes:
        noise: From this error of a standardized activation on (in standard deviations) look, and act.
        shift: From this shift of one update, relative to the spread of the output, look, and act.
        staleness: From this error of the running statistics on look, and act.
        decay: From this share of the training loss on, the penalty that batch noise amounts to is worth a look, and
            acting upon.
        angle: From this turn of a weight in one update (radians) look, and act.
        still: Below this turn (radians) a weight hardly learns.
        dead: From this share of dead or saturated channels on look, and act.
        variance: From this factor on, by which the pre-activations of Normalization Propagation are off variance 1,
            look, and act.
    """

    noise: tuple[float, float] = (0.1, 0.25)
    shift: tuple[float, float] = (0.1, 0.3)
    staleness: tuple[float, float] = (0.25, 1.0)
    decay: tuple[float, float] = (0.1, 0.5)
    angle: tuple[float, float] = (0.1, 0.3)
    still: float = 1e-5
    dead: tuple[float, float] = (0.05, 0.25)
    variance: tuple[float, float] = (3.0, 10.0)


LIMITS = Limits()
"""The limits that :func:`flexnorm.lab.profile.profile` uses."""


def judge(result: Profile, limits: Limits = LIMITS) -> Profile:
    """Return a profile with the findings that follow from its numbers."""
    topics = (_noise, _shift, _statistics, _decay, _rate, _channels, _propagation)
    layers = tuple(
        replace(layer, findings=tuple(finding for topic in topics for finding in topic(layer, result, limits)))
        for layer in result.layers
    )
    whole = replace(result, layers=layers)
    return replace(whole, findings=tuple(sorted(_whole(whole, limits), key=urgency, reverse=True)))


def _statistics(layer: LayerProfile, result: Profile, limits: Limits) -> Iterator[Finding]:
    if (stale := layer.staleness) is not None and (level := _level(stale, limits.staleness)) != "fine":
        text = (
            f"the running statistics of {layer.layer} are off by {_number(stale)} standard deviations after "
            f"{result.steps} steps, so evaluation is not what training was: re-estimate them before you evaluate "
            f"(flexnorm.recalibrate), or train longer"
        )
        yield Finding(level, "statistics", stale, text)


def _noise(layer: LayerProfile, result: Profile, limits: Limits) -> Iterator[Finding]:
    noise, size = layer.noise, result.batch_size
    if noise is None or not layer.mixes_batch:
        return
    level = _level(noise, limits.noise)
    text = f"batch {size} gives statistics noise of {_percent(noise)} at {layer.layer}"
    if level != "fine":
        # Both variances fall as 1 / batch, so the noise falls as its root.
        enough = math.ceil(size * (noise / limits.noise[0]) ** 2)
        text += (
            ": synchronize it over processes, convert it to group or population normalization (flexnorm.convert), or "
            "freeze it once its running statistics are good (flexnorm.freeze); a batch of about "
            f"{enough} would bring it down to {_percent(limits.noise[0])}"
        )
    yield Finding(level, "noise", noise, text)


def _shift(layer: LayerProfile, result: Profile, limits: Limits) -> Iterator[Finding]:
    relative, w1 = layer.relative, layer.w1
    if relative is None or w1 is None or layer.lower is None or layer.upper is None:
        return
    level = _level(relative, limits.shift)
    text = f"one update moves the output of {layer.layer} by {_percent(relative)} of its spread (W1 {_number(w1)}, "
    text += f"certified between {_number(layer.lower)} and {_number(layer.upper)})"
    if layer.bound is not None:
        text += f"; its parameters allow {_number(layer.bound)}"
    if relative >= 1:
        # So far from small that nothing can be said by how much.
        text += f": lower the learning rate ({result.lr:g}) by orders of magnitude, or warm it up"
    elif level != "fine":
        text += (
            f": a learning rate of about {_number(result.lr * limits.shift[0] / relative)} instead of {result.lr:g} "
            f"would bring it down to about {_percent(limits.shift[0])}"
        )
    yield Finding(level, "shift", relative, text)


def _decay(layer: LayerProfile, result: Profile, limits: Limits) -> Iterator[Finding]:
    if layer.decay is None or layer.zeta is None or not result.loss_last:
        return
    share, size = layer.decay / result.loss_last, result.batch_size
    level, zeta = _level(share, limits.decay) if layer.mixes_batch else "fine", _number(layer.zeta)
    if layer.mixes_batch:
        text = (
            f"the noise of batch {size} acts at {layer.layer} like a gamma decay of {zeta}, which adds "
            f"{_percent(share)} to the loss"
        )
    else:
        text = (
            f"BatchNorm in place of {layer.layer} would act like a gamma decay of {zeta} at batch {size}, "
            f"{_percent(share)} of the loss; add it as flexnorm.optim.GammaDecay to have it here"
        )
    if share >= 1:
        text += " (so much that the expansion for small noise does not hold; take it for large)"
    if level != "fine":
        text += ": take back other regularization, or use a larger batch"
    yield Finding(level, "decay", layer.zeta, text)


def _rate(layer: LayerProfile, _: Profile, limits: Limits) -> Iterator[Finding]:
    if layer.angle is None or layer.weight is None:
        return
    level = _level(layer.angle, limits.angle)
    where = "" if layer.weight.startswith(f"{layer.layer}.") else f", before {layer.layer},"
    text = f"{layer.weight}{where} turns by {_number(layer.angle)} rad in one update"
    if layer.invariant and layer.effective_rate is not None:
        text += f" (scale invariant: effective learning rate {_number(layer.effective_rate)})"
    length = _number(layer.norm) if layer.invariant and layer.norm is not None else None
    if level != "fine":
        text += ": lower the learning rate, or warm it up"
        text += f"; longer vectors turn less, theirs have length {length}" if length else ""
    elif layer.angle < limits.still:
        level = "look"
        text += ": it hardly learns; raise the learning rate"
        text += f", or its weight decay, which shortens vectors of length {length}" if length else ""
    yield Finding(level, "rate", layer.angle, text)


def _channels(layer: LayerProfile, result: Profile, limits: Limits) -> Iterator[Finding]:
    meaning, remedy = "constant", "prune them, or lower the learning rate"
    if layer.activation in ("ReLU", "ReLU6"):
        meaning = f"constant, or never positive before its {layer.activation},"
        remedy = "prune them, lower the learning rate, or give the activation a negative slope"
    elif layer.activation == "Threshold":
        meaning, remedy = "constant, or never above its Threshold,", "prune them, or lower the threshold"
    flat = (layer.saturated, f"flat in its {layer.activation}", "lower gamma or the learning rate")
    for count, state, cure in ((layer.dead, meaning, remedy), flat):
        if count:
            share = count / layer.channels
            text = f"{count} of {layer.channels} channels of {layer.layer} ({_percent(share)}) are {state} "
            text += f"on {result.images} images: {cure}"
            level: Level = "act" if share >= limits.dead[1] else "look"
            yield Finding(level, "channels", float(count), text)


def _propagation(layer: LayerProfile, _: Profile, limits: Limits) -> Iterator[Finding]:
    variance = layer.input_var
    if variance is None or layer.chi is None:
        return
    level = _level(max(variance, 1 / variance) if variance > 0 else math.inf, limits.variance)
    text = f"the pre-activations of {layer.layer} have variance {_number(variance)} where propagation takes them for 1 "
    text += f"(chi {_number(layer.chi)})"
    if level != "fine":
        text += ": unitize=True restores 1 by construction, and a positive bias lowers chi "
        text += "(flexnorm.nn.normprop.propagate)"
    yield Finding(level, "propagation", variance, text)


def _whole(result: Profile, limits: Limits) -> Iterator[Finding]:
    first, last, layers = result.loss_first, result.loss_last, result.layers
    if (at := result.diverged_at) is not None:
        text = f"the loss was not finite any more at update {at}: lower the learning rate ({result.lr:g})"
        yield Finding("act", "loss", float(at), text)
    elif first is not None and last is not None:
        text = f"the loss went from {_number(first)} to {_number(last)} in {result.steps} updates"
        fell = last < first
        yield Finding("fine" if fell else "look", "loss", last, text + ("" if fell else ": it did not fall"))
    if shifts := [(layer.relative, layer.layer) for layer in layers if layer.relative is not None]:
        mean = math.fsum(value for value, _ in shifts) / len(shifts)
        top, where = max(shifts, key=lambda pair: pair[0])
        text = (
            f"one update moves the layers by {_percent(mean)} of their spread in the mean, most at {where} "
            f"({_percent(top)})"
        )
        yield Finding(_level(top, limits.shift), "shift", mean, text)
    mixing = [layer for layer in layers if layer.mixes_batch]
    if noises := [(layer.noise, layer.layer) for layer in mixing if layer.noise is not None]:
        top, where = max(noises, key=lambda pair: pair[0])
        text = (
            f"statistics noise of batch {result.batch_size} is largest at {where} ({_percent(top)}); "
            f"{sum(value >= limits.noise[0] for value, _ in noises)} of {len(noises)} layers reach "
            f"{_percent(limits.noise[0])}"
        )
        yield Finding(_level(top, limits.noise), "noise", top, text)
    decays = [layer.decay for layer in mixing if layer.decay is not None]
    if decays and last:
        share = math.fsum(decays) / last
        text = (
            f"the noise of BatchNorm regularizes like a penalty of {_percent(share)} of the loss, all layers together"
        )
        yield Finding(_level(share, limits.decay), "decay", share, text)
    if layers:
        act, look = (sum(layer.level == level for layer in layers) for level in ("act", "look"))
        text = f"of {len(layers)} layers {act} need a change and {look} a look"
        yield Finding("fine", "layers", float(act), text)


def _level(value: float, limits: tuple[float, float]) -> Level:
    return "act" if value >= limits[1] else "look" if value >= limits[0] else "fine"


def _number(value: float) -> str:
    return f"{value:.3g}"


def _percent(value: float) -> str:
    return f"{100 * value:.2g} %" if abs(value) < 1 else f"{100 * value:.0f} %"
