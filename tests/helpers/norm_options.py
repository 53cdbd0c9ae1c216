"""Another value for every option that a norm declares, for tests that are generated from the declarations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flexnorm.engine import declaration
from flexnorm.nn import NORMS

# Where the layer's default is not far from the beginning, where options make no difference.
BASE: dict[str, dict[str, Any]] = {"renorm": {"warmup": 0, "ramp": 0, "r_max": 1.5, "d_max": 0.5}}


class _Other(dict[str, Any]):
    """Values by option; of an option that is not listed, another number than its default, or the other truth."""

    def __missing__(self, option: str) -> Any:
        owner = next(cls for forms in NORMS.values() for cls in forms.values() if option in cls.options)
        default = getattr(owner.build(6), option)
        if isinstance(default, bool):
            return not default
        if isinstance(default, (int, float)):
            return default + 1 if isinstance(default, int) else default + 0.5
        raise KeyError(f"tests/helpers/norm_options.py needs another value than {default!r} for the option {option!r}")


OTHER: dict[str, Any] = _Other(
    {
        "eps": 0.5,
        "momentum": 0.7,
        "num_groups": 2,
        "unit_norm": "rms",
        "constrain_alpha": True,
        "statistics": "estimated",
        "gradient": "none",
        "max_ratio": 1.0,
        "threshold": True,
        "learn_eps": True,
        "r_max": 1.0,
        "d_max": 0.0,
        "warmup": 1000,
        "ramp": 1000,
    }
)
BUILT_IN = tuple(NORMS)
OPTIONS = [(name, option) for name in BUILT_IN for option in next(iter(NORMS[name].values())).options]


@contextmanager
def declared_for_now() -> Iterator[None]:
    """Norms that are declared in the block are unknown after it."""
    before = set(NORMS)
    try:
        yield
    finally:
        for name in set(NORMS) - before:
            del declaration._CLASSES[name]
