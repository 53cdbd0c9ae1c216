"""A profile in the terminal: one row per layer, then the sentences that ask for something."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from flexnorm.lab.profile.progress import Progress
from flexnorm.lab.profile.records import Finding, LayerProfile, Profile, urgency

_MOST = 3
"""Sentences of one kind that are printed unless all are asked for: those with the largest numbers."""

_STYLE = {"fine": "green", "look": "yellow", "act": "bold red"}


class _Column(NamedTuple):
    """A column of the table: its number in a profile, how it is written, what it means, below which width it goes."""

    heading: str
    field: str
    form: str
    legend: str = ""
    narrow: int = 0

    def cell(self, layer: LayerProfile) -> str:
        value = getattr(layer, self.field)
        if value is None or not math.isfinite(value) or (self.field == "effective_rate" and not layer.invariant):
            return ""
        text = format(100 * value if self.heading.endswith("%") else value, self.form)
        aside = self.field in ("noise", "zeta", "decay") and not layer.mixes_batch
        return f"({text})" if aside else text


_COLUMNS = (
    _Column("W1", "w1", ".3g", "W1: how far one update moves the output", 90),
    _Column("low", "lower", ".3g", "low, high: its certified bounds", 142),
    _Column("high", "upper", ".3g", narrow=132),
    _Column("shift %", "relative", ".3g", "shift %: the same relative to the spread of the output"),
    _Column("bound", "bound", ".3g", "bound: by the parameters alone", 112),
    _Column("noise %", "noise", ".1f", "noise %: of the batch statistics"),
    _Column("zeta", "zeta", ".1e", "zeta: the gamma decay that the noise of BatchNorm amounts to"),
    _Column("decay", "decay", ".2g", "decay: what it adds to the loss", 100),
    _Column("angle", "angle", ".2g", "angle: radians that the weight before turns in one update"),
    _Column(
        "eff. rate",
        "effective_rate",
        ".2g",
        "eff. rate: learning rate over squared length of that weight, where its length does not matter",
        122,
    ),
    _Column("dead", "dead", "d", "dead: channels that are constant or cut off by their rectifier"),
    _Column("chi", "chi", ".2f", "chi: growth of a sample's deviation, by the parameters alone", 92),
    _Column(
        "in var",
        "input_var",
        ".2g",
        "in var: variance of the pre-activations, which Normalization Propagation takes for 1",
        95,
    ),
    _Column("saturated", "saturated", "d", "saturated: channels on the flat parts of their activation"),
)


@contextlib.contextmanager
def display(console: Any, *, interval: float = 10.0) -> Iterator[Callable[[Progress], None]]:
    """Show where a profile is, with the time left: a bar in a terminal, plain lines in a file or a pipe.

    Args:
        console: A ``rich`` console.
        interval: Seconds between two lines of one phase, where there is no terminal.

    Yields:
        What :func:`profile` takes as ``notify``.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Bar(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True)
    task, last = bar.add_task("", total=None), 0.0

    def show(progress: Progress) -> None:
        nonlocal last
        bar.update(task, description=progress.phase, completed=progress.done, total=progress.total or None)
        if progress.done == 0:
            bar.reset(task, description=progress.phase, total=progress.total or None)
            last = 0.0
        elif progress.seconds < last + interval:
            return
        last = progress.seconds
        if not console.is_terminal:
            count = f" {progress.done}/{progress.total}" if progress.total else ""
            left = "" if progress.left is None else f", about {progress.left:.0f} s left"
            console.print(f"{progress.phase}{count}{left}", markup=False)

    with bar:
        yield show


def print_profile(result: Profile, console: Any, *, everything: bool = False) -> None:
    """Print the table of the layers, and the verdicts.

    Args:
        result: The profile.
        console: A ``rich`` console; columns are left out where it is narrow.
        everything: Also print the findings that ask for nothing.
    """
    built = f" with norm {result.norm}" if result.norm else ""
    console.print(
        f"{result.model}{built} on {result.data}: {result.steps} updates of batch {result.batch_size} at learning rate "
        f"{result.lr:g}, {result.measurements} measurements on {result.probe} images, {result.seconds:.1f} s",
        markup=False,
    )
    if result.layers:
        _print_table(result.layers, console)
    for finding in result.findings:
        _print(finding, console)
    own = [finding for layer in result.layers for finding in layer.findings]
    wanted = [finding for finding in own if everything or finding.level != "fine"]
    shown = wanted if everything else _worst(wanted)
    for finding in sorted(shown, key=urgency, reverse=True):
        _print(finding, console)
    if len(wanted) > len(shown):
        rest = len(wanted) - len(shown)
        console.print(f"and {rest} more of these kinds at other layers, which --all and the JSON show", markup=False)
    if not wanted and not result.diverged_at:
        console.print("no layer needs a change")


def _print_table(layers: tuple[LayerProfile, ...], console: Any) -> None:
    """Print the columns that have something to show and fit."""
    from rich import box
    from rich.table import Table

    shown = [
        column
        for column in _COLUMNS
        if console.width >= column.narrow and any(getattr(layer, column.field) is not None for layer in layers)
    ]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in ("layer", *(column.heading for column in shown), "verdict"):
        left = heading in ("layer", "verdict")
        table.add_column(heading, justify="left" if left else "right", no_wrap=heading != "layer", overflow="fold")
    for layer in layers:
        cells = [column.cell(layer) for column in shown]
        style = None if layer.level == "fine" else _STYLE[layer.level]
        table.add_row(layer.layer or "(model)", *cells, layer.level, style=style)
    console.print(table)
    console.print("; ".join(column.legend for column in shown if column.legend) + ".", style="dim")
    if any(not layer.mixes_batch and layer.noise is not None for layer in layers):
        console.print("In brackets: what BatchNorm in its place would have.", style="dim")


def _worst(findings: list[Finding]) -> list[Finding]:
    """The most urgent findings of every topic."""
    ranked = sorted(findings, key=lambda f: (-urgency(f), -f.value))
    return [f for i, f in enumerate(ranked) if sum(g.topic == f.topic for g in ranked[:i]) < _MOST]


def _print(finding: Finding, console: Any) -> None:
    console.print(f"{finding.level:4s}  {finding.text}", style=_STYLE[finding.level], markup=False)
