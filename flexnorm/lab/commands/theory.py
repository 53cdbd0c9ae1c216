"""``flexnorm theory``: the numbers of the theory as tables, JSON and plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexnorm.lab.commands.friendly import friendly
from flexnorm.lab.files import check_folder

if TYPE_CHECKING:
    from flexnorm.lab.figures import Figure

app = typer.Typer(help="What theory says BatchNorm does: numbers, simulations, plots.", no_args_is_help=True)


@friendly()
def _writable(option: typer.CallbackParam, path: Path | None) -> Path | None:
    """Refuse what cannot be written to before the minutes of a simulation."""
    if path is not None:
        from flexnorm.lab.charts import check_format

        check_folder(path)
        if option.name == "plot":
            check_format(path)
    return path


_PLOT = "Write the figure here (.png, .svg, .pdf; needs flexnorm\\[plot])."
Plot = Annotated[Path | None, typer.Option(help=_PLOT, callback=_writable)]
AsJson = Annotated[Path | None, typer.Option("--json", help="Write the numbers here.", callback=_writable)]
Runs = Annotated[int, typer.Option(help="Simulated runs per point.")]
Size = Annotated[int, typer.Option("--inputs", help="Inputs N of the simulated students.")]
Seed = Annotated[int, typer.Option(help="Seed of the simulations.")]


@app.command(
    epilog="Example:  flexnorm theory dynamics --activation relu --zeta 0.125 --quantity R --plot dynamics.png"
)
@friendly()
def dynamics(
    activation: Annotated[str, typer.Option(help="identity, relu, tanh, gelu, ...")] = "relu",
    lr: Annotated[float, typer.Option(help="Learning rate, the paper's eta.")] = 0.5,
    zeta: Annotated[float, typer.Option(help="Gamma decay of BN: 1/(4M) for ReLU, 1/(2M) linear.")] = 0.125,
    quantity: Annotated[str, typer.Option(help="error, gamma, R, L or effective_lr.")] = "error",
    times: Annotated[float, typer.Option(help="Last time, in samples per input.")] = 20.0,
    inputs: Size = 500,
    runs: Runs = 16,
    seed: Seed = 0,
    plot: Plot = None,
    as_json: AsJson = None,
) -> None:
    """Learning dynamics of BN, WN and SGD: equations of motion beside simulated online SGD (Luo et al., sec. 3)."""
    from flexnorm.lab.figures import dynamics_figure
    from flexnorm.theory.dynamics import METHODS, Student

    settings: dict[str, Any] = {"activation": activation, "lr": lr, "zeta": zeta, "quantity": quantity}
    figure = dynamics_figure(**settings, times=times, N=inputs, runs=runs, seed=seed)
    rows = []
    for method in METHODS:
        decay = zeta if method == "bn" else 0.0
        student = Student(method, activation, lr, decay)
        point = student.fixed_point()
        effective = student.effective_learning_rate(point.gamma, point.L)
        rows.append([method.upper(), point.gamma, point.R, student.max_learning_rate(), effective])
    _table("Fixed points", ["", "gamma", "R", "largest learning rate", "effective learning rate"], rows)
    _show(figure, plot, as_json)


@app.command(epilog="Example:  flexnorm theory generalization --activation identity --plot generalization.png")
@friendly()
def generalization(
    activation: Annotated[str, typer.Option(help="identity (the paper's Fig. 1a) or relu (Fig. 1b).")] = "identity",
    batch_size: Annotated[int | None, typer.Option(help="M. (default: the paper's 32 or 16)")] = None,
    noise: Annotated[float, typer.Option(help="Variance of the noise of the labels.")] = 0.25,
    inputs: Size = 256,
    runs: Runs = 6,
    seed: Seed = 0,
    plot: Plot = None,
    as_json: AsJson = None,
) -> None:
    """Generalization error of SGD, BN and WN + gamma decay against samples per input (Luo et al., sec. 4)."""
    from flexnorm._messages import unknown_name
    from flexnorm.lab.figures import figure_1a, figure_1b

    makers = {"identity": (figure_1a, 32), "relu": (figure_1b, 16)}
    if activation not in makers:
        raise ValueError(unknown_name("activation", activation, makers))
    make, size = makers[activation]
    chosen = size if batch_size is None else batch_size
    _show(make(batch_size=chosen, noise=noise, N=inputs, runs=runs, seed=seed), plot, as_json)


@app.command(epilog="Example:  flexnorm theory regularization --plot regularization.png")
@friendly()
def regularization(
    samples: Annotated[int, typer.Option(help="Samples per simulated point.")] = 640_000,
    seed: Seed = 0,
    plot: Plot = None,
    as_json: AsJson = None,
) -> None:
    """What batch statistics add to the loss, zeta gamma^2, against simulation and batch size (Luo et al., eq. 3)."""
    from flexnorm.lab.figures import regularization_figure

    _show(regularization_figure(samples=samples, seed=seed), plot, as_json)


def _show(figure: Figure, plot: Path | None, as_json: Path | None) -> None:
    """Print every curve of a figure, and write what was asked for."""
    for curve in figure.curves:
        stride = max(1, len(curve.x) // 12)
        errors = curve.error or (None,) * len(curve.x)
        points = list(zip(curve.x, curve.y, errors, strict=True))[::stride]
        _table(curve.label, [figure.x_label, figure.y_label, "± standard error"], [list(point) for point in points])
    if figure.notes:
        typer.echo(figure.notes)
    if as_json is not None:
        as_json.write_text(json.dumps(figure.asdict(), indent=1) + "\n", encoding="utf-8")
        typer.echo(f"numbers: {as_json}")
    if plot is not None:
        from flexnorm.lab.figures import plot as draw

        draw(figure, str(plot))
        typer.echo(f"plot: {plot}")


def _table(title: str, header: list[str], rows: list[list[Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in header:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*("" if value is None else value if isinstance(value, str) else f"{value:.4g}" for value in row))
    Console(soft_wrap=True).print(table)
