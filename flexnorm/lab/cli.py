"""The command line: it parses, calls the rooms below and turns their errors into one sentence and an exit code."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from flexnorm._version import __version__
from flexnorm.lab.commands import theory
from flexnorm.lab.commands.friendly import FAILED, friendly
from flexnorm.lab.commands.profile import profile

__all__ = ["app", "main"]

app = typer.Typer(
    name="flexnorm",
    help="What does normalization do to a deep network? Train, measure, compare, replace.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes = typer.Typer(help="Experiments of the papers, ready to run.", no_args_is_help=True)
app.add_typer(recipes, name="recipe")
app.add_typer(theory.app, name="theory")
app.command(epilog="Example:  flexnorm profile timm:resnet18 --data photos/ --batch-size 8")(profile)

Data = Annotated[
    str | None, typer.Option(help="digits (bundled), FILE.npz, an image folder or hf:NAME. (default: digits)")
]
Limit = Annotated[int | None, typer.Option(help="Use at most this many training and test images, stratified.")]
Model = Annotated[
    str | None, typer.Option(help="Network: convnet, resnet8, resnet20, vgg_small, nin, ... (default: convnet)")
]
Epochs = Annotated[int | None, typer.Option(help="Passes over the training images. (default: 10)")]
BatchSize = Annotated[int | None, typer.Option(help="Images per update. (default: 64)")]
Lr = Annotated[
    float | None, typer.Option(help="Learning rate in place of each optimizer's default; lr_manifold stays (--set).")
]
Schedule = Annotated[str | None, typer.Option(help="constant, cosine, onecycle or step. (default: onecycle)")]
Augment = Annotated[str | None, typer.Option(help="Any of flip,shift,crop. (default: none)")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps. (default: auto)")]
Precision = Annotated[str | None, typer.Option(help="32-true, bf16-mixed, 16-mixed, 64-true. (default: 32-true)")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; 0 chooses by the size of the images. (default: 0)")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file or recipe; options given here win over it.")
]
Scale = Annotated[str | None, typer.Option(help="Scale of the recipe (small, full).")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Any other setting: --set optims.sgdg.lr_manifold=0.1")]
Out = Annotated[Path | None, typer.Option(help="Folder of the experiment. (default: runs/DATA)")]


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


@app.command(
    epilog="Examples:  flexnorm compare  |  flexnorm compare --data cifar10.npz --limit 2000 --model resnet8 "
    "--norm batch,unitized --epochs 5  |  flexnorm compare --config recipes/NAME.yaml --scale small"
)
def compare(
    data: Data = None,
    limit: Limit = None,
    model: Model = None,
    norm: Annotated[
        str | None,
        typer.Option(help="Normalizations, e.g. batch,group. (default: none,batch,group,unitized,population,normprop)"),
    ] = None,
    optim: Annotated[
        str | None, typer.Option(help="Optimizers: sgd,sgdg,adamg,adamw,sgdp,adamp. (default: sgd,sgdg,adamg)")
    ] = None,
    epochs: Epochs = None,
    seeds: Annotated[str | None, typer.Option(help="How many seeds (3), or which (0,5,7). (default: 3)")] = None,
    batch_size: BatchSize = None,
    lr: Lr = None,
    schedule: Schedule = None,
    augment: Augment = None,
    device: Device = None,
    precision: Precision = None,
    threads: Threads = None,
    config: ConfigFile = None,
    scale: Scale = None,
    settings: Set = None,
    out: Out = None,
) -> None:
    """Train one network under several normalizations, optimizers and seeds; report accuracy, shift and speed.

    The same command again skips what is complete and resumes what is not.
    """
    with friendly():
        given = {
            "data": data,
            "limit": limit,
            "model": model,
            "norms": norm,
            "optims": optim,
            "epochs": epochs,
            "seeds": _seeds(seeds),
            "batch_size": batch_size,
            "lr": lr,
            "schedule": schedule,
            "augment": augment,
            "device": device,
            "precision": precision,
            "threads": threads,
        }
        _compare(given, config, scale, settings, out)


@app.command(epilog="Example:  flexnorm train --norm unitized --optim sgdg --epochs 20")
def train(
    data: Data = None,
    limit: Limit = None,
    model: Model = None,
    norm: Annotated[str | None, typer.Option(help="Normalization. (default: batch)")] = None,
    optim: Annotated[
        str | None, typer.Option(help="Optimizer: sgd, sgdg, adamg, adamw, sgdp, adamp. (default: sgd)")
    ] = None,
    epochs: Epochs = None,
    seed: Annotated[
        int | None, typer.Option(help="Weights, order and augmentation follow from it. (default: 0)")
    ] = None,
    batch_size: BatchSize = None,
    lr: Lr = None,
    schedule: Schedule = None,
    augment: Augment = None,
    device: Device = None,
    precision: Precision = None,
    threads: Threads = None,
    config: ConfigFile = None,
    scale: Scale = None,
    settings: Set = None,
    out: Out = None,
) -> None:
    """Train one network once, with a line per epoch. Interrupted, the same command resumes."""
    with friendly():
        given = {
            "data": data,
            "limit": limit,
            "model": model,
            "norms": norm,
            "optims": optim,
            "epochs": epochs,
            "seeds": None if seed is None else [seed],
            "batch_size": batch_size,
            "lr": lr,
            "schedule": schedule,
            "augment": augment,
            "device": device,
            "precision": precision,
            "threads": threads,
        }
        _compare(given, config, scale, settings, out, single=True)


@app.command()
def report(out: Annotated[Path, typer.Argument(help="Folder of an experiment.")]) -> None:
    """Make report.html of an experiment again from the files in its folder."""
    with friendly():
        from flexnorm.lab.report import write_report

        typer.echo(f"report: {write_report(out)}")


@app.command("data")
def describe(
    spec: Annotated[str, typer.Argument(help="digits, FILE.npz, an image folder or hf:NAME.")],
    limit: Limit = None,
) -> None:
    """Check a data set and describe it."""
    with friendly():
        from flexnorm.lab.data import load

        images = load(spec, limit=limit)
        typer.echo(images.describe())
        for name, values in (("mean", images.mean), ("std", images.std)):
            typer.echo(f"{name:5s} {'  '.join(f'{v:.4f}' for v in values.tolist())}  (per channel; 8-bit as 0 to 1)")
        train_count = images.y_train.bincount(minlength=images.num_classes).tolist()
        test_count = images.y_test.bincount(minlength=images.num_classes).tolist()
        width = max(len(name) for name in images.classes)
        for name, a, b in zip(images.classes, train_count, test_count, strict=True):
            typer.echo(f"  {name:{width}s}  {a:6d} train  {b:6d} test")


@recipes.command("list")
def recipe_list() -> None:
    """List the recipes."""
    with friendly():
        found = _recipes()
        width = max(len(name) for name in found)
        for name, path in found.items():
            content = _read_recipe(path)
            scales = ", ".join(content.get("scales") or {}) or "one scale"
            typer.echo(f"{name:{width}s}  {content.get('title', '')}  [{scales}]")


@recipes.command("show")
def recipe_show(name: Annotated[str, typer.Argument(help="Name of a recipe.")]) -> None:
    """Print a recipe: the paper's table or figure, its published numbers and the settings."""
    with friendly():
        typer.echo(_recipe(name).read_text(encoding="utf-8"), nl=False)


