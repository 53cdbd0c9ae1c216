"""The side forward: call the model on the probe batch, look at the layers, leave no trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import nn

from flexnorm.probe.isolate import isolated
from flexnorm.probe.nested import call

Look = Callable[[str, nn.Module, tuple[Any, ...], Any], None]
Mode = Literal["train", "eval"]


def side_forward(
    model: nn.Module,
    probe: Any,
    layers: Mapping[str, nn.Module],
    look: Look,
    *,
    forward: Callable[[nn.Module, Any], Any] = call,
    mode: Mode = "train",
    seed: int = 0,
    autocast: torch.dtype | None = None,
) -> None:
    """Call the model on the probe without gradient and show every call of the chosen layers to ``look``.

    Args:
        model: The unwrapped model.
        probe: What ``forward`` takes.
        layers: Layers to look at, by name.
        look: Called as ``look(name, module, inputs, output)`` right after the layer; a further call of one layer within
            the forward has ``#2``, ``#3``, ... appended to its name.
        forward: How to call the model.
        mode: ``"train"``: as in training; layers that the model keeps in evaluation mode stay there. ``"eval"``: as in
            evaluation.
        seed: Seed of dropout and other noise, the same at each call, so that two calls differ by the model alone.
        autocast: Run under autocast to this type.
    """
    calls: Counter[str] = Counter()

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def seen(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            calls[name] += 1
            look(name if calls[name] == 1 else f"{name}#{calls[name]}", module, inputs, output)

        return seen

    with isolated(model, seed, autocast=autocast), ExitStack() as hooks:
        if mode == "eval":
            model.eval()
        elif not model.training:
            model.train()
        for name, module in layers.items():
            hooks.callback(module.register_forward_hook(hook(name)).remove)
        forward(model, probe)
