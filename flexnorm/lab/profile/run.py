"""profile: train a network for some steps under the monitors, then put the numbers of every layer together."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexnorm.lab.data import ImageData, load, stratified
from flexnorm.lab.profile.bound import BoundWatch, bounded
from flexnorm.lab.profile.load import load_model, load_weights
from flexnorm.lab.profile.population import census
from flexnorm.lab.profile.records import LayerProfile, Profile
from flexnorm.lab.profile.sites import find_sites, own_weight, watched
from flexnorm.lab.profile.verdict import LIMITS, Limits, judge
from flexnorm.lab.run import environment
from flexnorm.lab.run.optimizers import make_optimizer
from flexnorm.nn import needs_batch
from flexnorm.nn.normprop import NormPropUnits, propagate
from flexnorm.optim import scale_invariant_weights
from flexnorm.probe import isolated
from flexnorm.shift import ShiftMonitor, WeightMonitor
from flexnorm.statistics import has_statistics, is_frozen, recalibrate
from flexnorm.theory import advise
from flexnorm.theory.regularization import batch_norm_layers


def profile(
    model: str | nn.Module,
    data: str | ImageData = "digits",
    *,
    norm: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    steps: int = 100,
    batch_size: int = 64,
    lr: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    limit: int | None = None,
    device: str = "auto",
    layers: Any = None,
    measurements: int = 10,
    probe: int = 128,
    population: int = 1024,
    seed: int = 0,
    limits: Limits = LIMITS,
) -> Profile:
    """Train a network for some steps and say, layer by layer, what its normalization does and what to change.

    The shift is measured while it trains, ``measurements`` times over one update each; noise of the batch statistics,
    gamma decay, and dead and saturated channels on the network as the steps leave it.

    Args:
        model: What :func:`load_model` takes, or a module, of which a copy is trained.
        data: What :func:`flexnorm.lab.data.load` takes, or loaded data.
        norm: Normalization of a model that is built here.
        checkpoint: File of weights to begin with, see :func:`load_model`.
        steps: Updates to make, by SGD with Nesterov momentum at a constant rate.
        batch_size: Images per update.
        lr: Learning rate.
        momentum: Momentum, 0 to below 1.
        weight_decay: Weight decay of all parameters.
        limit: Use at most this many training images.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"mps"``.
        layers: Which layers, as for :class:`flexnorm.shift.ShiftMonitor`; by default the normalization layers, or all
            with a weight in a model without any.
        measurements: How often to measure the shift of one update, at most ``steps`` times.
        probe: Images on which the shift is measured.
        population: About how many images to measure noise, decay and channels on, in batches of ``batch_size``; at
            least two batches where the data has as many.
        seed: Seed of the weights, the order of the images and the probe.
        limits: Where a number becomes a finding.

    Returns:
        The profile. The global random state, and a module that was given, are left as they were.

    Raises:
        ValueError: An argument is out of range, or model and data do not fit.
        ImportError: Something that the model or the data needs is not installed.
        FileNotFoundError: There is no such data or checkpoint.

    Example:
        >>> result = profile("convnet", "digits", norm="batch", steps=4, measurements=2, limit=256, population=128)
        >>> [layer.layer for layer in result.layers]
        ['layer1.norm', 'layer2.norm', 'layer3.norm']
    """
    began = time.perf_counter()
    numbers = {"steps": steps, "batch_size": batch_size, "measurements": measurements, "probe": probe}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number from 1 on, not {value!r}")
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr must be a positive number, not {lr!r}")
    place = _device(device)
    images = load(data, limit=limit) if isinstance(data, str) else data
    if batch_size > len(images.x_train):
        raise ValueError(f"batch_size is {batch_size}, but there are only {len(images.x_train)} training images")
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        torch.manual_seed(seed)
        network, name = _network(model, images, norm, checkpoint)
        network.to(place).train()
        _check(network, images, batch_size, place)
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": True}
        run = _Run(network, images, place, seed, layers, min(probe, len(images.x_train)))
        run.train(settings, steps, batch_size, measurements)
        rows = run.after(batch_size, population)
    result = Profile(
        model=name,
        norm=(norm or "batch") if isinstance(model, str) and ":" not in model else norm,
        data=images.name,
        checkpoint=None if checkpoint is None else os.fspath(checkpoint),
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        device=str(place),
        seed=seed,
        measurements=run.measured,
        probe=len(run.probe),
        images=run.images,
        loss_first=run.mean_loss(first=True),
        loss_last=run.mean_loss(first=False),
        diverged_at=run.diverged_at,
        layers=tuple(rows),
        environment=environment.describe(place),
    )
    return replace(judge(result, limits), seconds=time.perf_counter() - began)


@dataclass
class _Run:
    """One short training and what was seen in it."""

    model: nn.Module
    data: ImageData
    device: torch.device
    seed: int
    layers: Any
    probe_size: int
    losses: list[float] = field(default_factory=list)
    diverged_at: int | None = None
    images: int = 0
    measured: int = 0

    def __post_init__(self) -> None:
        chosen = stratified(self.data.y_train.numpy(), self.probe_size, seed=0)
        self.probe = self.data.x_train[torch.from_numpy(chosen)].to(self.device)
        self.rows: dict[str, LayerProfile] = {}

    def train(self, settings: dict[str, Any], steps: int, batch_size: int, measurements: int) -> None:
        """Make the steps; afterwards ``rows`` holds what the monitors saw."""
        example = self.data.x_train[:2].to(self.device)
        optimizer, _ = make_optimizer(self.model, "sgd", settings, example)
        every = max(1, steps // measurements)
        options: dict[str, Any] = {"every": every, "anchor": "both"}
        monitor = ShiftMonitor(self.model, self.probe, watched(self.model, self.layers), **options)
        self.sites = find_sites(self.model, self.probe, monitor)
        weights = sorted({site.weight for site in self.sites if site.weight is not None})
        invariant = _invariant(self.model, example)
        bounds = BoundWatch(self.sites)
        with ExitStack() as stack:
            stack.enter_context(monitor)
            turning = (
                stack.enter_context(WeightMonitor(self.model, optimizer, weights, every=every)) if weights else None
            )
            for step, (x, y) in enumerate(self._batches(steps, batch_size)):
                if step % every == 0:
                    bounds.before(self.model, self.probe)
                if not self._update(optimizer, x, y):
                    self.diverged_at = step + 1
                    break
                if any(record.anchor == "previous" for record in monitor.step()):
                    bounds.after(self.model, self.probe)
                if turning is not None:
                    turning.step()
        self.measured = len({record.step for record in monitor.records if record.anchor == "previous"})
        self._note(monitor, turning, bounds, invariant)

    def _update(self, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> bool:
        optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        self.losses.append(float(loss.detach()))
        if not math.isfinite(self.losses[-1]):
            return False
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return True

    def _batches(self, count: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            order = torch.randperm(len(self.data.x_train), generator=generator)
            for first in range(0, len(order) - size + 1, size):
                if count == 0:
                    return
                count -= 1
                chosen = order[first : first + size]
                yield self.data.x_train[chosen].to(self.device), self.data.y_train[chosen].to(self.device)

    def _note(
        self, monitor: ShiftMonitor, turning: WeightMonitor | None, bounds: BoundWatch, invariant: set[str] | None
    ) -> None:
        by_weight = {} if turning is None else turning.summary()
        for site in self.sites:
            records = [record for record in monitor.records if record.layer == site.name]
            steps = [record for record in records if record.anchor == "previous"]
            since = [record for record in records if record.anchor == "initial"]
            turned = by_weight.get(site.weight or "", {})
            length = [r.norm for r in turning.records if r.layer == site.weight][-1:] if turning is not None else []
            self.rows[site.name] = LayerProfile(
                layer=site.name,
                kind=type(site.module).__name__,
                channels=site.channels,
                positions=site.positions,
                w1=_mean([r.w1 for r in steps]),
                lower=_mean([r.lower for r in steps]),
                upper=_mean([r.upper for r in steps]),
                relative=_mean([r.relative for r in steps]),
                relative_since_start=_mean([r.relative for r in since[-1:]]),
                bound=bounds.mean(site.name),
                mixes_batch=site.mixes_batch,
                weight=site.weight,
                invariant=None if invariant is None or site.weight is None else site.weight in invariant,
                angle=_finite(turned.get("angle")),
                norm=_mean(length),
                effective_rate=_finite(turned.get("effective_rate")),
                activation=None if site.activation is None else type(site.activation).__name__,
            )

    def after(self, batch_size: int, population: int) -> list[LayerProfile]:
        """Measure the network as it is now; return the complete rows."""
        if self.diverged_at is not None:
            return list(self.rows.values())
        generator = torch.Generator().manual_seed(self.seed + 1)
        order = torch.randperm(len(self.data.x_train), generator=generator)
        count = min(len(order) // batch_size, max(2, population // batch_size))
        parts = (order[i * batch_size : (i + 1) * batch_size] for i in range(count))
        chosen = [self.data.x_train[part].to(self.device) for part in parts]
        self.images = count * batch_size
        counted = census(self.model, chosen, self.sites)
        decay = _decay(self.model, torch.cat(chosen), max(batch_size, 2))
        propagated = _propagated(self.model, self.probe)
        rows = []
        for name, row in self.rows.items():
            seen, (zeta, added) = counted[name], decay.get(name, (None, None))
            chi, variance = propagated.get(name, (None, None))
            rows.append(
                replace(
                    row,
                    noise=seen.noise,
                    staleness=seen.staleness,
                    dead=seen.dead,
                    saturated=seen.saturated,
                    zeta=zeta,
                    decay=added,
                    chi=chi,
                    input_var=variance,
                )
            )
        return rows

    def mean_loss(self, *, first: bool) -> float | None:
        """Mean of the first or last tenth of the losses."""
        part = max(1, len(self.losses) // 10)
        return _mean(self.losses[:part] if first else self.losses[-part:])


def _decay(model: nn.Module, images: Tensor, batch_size: int) -> dict[str, tuple[float, float]]:
    """By layer, zeta and what BatchNorm's noise adds to the loss, with exact population statistics; may be empty."""
    model = copy.deepcopy(model)
    if not batch_norm_layers(model) or len(images) < 4:
        return {}
    batches = [images[first : first + 256] for first in range(0, len(images), 256)]
    if any(has_statistics(module) and not is_frozen(module) for module in model.modules()):
        recalibrate(model, batches, process_group=None)
    advice = advise(model, batches, batch_size, max_images=len(images))
    # The theory is that of BatchNorm: layers that use batch statistics in another way are not covered by it.
    known = {name for name, module in model.named_modules() if bounded(module)}
    return {row.layer: (row.zeta, row.penalty) for row in advice.layers if row.layer.split("#")[0] in known}


