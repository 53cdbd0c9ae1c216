"""``flexnorm compare`` and ``flexnorm train``: settings from options and files, and the experiment they make."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from flexnorm.lab.commands.friendly import FAILED, friendly, takes

if TYPE_CHECKING:
    from rich.console import Console

    from flexnorm.lab.data import ImageData
    from flexnorm.lab.records import Study
    from flexnorm.lab.run import Config

_WHAT = ("data", "limit", "model", "norm", "optim", "epochs")
_HOW = ("batch_size", "lr", "schedule", "augment", "device", "precision", "threads", "config", "scale", "set", "out")


@takes(
    *_WHAT,
    "seeds",
    *_HOW,
    norm="Normalizations, e.g. batch,group. (default: none,batch,group,unitized,population,normprop)",
    optim="Optimizers: sgd,sgdg,adamg,adamw,sgdp,adamp. (default: sgd,sgdg,adamg)",
)
@friendly(resumes=True)
def compare(given: dict[str, Any]) -> None:
    """Train one network under several normalizations, optimizers and seeds; report accuracy, shift and speed.

    The same command again skips what is complete and resumes what is not.
    """
    run_experiment({**given, "seeds": _seeds(given["seeds"])})


@takes(*_WHAT, "seed", *_HOW)
@friendly(resumes=True)
def train(given: dict[str, Any]) -> None:
    """Train one network once, with a line per epoch. Interrupted, the same command resumes."""
    seed = given.pop("seed")
    run_experiment({**given, "seeds": None if seed is None else [seed]}, single=True)


def run_experiment(given: dict[str, Any], *, single: bool = False) -> None:
    """Put the settings of the command line and of its file together and run the experiment; a single run by epochs."""
    file, scale, out = (given.pop(name) for name in ("config", "scale", "out"))
    if scale is not None and file is None:
        raise ValueError("--scale needs --config with a recipe")
    # Wrong settings are worth saying before the seconds that importing torch takes... and data that are missing, too.
    from flexnorm.lab.run import Config, load_config

    values = load_config(file, scale) if file else {}
    values = {{"norm": "norms", "optim": "optims", "seed": "seeds"}.get(k, k): v for k, v in values.items()}
    override(values, given)
    if single:
        values = {"norms": "batch", "optims": "sgd", "seeds": [0], **values}
    if isinstance(values.get("out"), str):
        out = out or Path(values.pop("out"))
    config = Config.from_dict(values)
    folder = out or Path("runs") / _stem(str(file or config.data))
    if single:
        cells = (config.norms, tuple(config.optims), config.seeds)
        for name, choices in zip(("--norm", "--optim", "--seed"), cells, strict=True):
            if len(choices) > 1:
                raise ValueError(
                    f"train takes one of {', '.join(map(str, choices))}: choose with {name}, or use compare"
                )
        (norm,), (optim,), (seed,) = cells
        config = dataclasses.replace(config, baseline=norm)
        folder = out or Path("runs") / f"{_stem(config.data)}-{norm}-{optim}-seed{seed}"
    from flexnorm.lab.run.terminal import console

    if not run_one(config, folder, console(), single=single).complete:
        typer.echo("no run was completed: see the reasons above", err=True)
        raise typer.Exit(FAILED)


def run_one(
    config: Config, folder: Path, screen: Console, *, data: ImageData | None = None, single: bool = False
) -> Study:
    """Run a comparison in its folder, print its table (of a single run its epochs) and write its report."""
    from flexnorm.lab.report import write_report
    from flexnorm.lab.run import compare as run_all
    from flexnorm.lab.run.terminal import display, print_table

    command = shlex.join(["flexnorm", *sys.argv[1:]])
    with display(screen, epochs=single) as show:
        study = run_all(config, folder, data=data, notify=show, command=command)
    path = write_report(folder)
    if not single:
        print_table(study, screen)
    screen.print(f"all runs: {study.total_seconds:.1f} s; report: {path}", soft_wrap=True)
    return study


def override(values: dict[str, Any], given: dict[str, Any]) -> None:
    """Put the options of the command line that are given, then its --set, over the settings of a file, in place."""
    import yaml

    from flexnorm.lab.run import assign

    for option, value in given.items():
        if value is None or option == "set":
            continue
        key = {"norm": "norms", "optim": "optims"}.get(option, option)
        if key == "optims" and isinstance(values.get(key), dict):
            # Choosing among the optimizers of a file keeps the settings that the file gives them.
            value = {name.strip(): values[key].get(name.strip()) for name in value.split(",") if name.strip()}
        values[key] = value
    for text in given.get("set") or ():
        key, equals, raw = text.partition("=")
        if not equals or not key:
            raise ValueError(
                f"--set takes KEY=VALUE, for example epochs=5 or optims.sgdg.lr_manifold=0.1, not {text!r}"
            )
        assign(values, key, yaml.safe_load(raw))


def _seeds(text: str | None) -> int | list[int] | None:
    """Return a count or a list of seeds."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",") if part.strip()] if "," in text else int(text)
    except ValueError:
        raise ValueError(f"--seeds must be a count (3) or a list (0,5,7), not {text!r}") from None


def _stem(spec: str) -> str:
    """Return a folder name for a data set or a file."""
    name = Path(spec.removeprefix("hf:").rstrip("/")).name
    return name.removesuffix(".npz").removesuffix(".yaml").removesuffix(".yml") or "data"
