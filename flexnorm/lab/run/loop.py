"""Train one network once: a folder that can be resumed at any moment and ends with a summary."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexnorm._messages import optional
from flexnorm.lab import models
from flexnorm.lab.data import ImageData, stratified
from flexnorm.lab.files import append_rows, atomic_write, dump_json, read_json, writing
from flexnorm.lab.records import (
    COMPLETE,
    DIVERGED,
    METRICS_HEADER,
    REFUSED,
    SHIFT_HEADER,
    SHIFT_NUMBERS,
    EpochRow,
    Run,
    renamed,
)
from flexnorm.lab.replicates import mean
from flexnorm.lab.run import environment, randomness
from flexnorm.lab.run.config import Config
from flexnorm.lab.run.folder import load_checkpoint, result, save_checkpoint, step_ms, truncate
from flexnorm.lab.run.optimizers import StepHooks, make_optimizer
from flexnorm.lab.run.randomness import augment
from flexnorm.lab.run.settings import schedule_factor
from flexnorm.nn import make_norm, needs_batch
from flexnorm.shift import ShiftMonitor

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class DivergedError(Exception):
    """The loss is not a number any more."""


def build_model(config: Config, data: ImageData, norm: str) -> nn.Module:
    """Build the network of an experiment; ValueError if it or its normalization does not take their arguments."""
    own = config.norm_args.get(norm)
    try:
        return models.build(config.model, norm, data.shape[0], data.num_classes, norm_args=own, **config.model_args)
    except TypeError as error:
        raise ValueError(f"model {config.model} with norm {norm}: {error}") from error


def single_image_norms() -> list[str]:
    """Return the norms that can be trained one image at a time: those that never mix the images of a batch."""
    return [name for name in models.norm_names() if name == "normprop" or not needs_batch(make_norm(name, 16))]


def train_run(
    config: Config,
    data: ImageData,
    folder: Path,
    *,
    on_epoch: Callable[[EpochRow], None] = lambda _: None,
    check_stop: Callable[[], None] = lambda: None,
    monitor: bool = True,
) -> Run:
    """Train one network and leave a complete run folder; resume it if a part is there, return its summary if all is.

    Args:
        config: An experiment of exactly one norm, optimizer and seed (:meth:`Config.single`).
        data: The images.
        folder: Run folder; made if missing.
        on_epoch: Called at the end of every epoch.
        check_stop: Called between updates; may raise to end the run, which can then be resumed.
        monitor: Measure the shift. Whether it is measured or not does not change the training.

    Returns:
        What ``summary.json`` holds.

    Raises:
        WriteError: If the disk does not take a file.
        ValueError: If the folder holds another run or damaged files.
    """
    if len(config.norms) != 1 or len(config.optims) != 1 or len(config.seeds) != 1:
        raise ValueError("train_run takes one norm, one optimizer and one seed; see Config.single")
    identity = config.fingerprint(data.digest)
    if (folder / "summary.json").exists():
        return Run.read(read_json(folder / "summary.json"))
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    fabric = fabric_of(config)
    with environment.settings(config, fabric.device, data.shape):
        run = _Run(config, data, folder, identity, fabric, monitor)
        return run.train(on_epoch, check_stop)


class _Run:
    """One training in progress."""

    def __init__(
        self, config: Config, data: ImageData, folder: Path, identity: str, fabric: Fabric, monitor: bool
    ) -> None:
        yaml = optional("yaml", "training", "lab")
        self.config, self.folder, self.identity, self.fabric = config, folder, identity, fabric
        self.norm, self.seed = config.norms[0], config.seeds[0]
        (self.optim,) = config.optims
        self.steps_per_epoch = max(1, len(data.x_train) // config.batch_size)
        often = max(1, min(self.steps_per_epoch, self.steps_per_epoch * config.epochs // 20))
        self.shift_every = 0 if not monitor else often if config.shift_every is None else config.shift_every
        self.notes: list[str] = []
        atomic_write(folder / "config.yaml", yaml.safe_dump(config.as_dict(), sort_keys=False).encode())

        torch.manual_seed(randomness.mixed(self.seed, 0, "weights"))
        self.model = build_model(config, data, self.norm)
        device = fabric.device
        self.x_train, self.y_train = data.x_train.to(device), data.y_train.to(device)
        tested = slice(None) if config.test_limit is None else _some(data.y_test, config.test_limit)
        self.x_test, self.y_test = data.x_test[tested].to(device), data.y_test[tested].to(device)
        # The probe is the same for every run of the experiment, or their shifts could not be compared.
        self.probe = self.x_train[_some(data.y_train, config.probe).to(device)]
        self.epoch = self.step = 0
        self.metrics_bytes = self.shift_bytes = 0
        self.step_times: list[float] = []
        self.seconds = 0.0

    def train(self, on_epoch: Callable[[EpochRow], None], check_stop: Callable[[], None]) -> Run:
        if self.config.batch_size == 1 and any(map(needs_batch, self.model.modules())):
            return self._finish(
                REFUSED,
                f"{self.norm} normalizes by the statistics of the training batch, and a batch of 1 image has none but "
                f"its own: training would fit statistics that the network never sees again. "
                f"Train with a batch size of at least 2, or with a norm that can: {', '.join(single_image_norms())}",
            )
        started = time.perf_counter()
        settings = self.config.optim_settings(self.norm, self.optim)
        self.optimizer, self.notes = make_optimizer(self.model, self.optim, settings, self.probe[:2].cpu())
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.wrapped, self.wrapped_optimizer = self.fabric.setup(self.model, self.optimizer)
        self.hooks = StepHooks(self.config, self.model, self.x_train, randomness.mixed(self.seed, 0, "extras"))
        # Precisions like 64-true change the type of the weights; Fabric converts only what goes through its wrapper.
        self.probe = self.probe.to(next(self.model.parameters()).dtype)
        often: dict[str, Any] = {"every": self.shift_every, "lag": self.config.shift_lag}
        often |= {"layers": models.watched_layers(self.model), "max_samples": self.config.shift_samples}
        monitor: Any = ShiftMonitor(self.model, self.probe, **often) if self.shift_every else contextlib.nullcontext()
        with monitor as self.monitor:
            self._resume()
            started -= self.seconds
            try:
                while self.epoch < self.config.epochs:
                    times = len(self.step_times)
                    train_loss, lr = self._train_epoch(check_stop)
                    self.hooks.before_evaluation()
                    test_loss, accuracy = self._evaluate()
                    if not math.isfinite(test_loss):
                        raise DivergedError(f"the test loss became {test_loss} after epoch {self.epoch + 1}")
                    self.epoch += 1
                    self.seconds = time.perf_counter() - started
                    took = step_ms(self.step_times[times:])
                    done = EpochRow(self.epoch, self.step, train_loss, test_loss, accuracy, lr, took, self.seconds)
                    self._save(done)
                    on_epoch(done)
            except DivergedError as error:
                self.seconds = time.perf_counter() - started
                self._write_shift()
                return self._finish(DIVERGED, str(error))
        self.seconds = time.perf_counter() - started
        weights = {name: value.detach().cpu().contiguous() for name, value in self.model.state_dict().items()}
        # One entry only: the library writes several in an order that changes from process to process.
        note = {"flexnorm": json.dumps(self.config.as_dict())}
        content = optional("safetensors.torch", "training", "lab").save(weights, metadata=note)
        atomic_write(self.folder / "model.safetensors", content)
        return self._finish(COMPLETE)

    def _train_epoch(self, check_stop: Callable[[], None]) -> tuple[float, float]:
        """Make the updates of one epoch; return their mean loss and the last learning rate."""
        config, device = self.config, self.fabric.device
        # Dropout and the like draw from the global generator: it, too, is a function of (seed, epoch).
        torch.manual_seed(randomness.mixed(self.seed, self.epoch, "network"))
        displacements = randomness.generator(self.seed, self.epoch, "augment")
        order = randomness.order(len(self.x_train), self.seed, self.epoch).to(device)
        arguments = config.schedule_settings()
        losses: list[float] = []
        self.model.train()
        for batch in range(self.steps_per_epoch):
            check_stop()
            chosen = order[batch * config.batch_size : (batch + 1) * config.batch_size]
            x = augment(self.x_train[chosen], config.augment, config.augment_pixels, displacements)
            y = self.y_train[chosen]
            factor = schedule_factor(config.schedule, arguments, self.step, self.steps_per_epoch, config.epochs)
            for group, lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
                group["lr"] = lr * factor
            begin = time.perf_counter()
            losses.append(self._update(x, y))
            self.step_times.append(time.perf_counter() - begin)
            self.step += 1
            if self.monitor is not None:
                with self.fabric.autocast():
                    self.monitor.step()
        return mean(losses), float(self.optimizer.param_groups[0]["lr"])

    def _update(self, x: Tensor, y: Tensor) -> float:
        """Make one update and return the loss before it, without what regularizers add."""
        self.hooks.before(x)
        self.wrapped_optimizer.zero_grad()
        loss = F.cross_entropy(self.wrapped(x).float(), y, label_smoothing=self.config.label_smoothing)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise DivergedError(f"the training loss became {value} at step {self.step + 1} (epoch {self.epoch + 1})")
        penalty = self.hooks.penalty()
        self.fabric.backward(loss if penalty is None else loss + penalty)
        self.wrapped_optimizer.step()
        self.hooks.after(self.optimizer)
        if self.fabric.device.type == "cuda":
            torch.cuda.synchronize(self.fabric.device)  # or the time of the update would show up elsewhere
        return value

    @torch.no_grad()
    def _evaluate(self) -> tuple[float, float]:
        """Return mean cross entropy and accuracy on the test images."""
        self.model.eval()
        size = max(self.config.batch_size, 500)
        losses, hits = [], 0
        for first in range(0, len(self.y_test), size):
            y = self.y_test[first : first + size]
            scores = self.wrapped(self.x_test[first : first + size]).float()
            losses.append(float(F.cross_entropy(scores, y, reduction="sum")))
            hits += int((scores.argmax(1) == y).sum())
        return math.fsum(losses) / len(self.y_test), hits / len(self.y_test)

    def _resume(self) -> None:
        """Take up the last checkpoint, or clear what a run without one has left."""
        path, metrics, shift = (self.folder / name for name in ("checkpoint.pt", "metrics.csv", "shift.csv"))
        if not path.exists():
            for leftover in (metrics, shift):
                with writing(leftover):
                    leftover.unlink(missing_ok=True)
            self.metrics_bytes = append_rows(metrics, METRICS_HEADER, [])
            self.shift_bytes = append_rows(shift, SHIFT_HEADER, [])
            return
        state = load_checkpoint(path, self.identity)
        self.metrics_bytes, self.shift_bytes = state["metrics_bytes"], state["shift_bytes"]
        truncate(metrics, self.metrics_bytes)
        truncate(shift, self.shift_bytes)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.hooks.load_state_dict(state["extras"])
        if self.monitor is not None:
            self.monitor.load_state_dict(state["monitor"])
        was, now = renamed(state.get("environment", {})), environment.describe(self.fabric.device)
        if changed := [f"{key} {was[key]!r} became {now[key]!r}" for key in now if was.get(key, now[key]) != now[key]]:
            self.notes.append(f"resumed after epoch {state['epoch']} in another environment: {'; '.join(changed)}")
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self.step_times = state["step_times"].tolist()

    def _save(self, done: EpochRow) -> None:
        """Write the rows of an epoch and, when one is due, a checkpoint that vouches for them."""
        row = [*dataclasses.astuple(done)]
        self.metrics_bytes = append_rows(self.folder / "metrics.csv", METRICS_HEADER, [row])
        self._write_shift()
        if self.epoch % self.config.checkpoint_every and self.epoch < self.config.epochs:
            return
        state = {
            "run": self.identity,
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "environment": environment.describe(self.fabric.device),
            "step_times": torch.tensor(self.step_times, dtype=torch.float32),
            "metrics_bytes": self.metrics_bytes,
            "shift_bytes": self.shift_bytes,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "extras": self.hooks.state_dict(),
            "monitor": self.monitor.state_dict() if self.monitor is not None else {},
        }
        save_checkpoint(self.folder / "checkpoint.pt", state)

    def _write_shift(self) -> None:
        """Append the measurements that have come in since the last time."""
        if self.monitor is None:
            return
        rows = []
        for record in self.monitor.records:
            values, epoch = record.asdict(), (record.step - 1) // self.steps_per_epoch + 1
            rows.append([epoch, record.step, record.layer, *(float(values[name]) for name in SHIFT_NUMBERS)])
        self.monitor.records.clear()
        self.shift_bytes = append_rows(self.folder / "shift.csv", SHIFT_HEADER, rows)

    def _finish(self, status: str, reason: str = "") -> Run:
        """Write the summary: from then on the run counts as done."""
        run = Run(
            norm=self.norm,
            optim=self.optim,
            seed=self.seed,
            status=status,
            reason=reason,
            notes=tuple(self.notes),
            epochs_done=self.epoch,
            steps=self.step,
            parameters=sum(p.numel() for p in self.model.parameters()),
            identity=self.identity,
            step_ms=step_ms(self.step_times),
            step_count=len(self.step_times),
            wall_s=self.seconds,
            environment=environment.describe(self.fabric.device),
            **result(self.folder),
        )
        dump_json(self.folder / "summary.json", run.summary())
        return Run.read(read_json(self.folder / "summary.json"))


def _some(labels: Tensor, count: int) -> Tensor:
    """Indices of at most so many images, stratified, always the same."""
    return torch.from_numpy(stratified(labels.numpy(), min(count, len(labels)), seed=0))


def fabric_of(config: Config) -> Fabric:
    """Return the device and precision of an experiment as a Fabric."""
    kind, _, index = config.device.partition(":")
    fabric: type[Fabric] = optional("lightning_fabric", "training", "lab").Fabric
    try:
        return fabric(accelerator=kind, devices=[int(index)] if index else 1, precision=config.precision)  # type: ignore[arg-type]
    except Exception as error:  # Fabric has its own exception types for a device that is not there
        raise ValueError(f"device {config.device!r} with precision {config.precision}: {error}") from error
