"""What a person sees while a comparison runs, and the table at its end."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from flexnorm.lab.records import DIVERGED, REFUSED, Cell, Run, Study
from flexnorm.lab.run.compare import Progress as Event


def console(width: int = 140) -> Console:
    """Return a console that wraps like the terminal, or at that many columns where there is none."""
    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(highlight=False, width=width)


@contextlib.contextmanager
def display(where: Console, epochs: bool = False) -> Iterator[Callable[[Event], None]]:
    """Show events: a progress bar in a terminal, plain lines in a file or a pipe; with a line for every epoch too."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    more = (TimeRemainingColumn(), TextColumn("{task.fields[now]}"))
    bar = Progress(*columns, *more, console=where, disable=not where.is_terminal, transient=True)
    task = bar.add_task("runs", total=None, now="")

    def show(event: Event) -> None:
        name = f"{event.norm} {event.optim} seed {event.seed}"
        if event.kind == "data":
            bar.update(task, total=event.total)
            where.print(event.text)
            where.print("1 run" if event.total == 1 else f"{event.total} runs")
        elif event.kind == "start":
            bar.update(task, now=name)
        elif event.epoch is not None:
            e = event.epoch
            now = f"{name}: epoch {e.epoch}/{event.epochs}, test accuracy {100 * e.test_accuracy:.1f} %"
            bar.update(task, now=now)
            if epochs:
                where.print(
                    f"epoch {e.epoch:3g}/{event.epochs}  train loss {e.train_loss:.4f}  test loss {e.test_loss:.4f}  "
                    f"test accuracy {100 * e.test_accuracy:.2f} %  {e.step_ms:.2f} ms per step"
                )
        elif event.run is not None:
            bar.update(task, advance=1, now="")
            done = "  (was complete)" if event.kind == "skip" else ""
            width = len(str(event.total))
            where.print(f"{event.index:{width}d}/{event.total}  {run_line(event.run)}{done}")

    with bar:
        yield show


def run_line(run: Run) -> str:
    """Return the outcome of one run in one line."""
    name = f"{run.norm:10s} {run.optim:5s} seed {run.seed}"
    if not run.complete:
        return f"{name}  {run.status}: {run.reason}"
    shift = f"  shift {_number(run.shift_w1, '.3f')}" if run.shift else ""
    return (
        f"{name}  test accuracy {100 * run.test_accuracy:.2f} %  train loss {run.train_loss:.4f}"
        f"{shift}  {_number(run.step_ms, '.2f')} ms per step"
    )


def print_table(study: Study, where: Console) -> None:
    """Print the table of a comparison, one row per norm and optimizer: means over seeds and their standard deviation.

    A narrow terminal gets fewer columns; all of them are in ``results.json`` and in the report.
    """
    rows, baseline = study.cells, study.baseline
    columns: dict[str, Callable[[Cell], str]] = {
        "norm": lambda row: row.norm,
        "optim": lambda row: row.optim,
        "runs": lambda row: f"{len(row.complete)}/{len(row.runs)}",
        "test acc. %": lambda row: (
            row.test_accuracy.text(".2f", 100) if row.complete else (DIVERGED if row.count(DIVERGED) else REFUSED)
        ),
        f"vs {baseline}": lambda row: row.difference.text("+.2f", 100),
        "train loss": lambda row: row.train_loss.text(".4f"),
        "shift W1": lambda row: row.shift_w1.text(".3f"),
        "relative": lambda row: row.shift_relative.text(".3f"),
        "holds": lambda row: {True: "yes", False: "NO", None: ""}[row.interval_holds],
        "step ms": lambda row: row.step_ms.text(".2f"),
        "ratio": lambda row: _number(row.step_ratio.median, ".2f"),
    }
    for limit, dropped in ((125, "train loss"), (107, "relative"), (91, "step ms"), (77, "runs"), (70, "holds")):
        if where.width < limit:
            del columns[dropped]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in columns:
        table.add_column(heading, justify="left" if heading in ("norm", "optim") else "right", no_wrap=True)
    previous = None
    for row in rows:
        if previous not in (None, row.optim):
            table.add_section()
        previous = row.optim
        table.add_row(*(cell(row) for cell in columns.values()))
    where.print(table)
    where.print(
        f"Mean ± standard deviation over seeds; vs {baseline}: paired by seed. Shift: Wasserstein-1 distance that one "
        f"update moves a layer's output, mean over layers and measurements; relative to the spread of the output; "
        f"holds: lower bound <= W1 <= upper bound everywhere. Ratio: step time over that of {baseline}.",
        style="dim",
    )
    remarks: dict[str, list[str]] = {}
    for row in rows:
        cell = f"{row.norm} {row.optim}"
        for status in (DIVERGED, REFUSED):
            if count := row.count(status):
                share = "" if count == len(row.runs) else f"{count} of {len(row.runs)} "
                remarks.setdefault(row.reason, []).append(f"{cell} {share}{status}")
        for note in row.notes:
            remarks.setdefault(note, []).append(cell)
    for remark, cells in remarks.items():
        where.print(f"{', '.join(cells)}: {remark}", markup=False)


def _number(value: float, form: str) -> str:
    """Return a formatted number, or nothing for none."""
    return "" if math.isnan(value) else format(value, form)
