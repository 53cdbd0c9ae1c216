"""What a person sees while a comparison runs, and the table at its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from flexnorm.lab.run.compare import Progress as Event

__all__ = ["Display", "console", "print_table", "run_line"]


def console() -> Console:
    """Return a console that wraps like the terminal, or at 140 columns where there is none."""
    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(highlight=False, width=140)


class Display:
    """Shows events: a progress bar in a terminal, plain lines in a file or a pipe.

    Args:
        where: The console.
        epochs: Print a line for every epoch too.
    """

    def __init__(self, where: Console, epochs: bool = False) -> None:
        self.console, self.epochs = where, epochs
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[now]}"),
            console=where,
            disable=not where.is_terminal,
            transient=True,
        )
        self.task = self.bar.add_task("runs", total=None, now="")

    def __enter__(self) -> Display:
        """Start the bar."""
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Remove the bar."""
        self.bar.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        run = f"{event.norm} {event.optim} seed {event.seed}"
        if event.kind == "data":
            self.bar.update(self.task, total=event.total)
            self.console.print(event.text)
            runs = "1 run" if event.total == 1 else f"{event.total} runs"
            self.console.print(runs)
        elif event.kind == "start":
            self.bar.update(self.task, now=run)
        elif event.kind == "epoch" and event.epoch is not None:
            e = event.epoch
            now = f"{run}: epoch {e.epoch}/{e.epochs}, test accuracy {100 * e.test_accuracy:.1f} %"
            self.bar.update(self.task, now=now)
            if self.epochs:
                self.console.print(
                    f"epoch {e.epoch:3d}/{e.epochs}  train loss {e.train_loss:.4f}  test loss {e.test_loss:.4f}  "
                    f"test accuracy {100 * e.test_accuracy:.2f} %  {e.step_ms:.2f} ms per step"
                )
        elif event.summary is not None:
            self.bar.update(self.task, advance=1, now="")
            done = "  (was complete)" if event.kind == "skip" else ""
            width = len(str(event.total))
            self.console.print(f"{event.index:{width}d}/{event.total}  {run_line(event.summary)}{done}")


def run_line(summary: Mapping[str, Any]) -> str:
    """Return the outcome of one run in one line."""
    name = f"{summary['norm']:10s} {summary['optim']:5s} seed {summary['seed']}"
    if summary["status"] != "complete":
        return f"{name}  {summary['status']}: {summary['reason']}"
    result, timing = summary["result"], summary["timing"]
    shift = f"  shift {_number(result['shift_w1'], '.3f')}" if result["shift"] else ""
    return (
        f"{name}  test accuracy {100 * result['test_accuracy']:.2f} %  train loss {result['train_loss']:.4f}"
        f"{shift}  {_number(timing['step_ms'], '.2f')} ms per step"
    )


def print_table(results: Mapping[str, Any], where: Console) -> None:
    """Print the table of a comparison, one row per norm and optimizer: means over seeds and their spread.

    A narrow terminal gets fewer columns; all of them are in ``results.json`` and in the report.
    """
    baseline = results["baseline"]
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "norm": lambda row: str(row["norm"]),
        "optim": lambda row: str(row["optim"]),
        "runs": lambda row: f"{row['complete']}/{row['seeds']}",
        "test acc. %": lambda row: _spread(row["test_accuracy"], ".2f", 100) if row["complete"] else _failure(row),
        f"vs {baseline}": lambda row: _spread(row["difference"], "+.2f", 100),
        "train loss": lambda row: _spread(row["train_loss"], ".4f"),
        "shift W1": lambda row: _spread(row["shift_w1"], ".3f"),
        "relative": lambda row: _spread(row["shift_relative"], ".3f"),
        "holds": lambda row: {True: "yes", False: "NO", None: ""}[row["shift_interval_holds"]],
        "step ms": lambda row: _spread(row["step_ms"], ".2f"),
        "ratio": lambda row: _number(row["step_ratio"], ".2f"),
    }
    for limit, dropped in ((125, "train loss"), (107, "relative"), (91, "step ms"), (77, "runs"), (70, "holds")):
        if where.width < limit:
            del columns[dropped]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in columns:
        table.add_column(heading, justify="left" if heading in ("norm", "optim") else "right", no_wrap=True)
    previous = None
    for row in results["table"]:
        if previous is not None and row["optim"] != previous:
            table.add_section()
        previous = row["optim"]
        table.add_row(*(cell(row) for cell in columns.values()))
    where.print(table)
    where.print(
        f"Mean ± standard deviation over seeds; vs {baseline}: paired by seed. Shift: Wasserstein-1 distance that one "
        f"update moves a layer's output, mean over layers and measurements; relative to the spread of the output; "
        f"holds: lower bound <= W1 <= upper bound everywhere. Ratio: step time over that of {baseline}.",
        style="dim",
    )
    remarks: dict[str, list[str]] = {}
    for row in results["table"]:
        cell = f"{row['norm']} {row['optim']}"
        for status in ("diverged", "refused"):
            if row[status]:
                count = "" if row[status] == row["seeds"] else f"{row[status]} of {row['seeds']} "
                remarks.setdefault(str(row["reason"]), []).append(f"{cell} {count}{status}")
        for note in row["notes"]:
            remarks.setdefault(note, []).append(cell)
    for remark, cells in remarks.items():
        where.print(f"{', '.join(cells)}: {remark}", markup=False)


def _failure(row: Mapping[str, Any]) -> str:
    """Return why a row has no numbers, in one word."""
    return "diverged" if row["diverged"] else "refused"


def _number(value: float | None, form: str) -> str:
    """Return a formatted number, or nothing for none."""
    return "" if value is None else format(value, form)


def _spread(cell: Mapping[str, Any] | None, form: str, scale: float = 1.0) -> str:
    """Return ``mean ± std``; the mean alone for a single seed, nothing for no value."""
    if cell is None or cell["mean"] is None:
        return ""
    text = format(scale * cell["mean"], form)
    return text if cell["std"] is None else f"{text} ± {format(scale * cell['std'], form.lstrip('+'))}"
