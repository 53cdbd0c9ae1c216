"""Wording of error messages that several packages share; imports nothing of this package."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


def unknown_name(kind: str, name: object, valid: Iterable[str]) -> str:
    """Return the message for a name that is not in a list: the value seen, the nearest match and all valid names.

    Args:
        kind: What the name stands for, in the singular (``"norm"``, ``"data set"``).
        name: The value that was given.
        valid: All names that would have been accepted.

    Examples:
        >>> unknown_name("norm", "bacth", ["batch", "group"])
        "unknown norm 'bacth'; did you mean 'batch'? Valid: batch, group"
    """
    names = sorted(valid)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"unknown {kind} {name!r}{hint} Valid: {', '.join(names)}"


def optional(module: str, purpose: str, extra: str) -> Any:
    """Import a module that not every installation has.

    Args:
        module: Its name as in ``import module``.
        purpose: What needs it, as the subject of a sentence (``"method='exact'"``).
        extra: The extra of this package that installs it.

    Returns:
        The module.

    Raises:
        ImportError: It is not installed; the message says what to install.

    Examples:
        >>> optional("math", "this example", "lab").pi > 3
        True
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise ImportError(f"{purpose} needs {error.name}: pip install 'flexnorm[{extra}]'") from error
