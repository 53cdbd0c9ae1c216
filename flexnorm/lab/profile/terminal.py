"""A profile in the terminal: one row per layer, then the sentences that ask for something."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from flexnorm.lab.profile.records import Finding, LayerProfile, Profile

_MOST = 3
"""Sentences of one kind that are printed unless all are asked for: those with the largest numbers."""

_ORDER = ("act", "look", "fine")
_LEGEND = {
    "W1": "W1: how far one update moves the output",
    "low": "low, high: its certified bounds",
    "shift %": "shift %: the same relative to the spread of the output",
    "bound": "bound: by the parameters alone",
    "noise %": "noise %: of the batch statistics",
    "zeta": "zeta: the gamma decay that the noise of BatchNorm amounts to",
    "decay": "decay: what it adds to the loss",
    "angle": "angle: radians that the weight before turns in one update",
    "eff. rate": "eff. rate: learning rate over squared length of that weight, where its length does not matter",
    "dead": "dead: channels that are constant or cut off by their rectifier",
    "chi": "chi: growth of a sample's deviation, by the parameters alone",
    "in var": "in var: variance of the pre-activations, which Normalization Propagation takes for 1",
    "saturated": "saturated: channels on the flat parts of their activation",
}
_NARROW = (
    (142, "low"),
    (132, "high"),
    (122, "eff. rate"),
    (112, "bound"),
    (100, "decay"),
    (95, "in var"),
    (92, "chi"),
    (90, "W1"),
)
"""Below which width of the terminal a column is left out."""

_STYLE = {"fine": "green", "look": "yellow", "act": "bold red"}


def print_profile(result: Profile, console: Any, *, everything: bool = False) -> None:
    """Print the table of the layers, and the verdicts.

    Args:
        result: The profile.
        console: A ``rich`` console; columns are left out where it is narrow.
        everything: Also print the findings that ask for nothing.
    """
    from rich import box
    from rich.table import Table

    shown = _columns(result.layers)
    for limit, dropped in _NARROW:
        if console.width < limit:
            shown.pop(dropped, None)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in shown:
        left = heading in ("layer", "verdict")
        table.add_column(heading, justify="left" if left else "right", no_wrap=heading != "layer", overflow="fold")
    for layer in result.layers:
        table.add_row(
            *(cell(layer) for cell in shown.values()), style=None if layer.level == "fine" else _STYLE[layer.level]
        )
    built = f" with norm {result.norm}" if result.norm else ""
    console.print(
        f"{result.model}{built} on {result.data}: {result.steps} updates of batch {result.batch_size} at learning rate "
        f"{result.lr:g}, {result.measurements} measurements on {result.probe} images, {result.seconds:.1f} s",
        markup=False,
    )
    if result.layers:
        console.print(table)
        console.print("; ".join(text for heading, text in _LEGEND.items() if heading in shown) + ".", style="dim")
        if any(not layer.mixes_batch and layer.noise is not None for layer in result.layers):
            console.print("In brackets: what BatchNorm in its place would have.", style="dim")
    for finding in result.findings:
        _print(finding, console)
    own = [finding for layer in result.layers for finding in layer.findings]
    wanted = [finding for finding in own if everything or finding.level != "fine"]
    shown_of = wanted if everything else _worst(wanted)
    for finding in sorted(shown_of, key=lambda f: _ORDER.index(f.level)):
        _print(finding, console)
    if len(wanted) > len(shown_of):
        rest = len(wanted) - len(shown_of)
        console.print(f"and {rest} more of these kinds at other layers, which --all and the JSON show", markup=False)
    if not wanted and not result.diverged_at:
        console.print("no layer needs a change")


def _worst(findings: list[Finding]) -> list[Finding]:
    """The most urgent findings of every topic."""
    ranked = sorted(findings, key=lambda f: (_ORDER.index(f.level), -f.value))
    return [f for i, f in enumerate(ranked) if sum(g.topic == f.topic for g in ranked[:i]) < _MOST]


def _print(finding: Finding, console: Any) -> None:
    console.print(f"{finding.level:4s}  {finding.text}", style=_STYLE[finding.level], markup=False)


def _columns(layers: tuple[LayerProfile, ...]) -> dict[str, Callable[[LayerProfile], str]]:
    """The columns that have something to show."""
    columns: dict[str, tuple[str | None, Callable[[LayerProfile], str]]] = {
        "layer": (None, lambda r: r.layer or "(model)"),
        "W1": ("w1", lambda r: _cell(r.w1, ".3g")),
        "low": ("lower", lambda r: _cell(r.lower, ".3g")),
        "high": ("upper", lambda r: _cell(r.upper, ".3g")),
        "shift %": ("relative", lambda r: _cell(r.relative, ".3g", 100)),
        "bound": ("bound", lambda r: _cell(r.bound, ".3g")),
        "noise %": ("noise", lambda r: _aside(_cell(r.noise, ".1f", 100), r)),
        "zeta": ("zeta", lambda r: _aside(_cell(r.zeta, ".1e"), r)),
        "decay": ("decay", lambda r: _aside(_cell(r.decay, ".2g"), r)),
        "angle": ("angle", lambda r: _cell(r.angle, ".2g")),
        "eff. rate": ("effective_rate", lambda r: _cell(r.effective_rate, ".2g") if r.invariant else ""),
        "dead": ("dead", lambda r: _cell(r.dead, "d")),
        "chi": ("chi", lambda r: _cell(r.chi, ".2f")),
        "in var": ("input_var", lambda r: _cell(r.input_var, ".2g")),
        "saturated": ("saturated", lambda r: _cell(r.saturated, "d")),
        "verdict": (None, lambda r: r.level),
    }
    return {
        heading: write
        for heading, (name, write) in columns.items()
        if name is None or any(getattr(layer, name) is not None for layer in layers)
    }


def _cell(value: float | None, form: str, scale: float | None = None) -> str:
    if value is None or not math.isfinite(value):
        return ""
    return format(value if scale is None else scale * value, form)


def _aside(text: str, layer: LayerProfile) -> str:
    return text if layer.mixes_batch or not text else f"({text})"
