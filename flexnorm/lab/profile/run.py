"""profile: train a network for some steps under the monitors, then put the numbers of every layer together."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexnorm.lab.data import ImageData, load, stratified
from flexnorm.lab.profile.layers import BoundWatch, bounded, channel_numbers, find_sites, own_weight, watched
from flexnorm.lab.profile.load import load_model, load_weights
from flexnorm.lab.profile.progress import Notify, Phases
from flexnorm.lab.profile.records import LIMITS, LayerProfile, Limits, Profile, judge
from flexnorm.lab.run import environment
from flexnorm.lab.run.optimizers import make_optimizer
from flexnorm.nn import needs_batch
from flexnorm.nn.normprop import NormPropUnits, propagate
from flexnorm.optim import scale_invariant_weights
from flexnorm.probe import Selection, batch_norm_layers, first_tensor, isolated, unwrap
from flexnorm.shift import ShiftMonitor, WeightMonitor
from flexnorm.statistics import has_statistics, is_frozen, recalibrate
from flexnorm.theory import advise


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
    layers: Selection | None = None,
    measurements: int = 10,
    probe: int = 128,
    population: int = 1024,
    seed: int = 0,
    limits: Limits = LIMITS,
    notify: Notify = lambda _: None,
) -> Profile:
    """Train a network for some steps and say, layer by layer, what its normalization does and what to change.

    The shift is measured while it trains, ``measurements`` times over one update each; noise of the batch statistics,
    gamma decay, and dead and saturated channels on the network as the steps leave it.

    Args:
        model: What :func:`load_model` takes, or a module, of which a copy is trained. It takes images (N, C, H, W) and
            returns logits (N, classes or more): alone, first in a tuple or list, or in a mapping or an object (such as
            those of Transformers) as ``logits``; in place of these a ``last_hidden_state``, averaged over positions.
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
        notify: Called with every :class:`Progress`.

    Returns:
        The profile. The global random state, and a module that was given, are left as they were.

    Raises:
        ValueError: An argument is out of range, or model and data do not fit.
        ImportError: Something that the model or the data needs is not installed.
        FileNotFoundError: There is no such data or checkpoint.

    Examples:
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
    place, phases = _device(device), Phases(notify)
    phases.begin("loading data")
    images = load(data, limit=limit) if isinstance(data, str) else data
    if batch_size > len(images.x_train):
        raise ValueError(f"batch_size is {batch_size}, but there are only {len(images.x_train)} training images")
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        torch.manual_seed(seed)
        phases.begin("building and checking the model")
        network, name = _network(model, images, norm, checkpoint)
        unwrap(network).register_forward_hook(lambda _, __, output: _logits_of(output))  # the network is a copy
        network.to(place).train()
        _check(network, images, batch_size, place)
        chosen = stratified(images.y_train.numpy(), min(probe, len(images.x_train)), seed=0)
        run = _Run(network, images, images.x_train[torch.from_numpy(chosen)].to(place), seed, batch_size, phases)
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": True}
        run.train(settings, steps, measurements, layers)
        if run.diverged_at is None:
            run.measure(population)
    tenth = max(1, len(run.losses) // 10)
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
        loss_first=_mean(run.losses[:tenth]),
        loss_last=_mean(run.losses[-tenth:]),
        diverged_at=run.diverged_at,
        layers=tuple(LayerProfile(**values) for values in run.rows.values()),
        environment=environment.describe(place),
    )
    return replace(judge(result, limits), seconds=time.perf_counter() - began)


