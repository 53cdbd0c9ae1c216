"""``flexnorm recipe``: the experiments of the papers, ready to run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexnorm._messages import unknown_name
from flexnorm.lab.commands.experiment import override, run_experiment, run_one
from flexnorm.lab.commands.friendly import friendly, takes

if TYPE_CHECKING:
    from flexnorm.lab.data import ImageData
    from flexnorm.lab.run import Config

app = typer.Typer(help="Experiments of the papers, ready to run.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Name of a recipe.")]


@app.command("list")
@friendly()
def recipe_list() -> None:
    """List the recipes."""
    found = _recipes()
    width = max(len(name) for name in found)
    for name, path in found.items():
        content = _read(path)
        scales = ", ".join(content.get("scales") or {}) or "one scale"
        typer.echo(f"{name:{width}s}  {content.get('title', '')}  [{scales}]")


@app.command("show")
@friendly()
def recipe_show(name: Name) -> None:
    """Print a recipe: the paper's table or figure, its published numbers and the settings."""
    typer.echo(_recipe(name).read_text(encoding="utf-8"), nl=False)


@app.command("run")
@takes(
    *("scale", "data", "set", "out"),
    data="Where the data is. (default: the recipe's)",
    out="Folder of the experiment. (default: runs/NAME-SCALE)",
)
@friendly(resumes=True)
def recipe_run(
    name: Name,
    variant: Annotated[
        str | None, typer.Option(help="Only these of the recipe's variants, e.g. batch-1,batch-8. (default: all)")
    ] = None,
    *,
    given: dict[str, Any],
) -> None:
    """Run a recipe, like compare --config; each of its variants is an experiment in a folder of its own."""
    from flexnorm.lab.run import load_variants

    path, scale = _recipe(name), given["scale"]
    folder = given["out"] or Path("runs") / (f"{name}-{scale}" if scale else name)
    scales = _read(path).get("scales") or {}
    if scale is None and scales:
        typer.echo(f"running at the scale of the paper; --scale takes {', '.join(scales)}")
    variants = load_variants(path, scale)
    if list(variants) == [""]:
        if variant is not None:
            raise ValueError(f"recipe {name} has no variants to choose {variant} from")
        run_experiment({**given, "config": path, "out": folder})
        return
    for wanted in variant.split(",") if variant else ():
        if wanted not in variants:
            raise ValueError(unknown_name("variant", wanted, variants))
    for values in variants.values():
        override(values, {"data": given["data"], "set": given["set"]})
    title = f"{name}{f' ({scale})' if scale else ''}"
    _run_variants(title, {v: variants[v] for v in (variant.split(",") if variant else variants)}, folder)


def _run_variants(title: str, variants: dict[str, dict[str, Any]], out: Path) -> None:
    """Run experiments, each in a folder of its own, when the settings of all are known to be right."""
    from flexnorm.lab import data as datasets
    from flexnorm.lab.run import Config
    from flexnorm.lab.run.terminal import console

    configs: dict[str, Config] = {}
    for variant, values in variants.items():
        try:
            configs[variant] = Config.from_dict(values)
        except ValueError as error:
            raise ValueError(f"variant {variant}: {error}") from error
    screen = console()
    loaded: dict[tuple[str, int | None], ImageData] = {}
    for number, (variant, config) in enumerate(configs.items(), start=1):
        source = (config.data, config.limit)
        if source not in loaded:
            loaded = {source: datasets.load(config.data, limit=config.limit)}
        screen.print(f"{title}, variant {number} of {len(configs)}: {variant}")
        run_one(config, out / variant, screen, data=loaded[source])


def _recipes() -> dict[str, Path]:
    """Return the recipes by name: those beside the installed package, else those of the working directory."""
    lab = Path(__file__).parents[1]
    for folder in (lab / "recipes", lab.parents[1] / "recipes", Path("recipes")):
        found = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
        if found:
            return found
    raise ValueError("there are no recipes here; run this inside the repository, or use compare --config FILE.yaml")


def _recipe(name: str) -> Path:
    """Return the file of one recipe."""
    found = _recipes()
    if name not in found:
        raise ValueError(unknown_name("recipe", name, found))
    return found[name]


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a recipe file."""
    import yaml

    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}
