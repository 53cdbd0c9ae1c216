"""Another value for every option that a norm declares, for tests that are generated from the declarations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flexnorm.engine import declaration
from flexnorm.nn import NORMS

# Where the layer's default is not far from the beginning, where options make no difference.
BASE: dict[str, dict[str, Any]] = {"renorm": {"warmup": 0, "ramp": 0, "r_max": 1.5, "d_max": 0.5}}
OTHER: dict[str, Any] = {
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
