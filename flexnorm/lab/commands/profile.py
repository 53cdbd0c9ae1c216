"""``flexnorm profile``: what normalization does in a network, and what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexnorm.lab.commands.friendly import friendly

__all__ = ["profile"]


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
    with friendly():
        from flexnorm.lab.profile import command

        command(
            model,
            norm=norm,
            data=data,
            limit=limit,
            checkpoint=checkpoint,
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            device=device,
            json_to=json_to,
            everything=everything,
        )