@recipes.command("run")
def recipe_run(
    name: Annotated[str, typer.Argument(help="Name of a recipe.")],
    scale: Scale = None,
    data: Annotated[str | None, typer.Option(help="Where the data is. (default: the recipe's)")] = None,
    variant: Annotated[
        str | None, typer.Option(help="Only these of the recipe's variants, e.g. batch-1,batch-8. (default: all)")
    ] = None,
    settings: Set = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the experiment. (default: runs/NAME-SCALE)")] = None,
) -> None:
    """Run a recipe, like compare --config; each of its variants is an experiment in a folder of its own."""
    with friendly():
        from flexnorm.lab.run.recipes import load_variants

        path = _recipe(name)
        folder = out or Path("runs") / (f"{name}-{scale}" if scale else name)
        scales = _read_recipe(path).get("scales") or {}
        if scale is None and scales:
            typer.echo(f"running at the scale of the paper; --scale takes {', '.join(scales)}")
        variants = load_variants(path, scale)
        if list(variants) == [""]:
            if variant is not None:
                raise ValueError(f"recipe {name} has no variants to choose {variant} from")
            _compare({"data": data}, path, scale, settings, folder)
            return
        for values in variants.values():
            _override(values, {"data": data}, settings)
        from flexnorm.lab.commands.study import run_study

        run_study(name, scale, variants, folder, variant.split(",") if variant else None)


