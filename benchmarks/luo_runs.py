"""The trainings behind Fig. 2 of Luo et al. (ICLR 2019, arXiv 1809.00846), as settings of experiments.

Each group of figures is one set of variants, each an ordinary comparison of `evenkeel.experiment`. What the paper's text
gives is in ``full`` (CIFAR-10, ResNet-18, SGD with momentum, learning rate linear in the batch size, population
statistics from 10,000 samples); what is in its appendix, which we have not seen (lengths, rates, augmentation, widths),
is the usual choice for these networks. ``small`` is for one core: 5,000 images, averaged to 16 x 16 pixels, narrow
networks, lengths that take the six figures together about twenty minutes.
"""

from __future__ import annotations

from typing import Any

from evenkeel.experiment import Config

__all__ = ["GROUPS", "POOLING", "configs"]

POOLING = {"small": 2, "full": 1}
"""Pixels that are averaged along each side of the images."""

Settings = dict[str, Any]

_COMMON: dict[str, Settings] = {
    "full": {"schedule": "cosine", "seeds": 3, "augment": ["flip", "crop"], "shift_every": 0, "checkpoint_every": 5},
    "small": {
        "limit": 5000,
        "test_limit": 2500,
        "schedule": "onecycle",
        "seeds": 3,
        "shift_every": 0,
        "threads": 1,
        "checkpoint_every": 10,
    },
}
_RESNET: dict[str, Settings] = {
    "full": {"model": "resnet18", "epochs": 120, "weight_decay": 5e-4},
    "small": {"model": "resnet8", "model_args": {"width": 8}, "epochs": 30, "weight_decay": 5e-4},
}
_CONV: dict[str, Settings] = {
    "full": {"model": "conv4fc2", "epochs": 100, "weight_decay": 0.0},
    "small": {"model": "conv4fc2", "model_args": {"width": 8}, "epochs": 20, "weight_decay": 0.0},
}
_ESTIMATED: dict[str, Settings] = {
    "full": {"every": 50, "samples": 10_000},
    "small": {"every": 10, "samples": 2000},
}


def _resnet(scale: str) -> dict[str, Settings]:
    """Fig. 2(a, b): BN at two batch sizes; PN alone and with the gamma decay of the smaller one."""
    base = _RESNET[scale]
    renewed = {"norm_args": {"population": {"statistics": "estimated"}}, "estimate": _ESTIMATED[scale]}
    decay = {"coefficient": "adaptive", "batch_size": 128, "every": _ESTIMATED[scale]["every"]}
    population = {**base, **renewed, "norm": "population"}
    large = {"batch_size": 1024, "lr": 0.8}
    return {
        "BN, M=128": {**base, "norm": "batch"},
        "BN, M=1024": {**base, **large, "norm": "batch"},
        "PN, M=128": population,
        "PN + gamma decay, M=128": {**population, "gamma_decay": decay},
        "PN + gamma decay of 128, M=1024": {**population, **large, "gamma_decay": decay},
    }


def _parts(scale: str) -> dict[str, Settings]:
    """Fig. 2(c, d): SGD, WN, BN, and WN with each half of BN, in four convolutions and two dense layers."""
    base = {**_CONV[scale], "lr": 0.05}
    normalized = {**base, "model_args": {**base.get("model_args", {}), "weight_norm": True}}
    return {
        "SGD": {**base, "norm": "none"},
        "WN": {**normalized, "norm": "none"},
        "BN": {**base, "norm": "batch"},
        "WN + mean-only BN": {**normalized, "norm": "mean_only"},
        "WN + variance-only BN": {**normalized, "norm": "variance_only"},
    }


def _single(scale: str) -> dict[str, Settings]:
    """Fig. 2(e, f): BN at one layer at a time, at several batch sizes; the learning rate is linear in the batch size."""
    layers, sizes, rate = {"full": ((1, 2, 3, 4, 5), (16, 64, 256, 1024), 4e-5), "small": ((1, 3, 5), (16, 64, 256), 2e-4)}[
        scale
    ]
    base = _CONV[scale]
    return {
        f"layer {layer}, M={size}": {
            **base,
            "norm": "batch",
            "model_args": {**base.get("model_args", {}), "only": layer},
            "batch_size": size,
            "lr": rate * size,
        }
        for layer in layers
        for size in sizes
    }


def _dropout(scale: str) -> dict[str, Settings]:
    """Dropout after each residual block against the lost regularization of a large batch (paper, end of sec. 5)."""
    base, variants = _RESNET[scale], _resnet(scale)
    args = {**base.get("model_args", {}), "dropout": 0.1}
    return {
        "BN, M=128": variants["BN, M=128"],
        "BN, M=1024": variants["BN, M=1024"],
        "BN + dropout 0.1, M=1024": {**variants["BN, M=1024"], "model_args": args},
    }


GROUPS = {"resnet": _resnet, "parts": _parts, "single": _single, "dropout": _dropout}
"""For each group of figures, the function that gives its variants at a scale: settings by label."""


def configs(group: str, scale: str, data: str) -> dict[str, Config]:
    """Return the experiments of a group by label."""
    made = {}
    for label, settings in GROUPS[group](scale).items():
        values = {"batch_size": 128, "lr": 0.1, **_COMMON[scale], **settings, "data": data}
        decay = values.pop("weight_decay")
        values["baseline"] = values["norm"]
        made[label] = Config.from_dict({**values, "optim": {"sgd": {"weight_decay": decay}}})
    return made
