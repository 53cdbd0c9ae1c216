"""What makes an update: the optimizer, and gamma decay, coherence and population statistics beside it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flexnorm._messages import NothingDone
from flexnorm.lab.run.config import Config
from flexnorm.lab.run.settings import ESTIMATE, GAMMA_DECAY
from flexnorm.nn import undecayed
from flexnorm.nn.normprop import NormPropLayer, coherence_penalty, normalize_weights_, register_unit_norm
from flexnorm.optim import SGDG, SGDP, AdamG, AdamP, GammaDecay, param_groups
from flexnorm.probe import batch_norm_layers
from flexnorm.statistics import PopulationEstimator

# Optimizers that leave the length of weights free.
_FLAT = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "sgdp": SGDP, "adamp": AdamP}


def make_optimizer(
    model: nn.Module, optim: str, settings: Mapping[str, Any], example_input: Tensor
) -> tuple[torch.optim.Optimizer, list[str]]:
    """Build one of :data:`OPTIMS` for a model not yet moved or wrapped; also return remarks for the run's summary.

    Layers of Normalization Propagation get unit weights now and after every step (Arpit et al., 2016, section 3.3),
    unless the optimizer itself keeps weights on the sphere. ``settings`` are complete, as
    :meth:`flexnorm.lab.run.Config.optim_settings` returns them; a few images ``example_input`` (N, C, H, W) show which
    weights are scale-invariant.
    """
    s = dict(settings)
    if "beta1" in s:
        s["betas"] = (s.pop("beta1"), s.pop("beta2"))
    if "nesterov" in s:
        s["nesterov"] &= s["momentum"] > 0
    if optim in _FLAT:
        # Parameters without weight decay (alpha of unitization) are in a group of their own.
        free = {id(p) for p in undecayed(model)}
        parts = [[p for p in model.parameters() if (id(p) in free) == apart] for apart in (False, True)]
        groups = [{"params": parts[0]}, *([{"params": parts[1], "weight_decay": 0.0}] if free else [])]
        optimizer = _FLAT[optim](groups, **s)
        if any(isinstance(module, NormPropLayer) for module in model.modules()):
            normalize_weights_(model)
            register_unit_norm(optimizer, model)
        return optimizer, []
    own = {key: s[key] for key in ("lr", "lr_manifold", "weight_decay", "grad_clip", "ortho")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingDone)  # below it becomes a remark in the run's summary
        on_sphere = param_groups(model, example_input=example_input, **own)
    notes = list(on_sphere.notes)
    off = s.get("off_manifold", "sgd")
    if not any(group["manifold"] for group in on_sphere):
        by = {"sgd": "SGD with momentum", "adamw": "AdamW"}[off]
        notes = [f"no weight of this network is scale-invariant: all are updated by {by}"]
    if optim == "sgdg":
        return SGDG(on_sphere, momentum=s["momentum"], nesterov=s["nesterov"], ortho_every=s["ortho_every"]), notes
    for group in on_sphere:
        if group["manifold"] or off == "sgd":
            group["betas"] = (s["momentum"], s["beta2"])
    nesterov = s.get("nesterov", False)
    return AdamG(on_sphere, off_manifold=off, nesterov=nesterov, ortho_every=s["ortho_every"]), notes


class StepHooks:
    """What one run adds to its updates, nothing by default.

    In each update: `before` the forward pass, `penalty` added to the loss, `after` the optimizer's step; and
    `before_evaluation`. By ``gamma_decay``, ``coherence`` and ``estimate`` of the config, which raise ValueError where
    they do not apply to the network; population statistics are of draws, by ``seed``, from ``samples`` (N, C, H, W).
    """

    def __init__(self, config: Config, model: nn.Module, samples: Tensor, seed: int) -> None:
        settings = {**GAMMA_DECAY, **config.gamma_decay}
        self._model, self._coherence, self._decoupled = model, config.coherence, bool(settings["decoupled"])
        self._every: int = settings["every"]
        self._decay: GammaDecay | None = None
        self._gammas: list[nn.Parameter] = []
        self._coefficient, self._steps = 0.0, 0
        propagating = [module for module in model.modules() if isinstance(module, NormPropLayer)]
        if config.coherence and not propagating:
            raise ValueError("coherence is a penalty on layers of Normalization Propagation; this network has none")
        if config.gamma_decay and propagating:
            if isinstance(settings["coefficient"], str):
                raise ValueError(
                    "Normalization Propagation has no statistics whose noise an adaptive gamma decay could imitate; "
                    "give gamma_decay a number as coefficient, for example 0.001"
                )
            self._coefficient = float(settings["coefficient"])
            self._gammas = [layer.gamma for layer in propagating if isinstance(layer.gamma, nn.Parameter)]
        elif config.gamma_decay:
            size = settings["batch_size"] or config.batch_size
            self._decay = GammaDecay(model, size, settings["coefficient"], seed=seed)
            weights = [layer.weight for layer in batch_norm_layers(model).values()]
            self._gammas = [weight for weight in weights if isinstance(weight, nn.Parameter)]
        self._estimator: PopulationEstimator | None = None
        if any(getattr(module, "statistics", None) == "estimated" for module in model.modules()):
            pool = {**ESTIMATE, **config.estimate}
            self._estimator = PopulationEstimator(model, samples, size=pool.pop("samples"), **pool, seed=seed)

    def before(self, x: Tensor) -> None:
        """Renew what is due before an update on the images ``x`` (N, C, H, W)."""
        if self._estimator is not None:
            self._estimator()
        if self._decay is not None and self._decay.adaptive and self._steps % self._every == 0:
            self._decay.update(x)
        self._steps += 1

    def penalty(self) -> Tensor | None:
        """Return what is to be added to the loss, or None."""
        terms = [self._coherence * coherence_penalty(self._model)] if self._coherence else []
        if self._gammas and not self._decoupled:
            if self._decay is not None:
                terms.append(self._decay.penalty())
            else:
                squares = torch.stack([gamma.square().sum() for gamma in self._gammas])
                terms.append(self._coefficient * squares.sum())
        return torch.stack(terms).sum() if terms else None

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """Shrink the scales, if they decay apart from the loss, as far as a penalty would move them in the long run.

        That is the learning rate of their parameter group, divided by 1 - momentum where momentum adds its steps up.
        """
        if not (self._gammas and self._decoupled):
            return
        first = self._gammas[0]
        group = next(group for group in optimizer.param_groups if any(p is first for p in group["params"]))
        momentum = group.get("momentum", group["betas"][0] if group.get("off_manifold") == "sgd" else 0.0)
        lr = group["lr"] / (1 - momentum)
        if self._decay is not None:
            self._decay.decay(lr)
            return
        with torch.no_grad():
            for gamma in self._gammas:
                gamma.mul_(max(0.0, 1.0 - 2.0 * lr * self._coefficient))

    def before_evaluation(self) -> None:
        """Let population statistics follow the last weights."""
        if self._estimator is not None:
            self._estimator.renew()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: tensors, numbers and strings."""
        return {
            "steps": self._steps,
            "decay": {} if self._decay is None else self._decay.state_dict(),
            "estimator": {} if self._estimator is None else self._estimator.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._steps = int(state["steps"])
        if self._decay is not None:
            self._decay.load_state_dict(state["decay"])
        if self._estimator is not None:
            self._estimator.load_state_dict(state["estimator"])