def _compare(
    given: dict[str, Any],
    file: Path | None,
    scale: str | None,
    settings: list[str] | None,
    out: Path | None,
    single: bool = False,
) -> None:
    """Put the settings together, run the experiment, print the table and write the report."""
    if scale is not None and file is None:
        raise ValueError("--scale needs --config with a recipe")
    # Wrong settings are worth saying before the seconds that importing torch takes... and data that are missing, too.
    from flexnorm.lab.run import Config, load_config

    values = load_config(file, scale) if file else {}
    values = {{"norm": "norms", "optim": "optims", "seed": "seeds"}.get(k, k): v for k, v in values.items()}
    _override(values, given, settings)
    if single:
        values = {"norms": "batch", "optims": "sgd", "seeds": [0], **values}
    if isinstance(values.get("out"), str):
        out = out or Path(values.pop("out"))
    config = Config.from_dict(values)
    folder = out or Path("runs") / (_stem(str(file)) if file else _stem(config.data))
    if single:
        cells = (config.norms, tuple(config.optims), config.seeds)
        for option, names in zip(("--norm", "--optim", "--seed"), cells, strict=True):
            if len(names) > 1:
                raise ValueError(
                    f"train takes one of {', '.join(map(str, names))}: choose with {option}, or use compare"
                )
        (norm,), (optim,), (seed,) = cells
        config = dataclasses.replace(config, baseline=norm)
        folder = out or Path("runs") / f"{_stem(config.data)}-{norm}-{optim}-seed{seed}"

    from flexnorm.lab.commands.study import run_one
    from flexnorm.lab.run.terminal import console, print_table

    screen = console()
    results, path = run_one(config, folder, screen, epochs=single)
    if not single:
        print_table(results, screen)
    screen.print(f"all runs: {results.total_seconds:.1f} s; report: {path}", soft_wrap=True)
    if not results.complete:
        typer.echo("no run was completed: see the reasons above", err=True)
        raise typer.Exit(FAILED)


def _override(values: dict[str, Any], given: dict[str, Any], settings: list[str] | None) -> None:
    """Put the options of the command line, then its --set, over the settings of a file, in place."""
    import yaml

    from flexnorm.lab.run.recipes import assign

    for key, value in given.items():
        if value is None:
            continue
        if key == "optims" and isinstance(values.get(key), dict):
            # Choosing among the optimizers of a file keeps the settings that the file gives them.
            value = {name.strip(): values[key].get(name.strip()) for name in value.split(",") if name.strip()}
        values[key] = value
    for text in settings or []:
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
    return (
        Path(spec.removeprefix("hf:").rstrip("/")).name.removesuffix(".npz").removesuffix(".yaml").removesuffix(".yml")
        or "data"
    )


def _recipes() -> dict[str, Path]:
    """Return the recipes by name: those beside the installed package, else those of the working directory."""
    package = Path(__file__).parent
    for folder in (package / "recipes", package.parents[1] / "recipes", Path("recipes")):
        found = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
        if found:
            return found
    raise ValueError("there are no recipes here; run this inside the repository, or use compare --config FILE.yaml")


def _recipe(name: str) -> Path:
    """Return the file of one recipe."""
    from flexnorm._messages import unknown_name

    found = _recipes()
    if name not in found:
        raise ValueError(unknown_name("recipe", name, found))
    return found[name]


def _read_recipe(path: Path) -> dict[str, Any]:
    """Return the content of a recipe file."""
    import yaml

    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}
