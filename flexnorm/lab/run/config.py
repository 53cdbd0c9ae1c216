"""What an experiment is: one frozen value that a YAML file, a command line and a results file all describe."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexnorm._messages import optional, unknown_name
from flexnorm.lab.files import plain
from flexnorm.lab.models import MODELS, norm_names
from flexnorm.lab.run.settings import ESTIMATE, GAMMA_DECAY, OPTIMS, SCHEDULES, filled, is_number, optim_defaults

REFERENCE_BATCH = 64
_PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true")


def _at_least(low: int, default: Any) -> Any:
    return field(default=default, metadata={"at_least": low})


def _among(names: Callable[[], Iterable[str]], default: Any) -> Any:
    return field(default=default, metadata={"among": names})


@dataclass(frozen=True)
class Config:
    """Everything that decides the outcome of a comparison.

    Attributes:
        data: Data set: ``"digits"``, a ``.npz`` file, an image folder or ``"hf:NAME"``
            (:func:`flexnorm.lab.data.load`).
        limit: Use a stratified subset of at most this many training and test images.
        test_limit: Test on a stratified subset of at most this many of the test images, where ``limit`` leaves more.
        model: Network: a name that :func:`flexnorm.lab.models.build` knows.
        model_args: Further arguments of that network (width, depth).
        norms: Normalizations to compare, in the order of the table.
        norm_args: Arguments of a normalization, by its name: ``{"group": {"num_groups": 4}}``.
        optims: Optimizers to compare, each with the settings that differ from :data:`OPTIMS`.
        overrides: Optimizer settings for one cell of the table: ``{"none": {"lr": 0.001}, "none/sgdg": {...}}``.
        baseline: The normalization that differences and step times refer to.
        epochs: Passes over the training images.
        seeds: Each seed is one run per cell: weights, order of the images and augmentation follow from it.
        batch_size: Images per update; an incomplete last batch is left out.
        lr: Learning rate of every optimizer in place of its own default (not of ``lr_manifold``).
        schedule: ``constant``, ``cosine``, ``onecycle`` or ``step`` (:data:`flexnorm.lab.run.SCHEDULES`).
        schedule_args: Arguments of the schedule.
        label_smoothing: Share of the target that is spread over all classes, 0 to 1.
        gamma_decay: Decay of the scales gamma as BatchNorm's noise would exert it (Luo et al., 2019, Eq. 3), see
            :data:`GAMMA_DECAY`; empty for none. For layers that normalize by population or batch statistics, and for
            Normalization Propagation (a number as coefficient).
        coherence: Strength of :func:`flexnorm.nn.normprop.coherence_penalty`, for Normalization Propagation.
        estimate: How ``population`` with ``norm_args: {statistics: estimated}`` renews its statistics, see
            :data:`ESTIMATE`.
        augment: Any of ``flip`` (half of the images), ``shift`` (zero fill) and ``crop`` (reflected border).
        augment_pixels: Largest displacement of ``shift`` and ``crop``, in pixels.
        probe: Images in the fixed batch that the internal covariate shift is measured on.
        shift_every: Updates between two measurements; 0 measures nothing; by default once an epoch, or more often in
            a short run, so that there are at least twenty.
        shift_lag: Updates between the two moments that one measurement compares.
        shift_samples: Largest number of activation vectors per layer that enter a measurement.
        threads: CPU threads; 0 means one for small images (up to 1024 numbers), where more only get in each other's
            way, and torch's own choice for larger ones.
        precision: Arithmetic of the training, in Lightning Fabric's words (``"32-true"``, ``"bf16-mixed"``).
        device: ``"cpu"``, ``"cuda"``, ``"mps"`` or ``"auto"``; ``"cuda:1"`` for one of several.
        deterministic: Ask for bit-reproducible kernels on devices that have faster ones.
        checkpoint_every: Epochs between two checkpoints.
    """

    data: str = "digits"
    limit: int | None = _at_least(1, None)
    test_limit: int | None = _at_least(1, None)
    model: str = _among(lambda: MODELS, "convnet")
    model_args: Mapping[str, Any] = field(default_factory=dict)
    norms: tuple[str, ...] = _among(norm_names, ("none", "batch", "group", "unitized", "population", "normprop"))
    norm_args: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    optims: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {"sgd": {}, "sgdg": {}, "adamg": {}}, metadata={"among": lambda: OPTIMS}
    )
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    baseline: str = _among(norm_names, "batch")
    epochs: int = _at_least(1, 10)
    seeds: tuple[int, ...] = (0, 1, 2)
    batch_size: int = _at_least(1, 64)
    lr: float | None = None
    schedule: str = _among(lambda: SCHEDULES, "onecycle")
    schedule_args: Mapping[str, Any] = field(default_factory=dict)
    label_smoothing: float = 0.0
    gamma_decay: Mapping[str, Any] = field(default_factory=dict)
    coherence: float = 0.0
    estimate: Mapping[str, Any] = field(default_factory=dict)
    augment: tuple[str, ...] = _among(lambda: ("flip", "shift", "crop"), ())
    augment_pixels: int = _at_least(0, 4)
    probe: int = _at_least(2, 64)
    shift_every: int | None = _at_least(0, None)
    shift_lag: int = _at_least(1, 1)
    shift_samples: int = _at_least(2, 128)
    threads: int = _at_least(0, 0)
    precision: str = _among(lambda: _PRECISIONS, "32-true")
    device: str = "auto"
    deterministic: bool = True
    checkpoint_every: int = _at_least(1, 1)

    def __post_init__(self) -> None:
        """Check every value; the messages name the key."""
        for key, rules in ((f.name, f.metadata) for f in dataclasses.fields(self)):
            value = getattr(self, key)
            if "at_least" in rules and value is not None and value < rules["at_least"]:
                raise ValueError(f"{key} must be at least {rules['at_least']}, not {value}")
            if "among" in rules:
                names, valid = [value] if isinstance(value, str) else list(value), tuple(rules["among"]())
                for name in names:
                    if name not in valid:
                        other = key == "model" and ":" in name
                        hint = ". Models of timm and of modules are for `flexnorm profile`" if other else ""
                        raise ValueError(unknown_name(key.removesuffix("s"), name, valid) + hint)
                if len(set(names)) < len(names):
                    raise ValueError(f"{key} lists a name twice: {', '.join(names)}")
        for key in ("norms", "optims", "seeds"):
            if not getattr(self, key):
                raise ValueError(f"{key} is empty; at least one is needed")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds must be different numbers >= 0, not {list(self.seeds)}")
        for name in self.norm_args:
            if name not in norm_names():
                raise ValueError(f"norm_args: {unknown_name('norm', name, norm_names())}")
        for name, settings in self.optims.items():
            filled("optims", f"optims: {name}", optim_defaults(name, settings), settings)
        for cell, settings in self.overrides.items():
            norm, _, optim = cell.partition("/")
            if norm not in norm_names() or (optim and optim not in OPTIMS):
                raise ValueError(f"overrides: {cell!r} is neither NORM nor NORM/OPTIM, e.g. none or none/sgd")
            for name in [optim] if optim else self.optims:
                own = {**self.optims.get(name, {}), **settings}
                filled("optims", f"overrides: {cell}", optim_defaults(name, own), settings)
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise ValueError(f"lr must be a positive number, not {self.lr}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, not {self.label_smoothing}")
        if not 0 <= self.coherence < float("inf"):
            raise ValueError(f"coherence must be a number of at least 0, not {self.coherence}")
        filled("gamma_decay", "gamma_decay", GAMMA_DECAY, self.gamma_decay)
        filled("estimate", "estimate", ESTIMATE, self.estimate)
        self.schedule_settings()

    def optim_settings(self, norm: str, optim: str) -> dict[str, Any]:
        """Return the complete settings of one cell: defaults, then ``lr``, then ``optims``, then ``overrides``."""
        own, overrides = self.optims.get(optim, {}), self.overrides
        own = {**own, **overrides.get(norm, {}), **overrides.get(f"{norm}/{optim}", {})}
        settings = dict(optim_defaults(optim, own))
        share = min(1.0, self.batch_size / REFERENCE_BATCH)
        for key in ("lr", "lr_manifold"):
            if key in settings:
                adaptive = (optim, key) in (("adamw", "lr"), ("adamp", "lr"), ("adamg", "lr_manifold"))
                adaptive |= key == "lr" and settings.get("off_manifold") == "adamw"
                settings[key] *= share**0.5 if adaptive else share
        if self.lr is not None:
            settings["lr"] = self.lr
        return {**settings, **own}

    def schedule_settings(self) -> dict[str, Any]:
        """Return the arguments of the schedule with the defaults filled in."""
        return filled("schedule", f"schedule {self.schedule}", SCHEDULES[self.schedule], self.schedule_args)

    def single(self, norm: str, optim: str, seed: int) -> Config:
        """Return the experiment that consists of one run of this one."""
        args = {norm: self.norm_args[norm]} if norm in self.norm_args else {}
        settings = self.optim_settings(norm, optim)
        return dataclasses.replace(
            self, norms=(norm,), norm_args=args, optims={optim: settings}, overrides={}, seeds=(seed,), lr=None
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain lists, dictionaries, strings and numbers, ready for YAML and JSON."""
        return {f.name: plain(getattr(self, f.name), finite=False) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Build a config from plain values and check their types.

        ``norms`` and ``optims`` may be a list or ``"a,b"``; ``seeds`` may be a count (3 means 0, 1, 2) or a list.

        Raises:
            ValueError: For an unknown key (with the nearest match), a wrong type or a value out of range.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        checked: dict[str, Any] = {}
        for given, value in values.items():
            key = _ALIASES.get(given, given)
            if key not in fields:
                raise ValueError(f"config: {unknown_name('key', given, fields)}")
            if key in checked:
                raise ValueError(f"config: {key} is given twice (also as {given})")
            checked[key] = _typed(key, str(fields[key].type), value)
        return cls(**checked)

    def fingerprint(self, data_digest: str) -> str:
        """Return the SHA-256 of everything that decides the outcome: all settings, filled in, and the data."""
        values = {**self.resolved(), "data_digest": data_digest}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def resolved(self) -> dict[str, Any]:
        """Return :meth:`as_dict` with the settings of every cell written out; equal experiments give equal values."""
        values = self.as_dict()
        cells = itertools.product(self.norms, self.optims)
        values["settings"] = {f"{norm}/{optim}": self.optim_settings(norm, optim) for norm, optim in cells}
        for key in ("norms", "optims", "seeds"):
            values[key] = sorted(values[key])  # their order decides that of the table, not what is in it
        values["schedule_args"] = plain(self.schedule_settings(), finite=False)
        # What is off is left out: an experiment without it is the one that it was before there was such a setting.
        for settings, (key, before) in itertools.product(values["settings"].values(), _BEFORE.items()):
            if settings.get(key) == before:
                del settings[key]
        optional = {"test_limit": None, "gamma_decay": GAMMA_DECAY, "coherence": None, "estimate": ESTIMATE}
        for key, defaults in optional.items():
            if not values[key]:
                del values[key]
            elif defaults is not None:
                values[key] = {**defaults, **values[key]}
        # How often to save does not change what is saved; the path of the data does not change the data.
        for key in ("overrides", "lr", "checkpoint_every", "data"):
            del values[key]
        return values


_BEFORE = {"off_manifold": "sgd", "ortho_every": 1}
_ALIASES = {"norm": "norms", "optim": "optims", "seed": "seeds"}


def _typed(key: str, kind: str, value: Any) -> Any:
    """Return `value` as the type that the field declares."""
    if key == "seeds":
        if type(value) is int:
            if value < 1:
                raise ValueError(f"seeds must be a count of at least 1 or a list, not {value}")
            return tuple(range(value))
        if isinstance(value, (list, tuple)) and all(type(v) is int for v in value):
            return tuple(value)
        raise ValueError(f"seeds must be a count (3) or a list ([0, 1, 2]), not {value!r}")
    if kind == "tuple[str, ...]":
        return tuple(_names(key, value))
    if key == "optims" and not isinstance(value, Mapping):
        return {name: {} for name in _names(key, value)}
    if kind.startswith("Mapping"):
        if not isinstance(value, Mapping) or any(not isinstance(name, str) for name in value):
            raise ValueError(f"{key} must be a mapping like {{name: value}}, not {value!r}")
        if "Mapping" in kind.removeprefix("Mapping"):
            value = {name: {} if inner is None else inner for name, inner in value.items()}
            for name, inner in value.items():
                if not isinstance(inner, Mapping):
                    raise ValueError(f"{key}: {name} must be a mapping like {{setting: value}}, not {inner!r}")
        return plain(value, finite=False)
    if value is None and "None" in kind:
        return None
    base, known = kind.split(" ")[0], {"int": int, "str": str, "bool": bool}
    if type(value) is known.get(base) or (base == "float" and is_number(value)):
        return float(value) if base == "float" else value
    words = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false"}
    raise ValueError(f"{key} must be {words[base]}, not {value!r}")


def _names(key: str, value: Any) -> list[str]:
    """Return names from a list or from ``"a,b"``."""
    if isinstance(value, str):
        return [name.strip() for name in value.split(",") if name.strip()]
    if isinstance(value, Iterable) and not isinstance(value, Mapping):
        # YAML reads a bare `none` as text but `null` and `~` as None; who writes norms: [null] means none.
        names = ["none" if name is None else name for name in value]
        if all(isinstance(name, str) for name in names):
            return names
    raise ValueError(f"{key} must be a list of names or 'a,b', not {value!r}")


def load_config(path: Path, scale: str | None = None) -> dict[str, Any]:
    """Read the settings of an experiment from YAML: plain keys, or a recipe with ``config:`` and ``scales:``.

    Args:
        path: The file.
        scale: One of the recipe's scales; its settings replace those of ``config``.

    Returns:
        The settings as plain values, not yet checked; :meth:`Config.from_dict` does that.

    Raises:
        ValueError: As :func:`load_variants`, and if the file consists of several experiments.
    """
    variants = load_variants(path, scale)
    if list(variants) != [""]:
        raise ValueError(f"{path} holds {len(variants)} experiments ({', '.join(variants)}): use flexnorm recipe run")
    return variants[""]


def load_variants(path: Path, scale: str | None = None) -> dict[str, dict[str, Any]]:
    """Read the experiments of a recipe: one for each of its ``variants``, each with settings of its own.

    A recipe has ``config:``, settings that all share; ``scales:``, by name settings that replace them; and perhaps
    ``variants:``, by name settings that replace those in turn, for example one per batch size or learning rate. A key
    with dots reaches inside: ``optims.sgd.lr: 0.1``. A scale may have ``variants`` of its own.

    Args:
        path: The file.
        scale: One of the recipe's scales.

    Returns:
        Settings by variant, as plain values, not yet checked; ``{"": settings}`` for a file without variants.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no YAML mapping, has no such scale, or its variants are no mappings.
    """
    yaml = optional("yaml", "a recipe", "lab")
    if not path.is_file():
        raise FileNotFoundError(f"no config file {path}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold settings like 'epochs: 10', not {type(values).__name__}")
    if not isinstance(values.get("config"), dict):
        if scale is not None:
            raise ValueError(f"{path} has no scales; --scale works with recipes")
        return {"": values}
    scales = values.get("scales") or {}
    if scale is not None and scale not in scales:
        raise ValueError(f"{path}: {unknown_name('scale', scale, scales)}")
    chosen = dict(scales[scale] or {}) if scale is not None else {}
    variants = chosen.pop("variants", None) or values.get("variants")
    shared = {**values["config"], **chosen}
    if variants is None:
        return {"": shared}
    if not isinstance(variants, dict) or not all(isinstance(own, dict | None) for own in variants.values()):
        raise ValueError(f"{path}: variants must be a mapping like {{name: {{setting: value}}}}, not {variants!r}")
    for name in map(str, variants):
        if not name or any(not (c.isalnum() or c in "-_.+=") for c in name) or name.startswith("."):
            raise ValueError(f"{path}: {name!r} is no name for a variant: use letters, digits, and - _ . + =")
    made: dict[str, dict[str, Any]] = {}
    for name, own in variants.items():
        made[str(name)] = copy.deepcopy(shared)
        for key, value in (own or {}).items():
            assign(made[str(name)], key, value)
    return made


def assign(values: dict[str, Any], key: str, value: Any) -> None:
    """Set one setting in place; dots in its key reach inside: ``optims.sgd.lr``.

    A list of optimizers becomes a mapping of them when the setting of one is given.

    Args:
        values: Settings of an experiment.
        key: The setting.
        value: Its value.
    """
    *parents, last = key.split(".")
    for number, parent in enumerate(parents):
        inner = values.get(parent)
        if number == 0 and parent == "optims" and not isinstance(inner, dict):
            inner = dict(Config.from_dict({"optims": inner} if inner else {}).optims)
        values[parent] = dict(inner or {})
        values = values[parent]
    values[last] = value
