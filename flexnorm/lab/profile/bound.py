"""The bound of each layer from its parameters alone, over the same updates as the measured shift."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flexnorm.lab.profile.sites import Site
from flexnorm.probe import first_tensor, side_forward
from flexnorm.shift import layer_bound, second_moment_excess


class BoundWatch:
    """Keeps the layers as they were before an update and bounds how far the update can have moved their outputs.

    Layers in training normalize by the moments of the probe itself, so the noise is 0; layers with population
    statistics, and frozen ones, are bounded with the noise that the statistics they use have on the probe. Where the
    guard of a population layer acted, they are others, and this update is passed over.

    Args:
        model: The model.
        probe: What the shift is measured on.
        sites: The layers; those of a kind for which no bound is known are passed over.

    Attributes:
        found: The bounds so far by name of the site.
    """

    def __init__(self, model: nn.Module, probe: Tensor, sites: Sequence[Site]) -> None:
        self._model, self._probe = model, probe
        self._sites = [site for site in sites if bounded(site.module)]
        self._fixed = {site.name: site.module for site in self._sites if not site.mixes_batch}
        self._kept: dict[str, nn.Module] = {}
        self._noise: dict[str, Tensor] = {}
        self.found: dict[str, list[float]] = defaultdict(list)

    def before(self) -> None:
        """Keep the layers as they are before an update."""
        self._kept = {site.name: copy.deepcopy(site.module) for site in self._sites}
        self._noise = self._noises()

    def after(self) -> None:
        """Add the bounds of the update since :meth:`before`."""
        now = self._noises()
        for site in self._sites:
            name = site.name
            if name in self._fixed and not (name in now and name in self._noise):
                continue
            noise: dict[str, Any] = {"noise": self._noise.get(name, 0.0), "noise_after": now.get(name, 0.0)}
            self.found[name].append(layer_bound(self._kept[name], site.module, positions=site.positions, **noise))

    def _noises(self) -> dict[str, Tensor]:
        """Noise, on the probe, of the statistics of the layers that do not use the probe's own."""
        found: dict[str, Tensor] = {}

        def look(name: str, module: nn.Module, inputs: tuple[Any, ...], _: Any) -> None:
            x = first_tensor(inputs)
            if name in self._fixed and x is not None and float(getattr(module, "clipped", 0.0)) == 0:
                var, mean = torch.var_mean(x.detach().movedim(1, 0).flatten(1).double(), dim=1, correction=0)
                # A population layer lets the batch into its statistics first; what it used is in it afterwards.
                used_mean, used_var = (getattr(module, key).to(mean) for key in ("running_mean", "running_var"))
                eps = float(getattr(module, "eps", 0.0))
                found[name] = second_moment_excess(mean, var, used_mean, used_var, eps)

        if self._fixed:
            layers = {name.split("#")[0]: module for name, module in self._fixed.items()}
            side_forward(self._model, self._probe, layers, look)
        return found


def bounded(module: nn.Module) -> bool:
    """Return whether a layer standardizes, or unitizes, so that its parameters bound its outputs."""
    try:
        layer_bound(module)
    except TypeError:
        return False
    return True
