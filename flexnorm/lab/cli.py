"""The command line: it parses, calls the packages below and turns their errors into one sentence and an exit code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flexnorm._version import __version__
from flexnorm.lab.commands import recipe, theory
from flexnorm.lab.commands.experiment import compare, train
from flexnorm.lab.commands.friendly import friendly, takes
from flexnorm.lab.commands.profile import profile

app = typer.Typer(
    name="flexnorm",
    help="What does normalization do to a deep network? Train, measure, compare, replace.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(recipe.app, name="recipe")
app.add_typer(theory.app, name="theory")
app.command(epilog="Example:  flexnorm profile timm:resnet18 --data photos/ --batch-size 8")(profile)
app.command(
    epilog="Examples:  flexnorm compare  |  flexnorm compare --data cifar10.npz --limit 2000 --model resnet8 "
    "--norm batch,unitized --epochs 5  |  flexnorm compare --config recipes/NAME.yaml --scale small"
)(compare)
app.command(epilog="Example:  flexnorm train --norm unitized --optim sgdg --epochs 20")(train)


def main() -> None:
    """Run the command line."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flexnorm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
@friendly()
def report(out: Annotated[Path, typer.Argument(help="Folder of an experiment.")]) -> None:
    """Make report.html of an experiment again from the files in its folder."""
    from flexnorm.lab.report import write_report

    typer.echo(f"report: {write_report(out)}")


@app.command("data")
@takes("limit")
@friendly()
def describe(
    spec: Annotated[str, typer.Argument(help="digits, FILE.npz, an image folder or hf:NAME.")],
    *,
    given: dict[str, Any],
) -> None:
    """Check a data set and describe it."""
    from flexnorm.lab.data import load

    images = load(spec, **given)
    typer.echo(images.describe())
    for name, values in (("mean", images.mean), ("std", images.std)):
        typer.echo(f"{name:5s} {'  '.join(f'{v:.4f}' for v in values.tolist())}  (per channel; 8-bit as 0 to 1)")
    counts = [y.bincount(minlength=images.num_classes).tolist() for y in (images.y_train, images.y_test)]
    width = max(len(name) for name in images.classes)
    for name, a, b in zip(images.classes, *counts, strict=True):
        typer.echo(f"  {name:{width}s}  {a:6d} train  {b:6d} test")
