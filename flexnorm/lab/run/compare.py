"""Train one network under every normalization, optimizer and seed of an experiment, and collect what came out."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from flexnorm.lab import data as datasets
from flexnorm.lab.data import ImageData
from flexnorm.lab.files import dump_json, read_json
from flexnorm.lab.records import EpochRow, Run, Study, renamed_command, with_step_ratios
from flexnorm.lab.run.config import Config
from flexnorm.lab.run.environment import stop_on_signals
from flexnorm.lab.run.folder import as_begun, open_experiment, run_path
from flexnorm.lab.run.loop import build_model, fabric_of, train_run
from flexnorm.lab.run.optimizers import StepHooks


@dataclass(frozen=True)
class Progress:
    """One thing that has happened in a comparison.

    Attributes:
        kind: ``"data"`` (loaded), ``"start"`` of a run, ``"epoch"`` done, ``"end"`` of a run, ``"skip"`` (was done).
        index: Number of the run, from 1; 0 for ``"data"``.
        total: Number of runs.
        norm: Its normalization.
        optim: Its optimizer.
        seed: Its seed.
        epochs: Length of the run.
        epoch: What an epoch gave, for ``"epoch"``.
        run: The outcome, for ``"end"`` and ``"skip"``.
        text: The data in words, for ``"data"``.
    """

    kind: str
    index: int
    total: int
    norm: str = ""
    optim: str = ""
    seed: int = 0
    epochs: int = 0
    epoch: EpochRow | None = None
    run: Run | None = None
    text: str = ""


def runs_of(config: Config) -> Iterator[tuple[str, str, int]]:
    """Yield (norm, optimizer, seed) of every run; runs that are compared with each other follow each other in time."""
    for seed, optim, norm in itertools.product(config.seeds, config.optims, config.norms):
        yield norm, optim, seed


def compare(
    config: Config,
    out: str | Path,
    *,
    data: ImageData | None = None,
    notify: Callable[[Progress], None] = lambda _: None,
    command: str = "",
) -> Study:
    """Run an experiment, or what is missing of it, in a folder of its own.

    Complete runs are skipped, partial ones resumed from their last checkpoint; a resumed run gives the same bits as an
    uninterrupted one. A run whose loss is not finite ends as diverged, a network that cannot be trained in this setting
    as refused, each with its reason; the others go on.

    Args:
        config: The experiment.
        out: Its folder: new, empty or holding the same experiment. Layout: ``experiment.json``, ``results.json`` and
            ``runs/NORM/OPTIM/seedK/`` with ``config.yaml``, ``metrics.csv``, ``shift.csv``, ``model.safetensors``,
            ``checkpoint.pt`` and ``summary.json``.
        data: The images, if they are already loaded.
        notify: Called with every :class:`Progress`.
        command: What the user typed, for the record.

    Returns:
        What ``results.json`` holds.

    Raises:
        ValueError: If the data, the model or the folder cannot be used; nothing has been trained then.
        BusyError: If another process is at work in the folder.
        WriteError: If the disk does not take a file; what was complete before is intact.
        Interrupted: After Ctrl-C or SIGTERM; the same call resumes.
    """
    out = Path(out)
    started = time.perf_counter()
    config = as_begun(out, config)
    data = data or datasets.load(config.data, limit=config.limit)
    check(config, data)
    runs = list(runs_of(config))
    notify(Progress("data", 0, len(runs), text=data.describe()))
    with stop_on_signals() as stop, open_experiment(out, config, data, command):
        for index, (norm, optim, seed) in enumerate(runs, start=1):
            stop.check()
            folder = out / run_path(norm, optim, seed)
            about = partial(
                Progress, index=index, total=len(runs), norm=norm, optim=optim, seed=seed, epochs=config.epochs
            )
            if (folder / "summary.json").exists():
                notify(about("skip", run=Run.read(read_json(folder / "summary.json"))))
                continue
            notify(about("start"))
            done = train_run(
                config.single(norm, optim, seed),
                data,
                folder,
                on_epoch=lambda epoch, about=about: notify(about("epoch", epoch=epoch)),  # type: ignore[misc]
                check_stop=stop.check,
            )
            notify(about("end", run=done))
        return collect(out, config, time.perf_counter() - started)


def check(config: Config, data: ImageData) -> None:
    """Build every network and put two images through it, so that what cannot work is said before the first run."""
    fabric_of(config)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for norm in config.norms:
            model = build_model(config, data, norm)
            try:
                model(data.x_train[:2])
            except (RuntimeError, ValueError) as error:
                c, h, w = data.shape
                raise ValueError(
                    f"model {config.model} with norm {norm} cannot process images of {c} x {h} x {w}: {error}"
                ) from error
            try:
                StepHooks(config, model, data.x_train[:2], seed=0)
            except ValueError as error:
                raise ValueError(f"norm {norm}: {error}") from error
    if "crop" in config.augment and config.augment_pixels >= min(data.shape[1:]):
        h, w = data.shape[1:]
        raise ValueError(
            f"augment: crop reflects a border of augment_pixels = {config.augment_pixels}, "
            f"too wide for images of {h} x {w}"
        )


def collect(out: Path, config: Config, elapsed: float = 0.0) -> Study:
    """Write ``results.json`` from the summaries of all runs and return what it holds.

    Its ``total_seconds`` is ``elapsed``, the time of this call, or the sum over the runs, if that is larger.
    """
    paths = [run_path(*cell) for cell in runs_of(config)]
    runs = [Run.read(read_json(out / path / "summary.json"), path=path) for path in paths]
    experiment = read_json(out / "experiment.json")
    study = Study(
        name=out.name,
        runs=with_step_ratios(runs, config.baseline),
        norms=config.norms,
        optims=tuple(config.optims),
        baseline=config.baseline,
        data=experiment.get("data", ""),
        command=renamed_command(experiment),
        config=config.as_dict(),
        environment=runs[-1].environment,
        total_seconds=max(elapsed, sum(run.wall_s for run in runs)),
    )
    dump_json(out / "results.json", study.asdict())
    return study
