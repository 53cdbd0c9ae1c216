"""Experiments from YAML files: plain settings, or recipes with scales and variants."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from flexnorm._messages import optional, unknown_name
from flexnorm.lab.run.config import Config


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
