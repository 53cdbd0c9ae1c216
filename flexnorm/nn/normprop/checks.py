"""What all layers share: the number of spatial axes, and checks that return what they checked or raise ValueError."""

from __future__ import annotations

from collections.abc import Sequence

from flexnorm._messages import unknown_name


class Spatial:
    """Mixin: ``class Layer2d(Layer, spatial=2)`` says how many axes come after the channels (0 for none)."""

    spatial: int

    def __init_subclass__(cls, spatial: int | None = None) -> None:
        super().__init_subclass__()
        if spatial is not None:
            cls.spatial = spatial


def one_of(kind: str, value: str, valid: Sequence[str]) -> str:
    """A name out of ``valid``."""
    if value not in valid:
        raise ValueError(unknown_name(kind, value, valid))
    return value


def positive(name: str, value: int) -> int:
    """A positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def sizes(name: str, value: int | Sequence[int], dims: int, minimum: int = 0) -> tuple[int, ...]:
    """As many integers of at least ``minimum`` as ``dims``; one integer stands for all axes."""
    result = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(result) != dims or not all(isinstance(v, int) and v >= minimum for v in result):
        raise ValueError(f"{name} must be an integer >= {minimum} or {dims} of them, got {value!r}")
    return result
