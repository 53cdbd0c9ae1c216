"""The trainings behind Fig. 2 of Luo et al. (ICLR 2019, arXiv 1809.00846), as settings of experiments.

Each group of figures is one set of variants, each an ordinary comparison of `flexnorm.lab.run`. What the paper's
text gives is in ``full`` (CIFAR-10, ResNet-18, SGD with momentum, learning rate linear in the batch size, population
statistics from 10,000 samples); what is in its appendix, which we have not seen (lengths, rates, augmentation, widths),
is the usual choice for these networks. ``small`` is for one core: 10,000 images for the residual network and 5,000
for the other, averaged to 16 x 16 pixels, narrow networks, lengths that take the six figures together half an hour.
"""

from __future__ import annotations

from typing import Any

from flexnorm.lab.run import Config

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
    "small": {"model": "resnet8", "model_args": {"width": 8}, "limit": 10_000, "epochs": 20, "weight_decay": 5e-4},
}
_CONV: dict[str, Settings] = {
    "full": {"model": "conv4fc2", "epochs": 100, "weight_decay": 0.0},
    "small": {"model": "conv4fc2", "model_args": {"width": 8}, "epochs": 15, "weight_decay": 0.0},
}
_ESTIMATE: dict[str, dict[int, Settings]] = {
    "full": {128: {"every": 50, "samples": 10_000}, 1024: {"every": 6, "samples": 10_000}},
    "small": {128: {"every": 10, "samples": 1000}, 1024: {"every": 2, "samples": 1000}},
}
_DECAY_EVERY = {"full": {128: 50, 1024: 20}, "small": {128: 20, 1024: 10}}


def _resnet(scale: str) -> dict[str, Settings]:
    """Fig. 2(a, b): BN at two batch sizes; PN alone and with the gamma decay of the smaller one."""
    base = _RESNET[scale]
    large = {"batch_size": 1024, "lr": 0.8}

    def population(size: int) -> Settings:
        return {
            **base,
            **(large if size == 1024 else {}),
            "norm": "population",
            "norm_args": {"population": {"statistics": "estimated"}},
            "estimate": _ESTIMATE[scale][size],
        }

    def decayed(size: int) -> Settings:
        decay = {"coefficient": "adaptive", "batch_size": 128, "every": _DECAY_EVERY[scale][size]}
        return {**population(size), "gamma_decay": decay}

    return {
        "BN, M=128": {**base, "norm": "batch"},
        "BN, M=1024": {**base, **large, "norm": "batch"},
        "PN, M=128": population(128),
        "PN + gamma decay, M=128": decayed(128),
        "PN + gamma decay of 128, M=1024": decayed(1024),
    }


def _parts(scale: str) -> dict[str, Settings]:
    """Fig. 2(c, d): SGD, WN, BN, WN with each half of BN, and WN with what stands for BN: gamma decay or dropout."""
    base = {**_CONV[scale], "lr": 0.05}
    args = base.get("model_args", {})
    normalized = {**base, "model_args": {**args, "weight_norm": True}}
    return {
        "SGD": {**base, "norm": "none"},
        "WN": {**normalized, "norm": "none"},
        "BN": {**base, "norm": "batch"},
        "WN + mean-only BN": {**normalized, "norm": "mean_only"},
        "WN + variance-only BN": {**normalized, "norm": "variance_only"},
        # 1/(4M), the value of the ReLU student: without a normalization there are no statistics to estimate zeta from.
        "WN + gamma decay": {**normalized, "norm": "none", "gamma_decay": {"coefficient": 1 / (4 * 128)}},
        "WN + dropout 0.2": {**normalized, "norm": "none", "model_args": {**args, "weight_norm": True, "dropout": 0.2}},
    }


def _single(scale: str) -> dict[str, Settings]:
    """Fig. 2(e): BN at one layer at a time, at several batch sizes; the learning rate is linear in the batch size."""
    layers, sizes, rate, epochs = {
        "full": ((1, 2, 3, 4, 5), (16, 64, 256, 1024), 4e-5, 100),
        "small": ((3, 5), (16, 64, 256), 2e-4, 36),
    }[scale]
    base = _CONV[scale]
    return {
        f"layer {layer}, M={size}": {
            **base,
            "norm": "batch",
            "model_args": {**base.get("model_args", {}), "only": layer},
            "batch_size": size,
            "lr": rate * size,
            "epochs": epochs,
        }
        for layer in layers
        for size in sizes
    }


def _dropout(scale: str) -> dict[str, Settings]:
    """Fig. 2(f): dropout against the lost regularization of a large batch, and for WN (paper, end of sec. 5)."""
    base, variants, parts = _RESNET[scale], _resnet(scale), _parts(scale)
    args = {**base.get("model_args", {}), "dropout": 0.1}
    return {
        "BN, M=128": variants["BN, M=128"],
        "BN, M=1024": variants["BN, M=1024"],
        "BN + dropout 0.1, M=1024": {**variants["BN, M=1024"], "model_args": args},
        **{f"{label} (conv4fc2)": parts[label] for label in ("BN", "WN", "WN + dropout 0.2")},
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
