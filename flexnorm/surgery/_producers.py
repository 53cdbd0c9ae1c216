"""Which linear map feeds which normalization, and nothing else: by tracing, or by watching one forward pass.

A normalization may be folded into a linear map only if the map's output goes into it and nowhere else, and if each of
the two is used once. Both ways establish that; tracing needs no input, watching needs no traceable model.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flexnorm.engine import FlexNorm
from flexnorm.nn import NormPropUnits
from flexnorm.probe import call, hooked, isolated, tensors
from flexnorm.surgery._reading import is_candidate

LINEAR = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


@dataclass
class Producers:
    """What feeds the normalizations of a model, by the ``id`` of the normalization."""

    into: dict[int, nn.Module] = field(default_factory=dict)  # the linear map that feeds it and nothing else
    reasons: dict[int, str] = field(default_factory=dict)  # why it has none
    axes: dict[int, set[int]] = field(default_factory=dict)  # numbers of axes of its inputs, where they were seen

    def settle(
        self, norm: nn.Module, producer: nn.Module | None, calls: Counter[int], *, elsewhere: bool, borrowed: bool
    ) -> None:
        """Note the linear map before a normalization, or why it has none, given how often modules were called."""
        reasons = {
            "not reached in evaluation": not calls[id(norm)],
            "used more than once": calls[id(norm)] > 1,
            "no convolution or linear map directly before it": producer is None,
            "the output of the linear map before it is used elsewhere too": elsewhere,
            "the linear map before it is used more than once": calls[id(producer)] > 1,
            "the weight of the linear map before it is used elsewhere too": borrowed,
        }
        reason = next((text for text, holds in reasons.items() if holds), "")
        if producer is None or reason:
            self.reasons[id(norm)] = reason
        else:
            self.into[id(norm)] = producer


class _Tracer(fx.Tracer):
    """Keeps normalizations and the layers of this package in one piece."""

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        if is_candidate(m) or isinstance(m, (*LINEAR, FlexNorm, NormPropUnits)):
            return True
        return bool(super().is_leaf_module(m, qualified_name))


def traced(model: nn.Module) -> Producers:
    """Find the producers by ``torch.fx``, in evaluation mode; raises whatever the model raises when it is traced."""
    with isolated(model, 0):
        model.eval()
        graph = _Tracer().trace(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    called = {node: modules[str(node.target)] for node in graph.nodes if node.op == "call_module"}
    calls = Counter(id(module) for module in called.values())
    borrowed = {id(operator.attrgetter(str(node.target))(model)) for node in graph.nodes if node.op == "get_attr"}
    found = Producers()
    for node, norm in called.items():
        if not is_candidate(norm):
            continue
        before = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        users = 1
        while isinstance(before, fx.Node) and before in called and type(called[before]) is nn.Identity:
            users = max(users, len(before.users))
            before = before.args[0]
        producer = called.get(before) if isinstance(before, fx.Node) else None
        linear = producer if isinstance(producer, LINEAR) else None
        elsewhere = isinstance(before, fx.Node) and max(users, len(before.users)) > 1
        lent = linear is not None and any(id(p) in borrowed for p in linear.parameters())
        found.settle(norm, linear, calls, elsewhere=elsewhere, borrowed=lent)
    return found


@dataclass
class _Output:
    """An output of a linear map; the tensor is held so that its id stays its own."""

    producer: nn.Module
    tensor: Tensor
    consumers: list[nn.Module] = field(default_factory=list)
    used_elsewhere: bool = False


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation that reads the output of a linear map outside the normalization that it feeds."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.outputs: dict[int, _Output] = {}
        self.inside: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tensors((args, kwargs or {})):
            output = self.outputs.get(id(value))
            if output is not None and id(value) not in self.inside:
                output.used_elsewhere = True
        return func(*args, **(kwargs or {}))


def executed(model: nn.Module, example_input: Any) -> Producers:
    """Find the producers by watching one forward pass in evaluation mode."""
    watch, found = _Watch(), Producers()
    calls: Counter[int] = Counter()
    inputs: dict[int, _Output | None] = {}

    def after_linear(module: nn.Module, _: Any, output: Any) -> None:
        calls[id(module)] += 1
        watch.outputs[id(output)] = _Output(module, output)

    def before_norm(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls[id(module)] += 1
        x = args[0] if args else None
        found.axes.setdefault(id(module), set()).add(x.dim() if isinstance(x, Tensor) else -1)
        inputs[id(module)] = output = watch.outputs.get(id(x))
        if output is not None:
            output.consumers.append(module)
        watch.inside.append(id(x))

    def after_norm(*_: Any) -> None:
        watch.inside.pop()

    norms = [module for module in model.modules() if is_candidate(module)]
    linear = [module for module in model.modules() if isinstance(module, LINEAR)]
    with hooked(linear, after=after_linear), hooked(norms, before_norm, after_norm), isolated(model, 0):
        model.eval()
        with watch:
            returned = {id(t) for t in tensors(call(model, example_input))}
    for norm in norms:
        output = inputs.get(id(norm))
        used = output is not None and (
            output.used_elsewhere or len(output.consumers) > 1 or id(output.tensor) in returned
        )
        found.settle(norm, output.producer if output else None, calls, elsewhere=used, borrowed=False)
    return found
