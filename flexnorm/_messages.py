"""Wording of error messages that several packages share; imports nothing of this package."""

from __future__ import annotations

import difflib
import importlib
import warnings
from collections.abc import Iterable
from typing import Any


class NothingDone(UserWarning):
    """A function that changes a model found nothing to change: it says how many candidates it saw and why none fitted.

    Examples:
        >>> import warnings
        >>> import flexnorm
        >>> warnings.simplefilter("error", flexnorm.NothingDone)  # a script that relies on the change stops there
        >>> warnings.simplefilter("default", flexnorm.NothingDone)
    """


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


def nothing_done(call: str, what: str, candidates: Iterable[tuple[str, str]], advice: str, stacklevel: int = 3) -> str:
    """Warn that a call changed nothing, and return the text: the number of candidates, and the reasons with names.

    Args:
        call: What was called, as the user wrote it (``"fold(model)"``).
        what: What it takes, in the plural (``"weights"``).
        candidates: Name and reason of each thing that was looked at and not taken; what stands in parentheses at the
            end of a reason (a number measured, say) does not tell reasons apart.
        advice: What to do.
        stacklevel: As of :func:`warnings.warn`, seen from here: 3 is the caller of the function that calls this.

    Examples:
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore", NothingDone)
        ...     nothing_done("f(model)", "norms", [("a", "too big (3)"), ("b", "too big (4)"), ("c", "old")], "Wait.")
        'f(model) changed nothing: 0 of 3 norms (a, b: too big (3); c: old). Wait.'
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore", NothingDone)
        ...     nothing_done("f(model)", "norms", [], "Wait.")
        'f(model) changed nothing: the model has no norms. Wait.'
    """
    grouped: dict[str, list[tuple[str, str]]] = {}
    for name, reason in candidates:
        kind = reason.rpartition(" (")[0] if reason.endswith(")") else ""
        grouped.setdefault(kind or reason, []).append((name, reason))
    total = sum(map(len, grouped.values()))
    parts = [f"{listed(name for name, _ in group)}: {group[0][1]}" for group in grouped.values()]
    seen = f"0 of {total} {what} ({'; '.join(parts)})" if parts else f"the model has no {what}"
    text = f"{call} changed nothing: {seen}. {advice}"
    warnings.warn(text, NothingDone, stacklevel=stacklevel)
    return text


def listed(names: Iterable[str], most: int = 4) -> str:
    """Return names with commas, the first few and how many more there are.

    Examples:
        >>> listed("abcdef")
        'a, b, c, d and 2 more'
    """
    every = [name or "the model itself" for name in names]
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


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
