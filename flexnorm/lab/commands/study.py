"""Run one experiment, or all variants of a recipe, with what a person sees on the way."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from flexnorm.lab.data import ImageData
    from flexnorm.lab.records import Study
    from flexnorm.lab.run import Config

__all__ = ["run_one", "run_study"]


def run_one(
    config: Config, folder: Path, screen: Console, *, data: ImageData | None = None, epochs: bool = False
) -> tuple[Study, Path]:
    """Run a comparison in its folder and write its report.

    Args:
        config: The experiment.
        folder: Its folder.
        screen: Where progress is shown.
        data: The images, if they are already loaded.
        epochs: Show a line for every epoch.

    Returns:
        The results, and the path of the report.
    """
    from flexnorm.lab.report import write_report
    from flexnorm.lab.run import compare
    from flexnorm.lab.run.terminal import Display

    command = shlex.join(["flexnorm", *sys.argv[1:]])
    with Display(screen, epochs=epochs) as display:
        results = compare(config, folder, data=data, notify=display, command=command)
    return results, write_report(folder)


def run_study(
    name: str, scale: str | None, variants: Mapping[str, Mapping[str, Any]], out: Path, only: Sequence[str] | None
) -> None:
    """Run the variants of a recipe, each a comparison in ``out/VARIANT``, and print their tables.

    All settings are checked before the first run. What is complete is skipped, as in a comparison.

    Args:
        name: The recipe.
        scale: Its scale.
        variants: Settings by variant, as :func:`flexnorm.lab.run.load_variants` returns them.
        out: The folder.
        only: Names of the variants to run; ``None`` for all.

    Raises:
        ValueError: For an unknown variant, or settings that are wrong.
    """
    from flexnorm._messages import unknown_name
    from flexnorm.lab import data as datasets
    from flexnorm.lab.run import Config
    from flexnorm.lab.run.terminal import console, print_table

    for wanted in only or ():
        if wanted not in variants:
            raise ValueError(unknown_name("variant", wanted, variants))
    configs: dict[str, Config] = {}
    for variant in only or variants:
        try:
            configs[variant] = Config.from_dict(variants[variant])
        except ValueError as error:
            raise ValueError(f"variant {variant}: {error}") from error
    screen = console()
    loaded: dict[tuple[str, int | None], ImageData] = {}
    for number, (variant, config) in enumerate(configs.items(), start=1):
        source = (config.data, config.limit)
        if source not in loaded:
            loaded = {source: datasets.load(config.data, limit=config.limit)}
        screen.print(f"{name}{f' ({scale})' if scale else ''}, variant {number} of {len(configs)}: {variant}")
        results, path = run_one(config, out / variant, screen, data=loaded[source])
        print_table(results, screen)
        screen.print(f"all runs: {results.total_seconds:.1f} s; report: {path}", soft_wrap=True)
