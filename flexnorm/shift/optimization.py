"""Internal covariate shift as the optimizer meets it: how the update of earlier layers changes a layer's gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from flexnorm.probe import (
    Selection,
    check_watchable,
    detached,
    isolated,
    select_layers,
    side_forward,
)
from flexnorm.shift.base import Monitor, MonitorOptions, Snapshot
from flexnorm.shift.records import Record

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class OptimizationRecord(Record):
    """How the gradient of one layer changed when the layers before it were updated.

    The attributes are those of :class:`flexnorm.shift.records.Record` and:

    Attributes:
        gradient: Norm of G, the gradient before.
        shift: Norm of G - G'.
        relative: ``shift / gradient``; NaN for a zero gradient.
        cosine: Cosine of the angle between G and G'; NaN if one is zero.
    """

    gradient: float
    shift: float
    relative: float
    cosine: float


class OptimizationMonitor(Monitor[OptimizationRecord]):
    r"""Measures how the update of earlier layers changes the gradient of each layer, without a trace in the training.

    Santurkar, Tsipras, Ilyas & Madry, "How does batch normalization help optimization?" (NeurIPS 2018, arXiv
    1805.11604), def. 2.1: with the loss L, a batch and the parameters $W^{(t)}_1, \dots, W^{(t)}_k$ in order of the
    layers (that in which the model first calls them),

        G_i  = dL/dW_i (W_1^t, ..., W_k^t)
        G'_i = dL/dW_i (W_1^{t+1}, ..., W_{i-1}^{t+1}, W_i^t, ..., W_k^t),

    and the shift of layer i is $\|G_i - G'_i\|_2$. They find that BatchNorm often has *more* of it.

    A measurement costs one forward and backward for each layer and one more, and a copy of the parameters is held from
    the step before to the step after: measure rarely, or few layers.

    Args:
        model: Any module, also compiled or wrapped.
        loss: ``loss(model, batch)`` -> scalar tensor.
        batch: What ``loss`` takes, kept as a copy.
        layers: Which layers, as for :class:`ShiftMonitor`; ``None`` for all that hold a parameter of two or more axes
            themselves.
        seed: Seed of the noise in the side forward.
        **options: ``every`` (500 by default), ``lag`` (1, as in the paper), ``anchor`` and ``sinks``, as for
            :class:`ShiftMonitor`.

    Attributes:
        records: All measurements so far, a list of :class:`OptimizationRecord`.
        steps: Optimizer steps seen so far.
        layers: Names of the layers that are measured, in the order of their first call.

    Raises:
        ValueError: No layer matches, or none of them holds parameters and is called by the loss.
    """

    _kind = OptimizationRecord

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        batch: Any,
        layers: Selection | None = None,
        *,
        seed: int = 0,
        **options: Unpack[MonitorOptions],
    ) -> None:
        options.setdefault("every", 500)
        super().__init__(model, **options)
        check_watchable(self._model)
        self._loss = loss
        self._batch = detached(batch)
        self._seed = seed
        self._owners = self._order()
        if layers is None:
            wanted = {n for n, own in self._owners.items() if any(self._model.get_parameter(p).ndim >= 2 for p in own)}
        else:
            chosen = set(select_layers(self._model, layers).values())
            wanted = {name for name, module in self._model.named_modules() if module in chosen}
        self.layers = tuple(name for name in self._owners if name in wanted)
        if not self.layers:
            raise ValueError(
                "none of the layers holds parameters itself and is called by the loss; "
                f"those that do: {', '.join(self._owners) or 'none'}"
            )

    def look(self) -> Snapshot:
        """Copies of all parameters, by name."""
        return {name: parameter.detach().clone() for name, parameter in self._model.named_parameters()}

    def gradients(self, parameters: Mapping[str, Tensor], layers: Iterable[str]) -> dict[str, Tensor]:
        """Gradient of the loss with respect to all own parameters of each layer, as one vector, at given parameters.

        Args:
            parameters: A value for every parameter of the model.
            layers: Names of layers.

        Returns:
            By layer: (number of its own parameters,).
        """
        layers = list(layers)
        leaves = {name: value.detach().clone() for name, value in parameters.items()}
        names = [name for layer in layers for name in self._owners[layer]]
        with isolated(self._model, self._seed), torch.enable_grad():
            for name in names:
                leaves[name].requires_grad_()
            value = torch.func.functional_call(
                _Loss(self._model, self._loss), {f"model.{k}": v for k, v in leaves.items()}, (self._batch,)
            )
            found = torch.autograd.grad(value, [leaves[name] for name in names], allow_unused=True)
        flat = {
            name: (torch.zeros_like(leaves[name]) if grad is None else grad).flatten().double()
            for name, grad in zip(names, found, strict=True)
        }
        return {layer: torch.cat([flat[name] for name in self._owners[layer]]) for layer in layers}

    def _compare(self, before: Snapshot, now: Snapshot) -> Iterator[tuple[str, Mapping[str, Any]]]:
        device = next(iter(now.values())).device
        mixed = {name: value.to(device) for name, value in before.items()}
        gradients = self.gradients(mixed, self.layers)
        for layer, own in self._owners.items():
            if layer in gradients:
                first, second = gradients[layer], self.gradients(mixed, [layer])[layer]
                size, change = float(first.norm()), float((first - second).norm())
                lengths = size * float(second.norm())
                relative = change / size if size > 0 else float("nan")
                cosine = float(first @ second) / lengths if lengths > 0 else float("nan")
                yield layer, {"gradient": size, "shift": change, "relative": relative, "cosine": cosine}
            mixed.update({name: now[name] for name in own})

    def _order(self) -> dict[str, list[str]]:
        """Names of the own parameters of each layer, in the order in which the loss first calls the layers."""
        owners = {name: m for name, m in self._model.named_modules() if list(m.parameters(recurse=False))}
        called: dict[str, None] = {}

        def look(name: str, *_: Any) -> None:
            called.setdefault(name.split("#")[0])

        side_forward(self._model, self._batch, owners, look, forward=self._loss, seed=self._seed)
        # A parameter that several modules share belongs to the first that is called.
        kept = {id(parameter): name for name, parameter in self._model.named_parameters()}
        result: dict[str, list[str]] = {}
        for layer in called:
            own = [kept.pop(id(p)) for p in owners[layer].parameters(recurse=False) if id(p) in kept]
            if own:
                result[layer] = own
        return result

    def _config(self) -> dict[str, Any]:
        return {"layers": list(self.layers), "seed": self._seed}


class _Loss(nn.Module):
    """The loss as a module, so that its parameters can be exchanged for others."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)
