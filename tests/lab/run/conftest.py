import dataclasses
import json

import numpy as np
import pytest

from flexnorm.lab.data import ImageData
from flexnorm.lab.data.images import from_arrays
from flexnorm.lab.run import Config


@pytest.fixture(scope="session")
def images() -> ImageData:
    """Noisy bars in two directions: learnable in a few updates."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(96, 6, 6, 1)).astype(np.float32)
    y = np.arange(96) % 2
    x[y == 0, 2, :] += 3
    x[y == 1, :, 2] += 3
    return from_arrays("bars", x[:64], y[:64], x[64:], y[64:])


@pytest.fixture
def small() -> Config:
    """Two normalizations, two optimizers, two epochs of four updates."""
    return Config(
        model_args={"widths": [4, 8]},
        norms=("batch", "normprop"),
        optims={"sgd": {}, "sgdg": {}},
        epochs=2,
        seeds=(0,),
        batch_size=16,
        probe=16,
        shift_every=3,
        shift_samples=32,
        device="cpu",
    )


@pytest.fixture
def one(small) -> Config:
    """A single run."""
    return dataclasses.replace(small, norms=("batch",), optims={"sgd": {}})


TIMES = {"step_ms", "seconds"}


@pytest.fixture(scope="session")
def summaries():
    """A function that collects what must be the same bits: all but the clock."""
    return collect


def collect(out):
    """Every summary without its timing, and every row and weight that does not depend on the clock."""
    found = {}
    for path in sorted(out.glob("runs/*/*/*")):
        name = str(path.relative_to(out))
        summary = json.loads((path / "summary.json").read_text())
        del summary["timing"]
        found[name] = summary
        if summary["status"] == "refused":
            continue
        header, *rows = (path / "metrics.csv").read_text().splitlines()
        keep = [i for i, column in enumerate(header.split(",")) if column not in TIMES]
        found[name + "/metrics"] = [[row.split(",")[i] for i in keep] for row in rows]
        found[name + "/shift"] = (path / "shift.csv").read_bytes()
        if summary["status"] == "complete":
            found[name + "/weights"] = (path / "model.safetensors").read_bytes()
    return found
