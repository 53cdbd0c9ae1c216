"""What ``flexnorm profile`` does, without a command line around it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from flexnorm.lab.profile.records import Profile
from flexnorm.lab.profile.run import profile
from flexnorm.lab.profile.terminal import print_profile
from flexnorm.lab.run.files import atomic_write, writing


def command(
    model: str,
    *,
    json_to: str | os.PathLike[str] | None = None,
    everything: bool = False,
    console: Any = None,
    **options: Any,
) -> Profile:
    """Profile a model, print the table and the verdicts, and write them as JSON where asked for.

    Args:
        model: What :func:`flexnorm.lab.profile.load_model` takes.
        json_to: File to write :meth:`Profile.asdict` to; ``"-"`` prints it instead of the table.
        everything: Also print the findings that ask for nothing.
        console: A ``rich`` console; by default one as wide as the terminal, or 150 columns where there is none.
        **options: Other arguments of :func:`flexnorm.lab.profile.profile`.

    Returns:
        The profile.

    Raises:
        ValueError: As :func:`flexnorm.lab.profile.profile`.
        ImportError: Something that the model or the data needs is not installed.
        FileNotFoundError: There is no such data or checkpoint.
        OSError: The file cannot be written; what was there before stays.
    """
    if console is None:
        from rich.console import Console

        console = Console(highlight=False)
        console = console if console.is_terminal else Console(highlight=False, width=150)
    if json_to is not None and str(json_to) != "-":
        # Worth knowing before the minutes that a profile may take.
        folder = Path(json_to).expanduser().absolute().parent
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder} to write {Path(json_to).name} to")
    result = profile(model, **options)
    text = json.dumps(result.asdict(), indent=1, allow_nan=False)
    if str(json_to) == "-":
        console.out(text, highlight=False)
        return result
    print_profile(result, console, everything=everything)
    if json_to is not None:
        path = Path(json_to).expanduser()
        with writing(path):
            atomic_write(path, f"{text}\n".encode())
        console.print(f"written: {path}", soft_wrap=True, markup=False)
    return result
