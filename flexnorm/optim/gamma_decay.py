"""Gamma decay: what the noise of BN's batches does to the scales, for a network that normalizes by the population."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flexnorm._messages import none_of
from flexnorm.engine import active_group
from flexnorm.probe import Loss, Selection, batch_norm_layers, capture
from flexnorm.theory.regularization import (
    DecayRow,
    layer_strength,
    statistics_noise,
)


class GammaDecay:
    """Decay of the scales gamma with the strength that BN's batch noise would have.

    Luo et al. 2019, Eq. 3: loss of BN = loss of PN + sum over channels of zeta gamma^2. zeta is taken as a constant of
    the step (no gradient flows through it), so the penalty pulls on gamma alone.

    As a penalty: add `penalty` to the loss. As decoupled decay: call `decay` after ``optimizer.step()``. Use one of
    them. With ``coefficient="adaptive"`` call `update` on a batch now and then (every 50 steps, say); it costs one
    forward and one backward pass in evaluation mode and leaves gradients, buffers, modes and the random state alone. In
    a process group the estimates are averaged over all processes, so every process must call `update`.

    Args:
        model: A model with layers that normalize by population or batch statistics and have a ``weight`` per channel:
            population normalization is what it is for; on torch's BatchNorm it adds to the regularization that is there
            already.
        batch_size: M, the batch size whose noise is imitated; need not be that of the training. At least 2.
        coefficient: ``"adaptive"``: zeta per channel from the curvature of the loss, following the training. A number:
            that zeta for every channel (the paper's ``1/(2M)`` or ``1/(4M)``, for example); `batch_size` is then only
            kept.
        layers: Which layers, as in :func:`flexnorm.probe.select`; all batch-normalized ones by default.
        loss: Loss whose curvature counts; see `CURVED_LOSSES`, or a function ``loss(outputs, targets)`` for the
            empirical Fisher information at the true labels.
        momentum: Weight of a new estimate in the moving average, in (0, 1]; bias-corrected. Default 0.1.
        seed: Of the draws of `update`.

    Attributes:
        updates: Number of updates so far.

    Raises:
        ValueError: If an argument is out of range, or no layer has a scale to decay.
        TypeError: If the coefficient is neither "adaptive" nor a number.
        RuntimeError: From all methods that need zeta, if it is adaptive and `update` was never called.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        >>> decay = GammaDecay(model, batch_size=128, coefficient=0.01)
        >>> round(decay.penalty().item(), 6)  # 8 channels, gamma = 1
        0.08
    """

    def __init__(
        self,
        model: nn.Module,
        batch_size: int,
        coefficient: str | float = "adaptive",
        *,
        layers: Selection | None = None,
        loss: Loss = "cross_entropy",
        momentum: float = 0.1,
        seed: int = 0,
    ) -> None:
        statistics_noise(batch_size)
        if isinstance(coefficient, str):
            if coefficient != "adaptive":
                raise ValueError(f"coefficient must be 'adaptive' or a number, got {coefficient!r}")
        elif isinstance(coefficient, bool) or not isinstance(coefficient, (int, float)):
            raise TypeError(f"coefficient must be 'adaptive' or a number, got {type(coefficient).__name__}")
        elif not coefficient >= 0:
            raise ValueError(f"coefficient must not be negative, got {coefficient}")
        if not 0.0 < momentum <= 1.0:
            raise ValueError(f"momentum must lie in (0, 1], got {momentum}")
        weights = {name: module.weight for name, module in batch_norm_layers(model, layers).items()}
        self._scales = {name: weight for name, weight in weights.items() if isinstance(weight, nn.Parameter)}
        if not self._scales:
            from flexnorm.nn import called_norms  # here, not above: the layers bring in the compiler

            others = [
                (name, f"{type(norm).__name__}, another kind, or without a scale")
                for name, norm in called_norms(model).items()
            ]
            raise ValueError(
                "no layer with a scale (weight) to decay: the model has no batch or population normalization with one; "
                f"{none_of('norms', others)}"
            )
        self.model, self.batch_size, self.coefficient = model, batch_size, coefficient
        self.loss, self.momentum, self.seed = loss, momentum, seed
        self.updates = 0
        self._average: dict[str, Tensor] = {}

    @property
    def adaptive(self) -> bool:
        """Whether zeta is estimated, so that `update` has to be called now and then."""
        return isinstance(self.coefficient, str)

    def update(self, inputs: Tensor, targets: Tensor | None = None) -> None:
        """Estimate zeta on a batch and let it enter the moving average.

        Args:
            inputs: (N, *), N of at least 4; a few hundred images give a few percent.
            targets: Labels; only for a callable loss.

        Raises:
            ValueError: If there are too few images or labels are missing.
        """
        generator = torch.Generator(inputs.device).manual_seed(self.seed + self.updates)
        tables = capture(self.model, inputs, self.loss, targets, layers=list(self._scales), generator=generator)
        new: dict[str, Tensor] = {}
        for table in tables:
            name, total = table.name.split("#")[0], layer_strength(table).total
            new[name] = new[name] + total if name in new else total  # each call of a shared layer adds its own noise
        group = active_group()
        for name, value in new.items():
            if group is not None:
                torch.distributed.all_reduce(value, group=group)
                value /= torch.distributed.get_world_size(group)
            old = self._average.get(name)
            kept = 0.0 if old is None else (1.0 - self.momentum) * old.to(value)
            self._average[name] = self.momentum * value + kept
        self.updates += 1

    def zeta(self) -> dict[str, Tensor]:
        """Return zeta of every layer, (C,) each, without gradient."""
        if not isinstance(self.coefficient, str):
            constant = float(self.coefficient)
            return {name: torch.full_like(scale.detach(), constant) for name, scale in self._scales.items()}
        if self.updates == 0:
            raise RuntimeError("adaptive gamma decay knows no zeta yet: call update(inputs) on a batch first")
        total = (1.0 - (1.0 - self.momentum) ** self.updates) * self.batch_size
        averages = {name: self._average.get(name, scale.new_zeros(scale.shape)) for name, scale in self._scales.items()}
        return {name: (a.to(self._scales[name]) / total).detach().clamp_min(0.0) for name, a in averages.items()}

    def penalty(self) -> Tensor:
        """Return ``sum(zeta gamma^2)`` over channels and layers, a scalar to be added to the mean loss of a batch."""
        terms = [(zeta * self._scales[name].square()).sum() for name, zeta in self.zeta().items()]
        return torch.stack([term.to(terms[0].device) for term in terms]).sum()

    @torch.no_grad()
    def decay(self, lr: float) -> None:
        """Shrink every gamma by ``max(0, 1 - 2 lr zeta)``, the decoupled form of the penalty's gradient step.

        Args:
            lr: The learning rate of the step just taken. With SGD of momentum m a gradient moves the scales by ``lr /
                (1 - m)`` in the end: give that, if the decay is to weigh against the loss as the penalty does.

        Raises:
            ValueError: If the learning rate is negative.
        """
        if not lr >= 0:
            raise ValueError(f"lr must not be negative, got {lr}")
        for name, zeta in self.zeta().items():
            self._scales[name].mul_((1.0 - 2.0 * lr * zeta).clamp_min(0.0))

    def report(self) -> list[DecayRow]:
        """Return one row per layer: zeta, gamma^2 and the penalty."""
        return [DecayRow.of(name, zeta, self._scales[name].detach()) for name, zeta in self.zeta().items()]

    def state_dict(self) -> dict[str, Any]:
        """Return the moving averages and their count: tensors and numbers only, copies."""
        return {"updates": self.updates, "average": {name: value.clone() for name, value in self._average.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`.

        Raises:
            ValueError: If it names layers that this model does not have, or tables of another size.
        """
        for name, value in state["average"].items():
            if name not in self._scales or value.shape != self._scales[name].shape:
                raise ValueError(
                    f"the state holds layer {name!r} with {tuple(value.shape)}, which this model does not have"
                )
        self.updates = int(state["updates"])
        self._average = {name: value.clone() for name, value in state["average"].items()}