def _propagated(model: nn.Module, images: Tensor) -> dict[str, tuple[float, float | None]]:
    """By layer of Normalization Propagation, chi and the measured variance of its pre-activations."""
    if not any(isinstance(module, NormPropUnits) for module in model.modules()):
        return {}
    return {row.name: (row.chi, _finite(row.input_var)) for row in propagate(model, images)}


def _network(
    model: str | nn.Module, data: ImageData, norm: str | None, checkpoint: str | os.PathLike[str] | None
) -> tuple[nn.Module, str]:
    if isinstance(model, str):
        channels, classes = data.shape[0], data.num_classes
        network = load_model(model, norm=norm, in_channels=channels, num_classes=classes, checkpoint=checkpoint)
        return copy.deepcopy(network), model
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a name or a module, got {type(model).__name__}")
    if norm is not None:
        raise ValueError(f"norm={norm!r} is for models that are built here; convert the module with flexnorm.convert")
    network = copy.deepcopy(model)
    if checkpoint is not None:
        load_weights(network, Path(checkpoint).expanduser())
    return network, type(model).__name__


def _check(model: nn.Module, data: ImageData, batch_size: int, device: torch.device) -> None:
    """Refuse what cannot be trained, in words, before the first step."""
    if batch_size == 1 and any(needs_batch(m) and not is_frozen(m) for m in model.modules()):
        raise ValueError(
            "batch_size is 1, and the model has layers that normalize by the statistics of the batch: one image has "
            "none but its own. Profile with at least 2, or freeze or convert these layers first "
            "(flexnorm.freeze, flexnorm.convert)"
        )
    images = data.x_train[: min(2, batch_size)].to(device)
    model.eval()
    with torch.no_grad():
        # In this mode first: what a lazy layer makes of itself must stay, which what is called in isolation does not.
        _logits(model, images, data.num_classes, "in evaluation")
    model.train()
    with isolated(model, seed=0):
        _logits(model, images, data.num_classes, "in training")
    if not any(own_weight(module) is not None for module in model.modules()):
        raise ValueError("the model has no weights to train")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("no parameter of the model requires a gradient, so there is nothing to train")


def _logits(model: nn.Module, images: Tensor, classes: int, when: str) -> None:
    wanted = f"logits of shape (images, {classes})"
    try:
        output = model(images)
    except Exception as error:
        # Whatever a model that is not ours raises.
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise ValueError(
            f"the model fails {when} on images of shape {tuple(images.shape[1:])}: {reason}. Give data of the size "
            "that the model takes, or a package.module:factory that makes one for this size"
        ) from error
    if not isinstance(output, Tensor):
        raise ValueError(f"the model must return {wanted}, it returns {type(output).__name__} {when}")
    if output.ndim != 2 or output.shape[1] < classes:
        raise ValueError(
            f"the model must return {wanted} or more, it returns {tuple(output.shape)} for {len(images)} images {when}"
        )


def _invariant(model: nn.Module, example: Tensor) -> set[str] | None:
    """Names of the scale-invariant weights; ``None`` where they cannot be found out."""
    try:
        return set(scale_invariant_weights(model, example).selected)
    except (ValueError, RuntimeError):
        return None


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _mean(values: Sequence[float]) -> float | None:
    return _finite(math.fsum(values) / len(values)) if values and all(map(math.isfinite, values)) else None
