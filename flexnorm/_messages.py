"""Wording of error messages that several rooms share. The lowest floor: it imports nothing of the package."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
