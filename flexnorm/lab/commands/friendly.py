"""What commands share: options that are declared once, and errors as one message and an exit code."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

BAD_INPUT, FAILED = 2, 1

OPTIONS: dict[str, tuple[Any, str]] = {
    "data": (str, "digits (bundled), FILE.npz, an image folder or hf:NAME. (default: digits)"),
    "limit": (int, "Use at most this many training and test images, stratified."),
    "model": (str, "Network: convnet, resnet8, resnet20, vgg_small, nin, ... (default: convnet)"),
    "norm": (str, "Normalization. (default: batch)"),
    "optim": (str, "Optimizer: sgd, sgdg, adamg, adamw, sgdp, adamp. (default: sgd)"),
    "epochs": (int, "Passes over the training images. (default: 10)"),
    "seed": (int, "Weights, order and augmentation follow from it. (default: 0)"),
    "seeds": (str, "How many seeds (3), or which (0,5,7). (default: 3)"),
    "batch_size": (int, "Images per update. (default: 64)"),
    "lr": (float, "Learning rate in place of each optimizer's default; lr_manifold stays (--set)."),
    "schedule": (str, "constant, cosine, onecycle or step. (default: onecycle)"),
    "augment": (str, "Any of flip,shift,crop. (default: none)"),
    "device": (str, "auto, cpu, cuda, cuda:1, mps. (default: auto)"),
    "precision": (str, "32-true, bf16-mixed, 16-mixed, 64-true. (default: 32-true)"),
    "threads": (int, "CPU threads; 0 chooses by the size of the images. (default: 0)"),
    "config": (Path, "YAML file or recipe; options given here win over it."),
    "scale": (str, "Scale of the recipe (small, full)."),
    "set": (list[str], "Any other setting: --set optims.sgdg.lr_manifold=0.1"),
    "out": (Path, "Folder of the experiment. (default: runs/DATA)"),
}
"""Type and help of every option of an experiment; none needs to be given."""


def takes(*names: str, **words: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command options of an experiment: what is said on the command line reaches it as the mapping ``given``.

    Args:
        *names: Which of `OPTIONS`.
        **words: Help that differs.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def called(**values: Any) -> None:
            given = {name: values.pop(name) for name in names}
            command(given=given, **values)

        own = [p for n, p in inspect.signature(command, eval_str=True).parameters.items() if n != "given"]
        added = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=typer.Option(None, help=words.get(name, OPTIONS[name][1])),
                annotation=OPTIONS[name][0] | None,
            )
            for name in names
        ]
        vars(called)["__signature__"] = inspect.Signature([*own, *added])
        called.__annotations__ = {p.name: p.annotation for p in (*own, *added)}
        return called

    return decorate


@contextlib.contextmanager
def friendly(resumes: bool = False) -> Iterator[None]:
    """Turn errors into one message on standard error and an exit code; with FLEXNORM_TRACEBACK=1 they pass through.

    Exit codes: 2 for input that cannot be used, 1 for a disk that takes no more, 130 after Ctrl-C, 143 after SIGTERM.
    After Ctrl-C, commands that go on where they ended (``resumes``) say so.
    """
    try:
        yield
    except KeyboardInterrupt:
        _fail(130, "stopped." + " The same command resumes where this one ended." * resumes)
    except Exception as error:
        if os.environ.get("FLEXNORM_TRACEBACK"):
            raise
        from flexnorm.lab.run import BusyError, Interrupted

        if isinstance(error, Interrupted):
            _fail(error.exit_code, "stopped. What was complete is kept; the same command resumes where this one ended.")
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            reason = str(error) if error.filename is None else f"{error.filename}: {error.strerror}"
            _fail(
                FAILED,
                f"error: {reason.split('] ', 1)[-1]}. What was written before is intact: make room or rights, or "
                f"choose another --out, and run the same command again to go on.",
            )
        if isinstance(error, ValueError | TypeError | FileNotFoundError | ImportError | BusyError):
            _fail(BAD_INPUT, f"error: {error}")
        raise


def _fail(code: int, message: str) -> None:
    """Print a message to standard error and end with an exit code."""
    typer.echo(message, err=True)
    raise typer.Exit(code)
