"""Wording of error messages that several packages share; imports nothing of this package."""

from __future__ import annotations

import difflib
import importlib
import warnings
from collections.abc import Iterable
from typing import Any


class NothingDone(UserWarning):
    """A function that changes a model found nothing to change: the text counts candidates and says why none fitted.

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


def nothing_done(said: str, what: str, candidates: Iterable[tuple[str, str]], advice: str, stacklevel: int = 3) -> str:
    """Warn that a call did nothing, and return the text: the number of candidates, and the reasons with names.

    Args:
        said: What was called and did nothing (``"fold(model) changed nothing"``).
        what: What it takes, in the plural (``"weights"``).
        candidates: Name and reason of each thing that was looked at and not taken; what stands in parentheses at the
            end of a reason (a number measured, say) does not tell reasons apart.
        advice: What to do.
        stacklevel: As of :func:`warnings.warn`, seen from here: 3 is the caller of the function that calls this.

    Examples:
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore", NothingDone)
        ...     nothing_done("f(model) did nothing", "norms", [("a", "too big"), ("b", "old")], "Wait.")
        'f(model) did nothing: 0 of 2 norms (a: too big; b: old). Wait.'
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore", NothingDone)
        ...     nothing_done("f(model) did nothing", "norms", [], "Wait.")
        'f(model) did nothing: the model has no norms. Wait.'
    """
    text = f"{said}: {none_of(what, candidates)}. {advice}"
    warnings.warn(text, NothingDone, stacklevel=stacklevel)
    return text


def none_of(what: str, candidates: Iterable[tuple[str, str]]) -> str:
    """Return how many candidates there were, with names and reasons, as :func:`nothing_done` takes them.

    Examples:
        >>> none_of("norms", [("a", "too big (3)"), ("b", "too big (4)"), ("c", "old")])
        '0 of 3 norms (a, b: too big (3); c: old)'
    """
    grouped: dict[str, list[tuple[str, str]]] = {}
    for name, reason in candidates:
        kind = reason.rpartition(" (")[0] if reason.endswith(")") else ""
        grouped.setdefault(kind or reason, []).append((name, reason))
    total = sum(map(len, grouped.values()))
    parts = [f"{listed(name for name, _ in group)}: {group[0][1]}" for group in grouped.values()]
    return f"0 of {total} {what} ({'; '.join(parts)})" if parts else f"the model has no {what}"


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