class _Run:
    """One short training of a model; ``rows`` holds what was seen in it, the fields of a profile by layer."""

    def __init__(
        self, model: nn.Module, data: ImageData, probe: Tensor, seed: int, batch_size: int, phases: Phases
    ) -> None:
        self.model, self.data, self.probe, self.seed, self.size = model, data, probe, seed, batch_size
        self.phases = phases
        self.losses: list[float] = []
        self.diverged_at: int | None = None
        self.images = self.measured = 0
        self.rows: dict[str, dict[str, Any]] = {}

    def train(self, settings: dict[str, Any], steps: int, measurements: int, layers: Selection | None) -> None:
        """Make the steps under the monitors."""
        self.phases.begin("finding the layers")
        example = self.data.x_train[:2].to(self.probe.device)
        optimizer, _ = make_optimizer(self.model, "sgd", settings, example)
        every, selection = max(1, steps // measurements), watched(self.model, layers)
        monitor = ShiftMonitor(self.model, self.probe, selection, every=every, anchor="both")
        self.sites = find_sites(self.model, self.probe, selection)
        weights = sorted({site.weight for site in self.sites if site.weight is not None})
        invariant: set[str] | None = None
        self.phases.begin(f"trying which of {len(weights)} weights are scale invariant")
        with suppress(ValueError, RuntimeError):  # where they cannot be found out, they stay unknown
            invariant = set(scale_invariant_weights(self.model, example).selected)
        bounds = BoundWatch(self.model, self.probe, self.sites)
        self.phases.begin("updates under the monitors", steps)
        with (
            monitor,
            WeightMonitor(self.model, optimizer, weights, every=every) if weights else nullcontext() as turning,
        ):
            for step, (x, y) in enumerate(self._batches(steps)):
                if step % every == 0:
                    bounds.before()
                optimizer.zero_grad()
                loss = F.cross_entropy(self.model(x), y)
                self.losses.append(float(loss.detach()))
                if not math.isfinite(self.losses[-1]):
                    self.diverged_at = step + 1
                    break
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                if any(record.anchor == "previous" for record in monitor.step()):
                    bounds.after()
                if turning is not None:
                    turning.step()
                self.phases.done(step + 1)
        self.measured = len({record.step for record in monitor.records if record.anchor == "previous"})
        turns = {} if turning is None else turning.summary()
        lengths = {} if turning is None else {record.layer: record.norm for record in turning.records}
        for site in self.sites:
            records = [record for record in monitor.records if record.layer == site.name]
            moves = [record for record in records if record.anchor == "previous"]
            since = [record.relative for record in records if record.anchor == "initial"]
            turned = turns.get(site.weight or "", {})
            self.rows[site.name] = {
                "layer": site.name,
                "kind": type(site.module).__name__,
                "channels": site.channels,
                "positions": site.positions,
                **{key: _mean([getattr(r, key) for r in moves]) for key in ("w1", "lower", "upper", "relative")},
                "relative_since_start": _mean(since[-1:]),
                "bound": _mean(bounds.found[site.name]),
                "mixes_batch": site.mixes_batch,
                "weight": site.weight,
                "invariant": None if invariant is None or site.weight is None else site.weight in invariant,
                "angle": _finite(turned.get("angle")),
                "norm": _finite(lengths.get(site.weight or "")),
                "effective_rate": _finite(turned.get("effective_rate")),
                "activation": None if site.activation is None else type(site.activation).__name__,
            }

    def _batches(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            order = torch.randperm(len(self.data.x_train), generator=generator)
            for chosen in torch.split(order, self.size)[: len(order) // self.size]:
                if count == 0:
                    return
                count -= 1
                yield self.data.x_train[chosen].to(self.probe.device), self.data.y_train[chosen].to(self.probe.device)

    def measure(self, population: int) -> None:
        """Add to the rows what the network as it is now does with about so many images."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        order = torch.randperm(len(self.data.x_train), generator=generator)
        count = min(len(order) // self.size, max(2, population // self.size))
        chosen = [self.data.x_train[part].to(self.probe.device) for part in torch.split(order, self.size)[:count]]
        self.images = count * self.size
        self.phases.begin(f"statistics of {self.images} images")
        propagates = any(isinstance(module, NormPropUnits) for module in self.model.modules())
        reports = propagate(self.model, self.probe) if propagates else ()
        for found in (
            channel_numbers(self.model, chosen, self.sites),
            _decay(self.model, torch.cat(chosen), max(self.size, 2)),
            {report.name: {"chi": report.chi, "input_var": _finite(report.input_var)} for report in reports},
        ):
            for name, row in self.rows.items():
                row |= found.get(name, {})


def _decay(model: nn.Module, images: Tensor, batch_size: int) -> dict[str, dict[str, float]]:
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
    return {
        row.layer: {"zeta": row.zeta, "decay": row.penalty} for row in advice.layers if row.layer.split("#")[0] in known
    }


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


def _logits_of(output: Any) -> Any:
    """What stands for the logits in what a model returns, as :func:`profile` says; what is not understood, as it is."""
    named = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
    if not isinstance(output, Mapping) and hasattr(output, "_asdict"):
        named = output._asdict()
    if isinstance(named.get("logits"), Tensor):
        return named["logits"]
    if isinstance(hidden := named.get("last_hidden_state"), Tensor):
        # (N, positions, C), or maps (N, C, H, W)
        return hidden.flatten(2).mean(2) if hidden.ndim > 3 else hidden.mean(1) if hidden.ndim == 3 else hidden
    found = None if isinstance(output, Tensor) else first_tensor(output)
    return output if found is None else found


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
