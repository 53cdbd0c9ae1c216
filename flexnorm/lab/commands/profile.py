"""``flexnorm profile``: what normalization does in a network, and what to change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexnorm.lab.commands.friendly import friendly

if TYPE_CHECKING:
    from flexnorm.lab.profile import Profile


@friendly()
def profile(
    model: Annotated[str, typer.Argument(help="A network of ours, timm:NAME, or package.module:factory.")] = "resnet8",
    norm: Annotated[str | None, typer.Option(help="Its normalization, for networks that are built here.")] = None,
    data: Annotated[str, typer.Option(help="digits (bundled), FILE.npz, an image folder or hf:NAME.")] = "digits",
    limit: Annotated[int | None, typer.Option(help="Use at most this many training images.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights: .safetensors, or a torch file of tensors.")] = None,
    steps: Annotated[int, typer.Option(help="Training steps to take.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Images per step; the noise of the statistics depends on it.")] = 64,
    lr: Annotated[float, typer.Option(help="Learning rate of the steps (SGD with momentum).")] = 0.05,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    json_to: Annotated[
        Path | None, typer.Option("--json", help="Write everything here; - for standard output.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also print the findings that ask for nothing.")] = False,
) -> None:
    """Train a network for some steps, measure every normalization in it, and say what to change, with the numbers."""
    show_profile(**locals())


def show_profile(
    model: str, *, json_to: str | Path | None = None, everything: bool = False, console: Any = None, **options: Any
) -> Profile:
    """Profile a model, print the table and the verdicts, and write them as JSON where asked for.

    Args:
        model: What :func:`flexnorm.lab.profile.load_model` takes.
        json_to: File to write :meth:`flexnorm.lab.profile.Profile.asdict` to; ``"-"`` prints it instead of the table,
            and the progress to standard error.
        everything: Also print the findings that ask for nothing.
        console: A ``rich`` console; by default one as wide as the terminal, or 150 columns where there is none.
        **options: Other arguments of :func:`flexnorm.lab.profile.profile`, whose errors are passed on.

    Raises:
        FileNotFoundError: There is no such folder to write to.
        OSError: The file cannot be written; what was there before stays.
    """
    from rich.console import Console

    # The first word comes at once, before torch is there: what follows may take minutes.
    alone = str(json_to) == "-"
    progress = Console(stderr=True, highlight=False) if alone else console or Console(highlight=False)
    progress.print(f"profile of {model} on {options.get('data', 'digits')}", markup=False)

    from flexnorm.lab.files import atomic_write, check_folder
    from flexnorm.lab.profile import display, print_profile
    from flexnorm.lab.profile import profile as measure
    from flexnorm.lab.run.terminal import console as screen

    console = console or screen(150)
    if json_to is not None and not alone:
        # Worth knowing before the minutes that a profile may take.
        check_folder(Path(json_to))
    with display(progress) as notify:
        result = measure(model, notify=notify, **options)
    text = json.dumps(result.asdict(), indent=1, allow_nan=False)
    if alone:
        console.out(text, highlight=False)
        return result
    print_profile(result, console, everything=everything)
    if json_to is not None:
        path = Path(json_to).expanduser()
        atomic_write(path, f"{text}\n".encode())
        console.print(f"written: {path}", soft_wrap=True, markup=False)
    return result
