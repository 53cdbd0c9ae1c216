"""Checks of arguments that several layers share."""

from __future__ import annotations

from collections.abc import Sequence


def positive(name: str, value: int) -> int:
    """Return ``value`` as an int, or raise ValueError if it is not a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def sizes(name: str, value: int | Sequence[int], dims: int, minimum: int = 0) -> tuple[int, ...]:
    """Return ``value`` as ``dims`` integers of at least ``minimum``; one integer stands for all axes.

    Raises:
        ValueError: For another length or a value that is too small.
    """
    result = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(result) != dims or not all(isinstance(v, int) and v >= minimum for v in result):
        raise ValueError(f"{name} must be an integer >= {minimum} or {dims} of them, got {value!r}")
    return result
