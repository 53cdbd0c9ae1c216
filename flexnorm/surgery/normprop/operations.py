"""What the operations of a graph are: activations, sums, concatenations, and which modules may be replaced."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from flexnorm.nn.normprop import Activation
from flexnorm.nn.normprop.elementwise import resolve_activation
from flexnorm.surgery._producers import LINEAR
from flexnorm.surgery._reading import RefusedError

__all__ = ["Modules", "activation_of", "is_cat", "is_shape_query", "summands"]

_MODULES: tuple[type[nn.Module], ...] = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    nn.ReLU6,
    nn.Hardtanh,
    nn.Hardsigmoid,
    nn.Hardswish,
)
_FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.relu: nn.ReLU,
    F.relu_: nn.ReLU,
    torch.relu: nn.ReLU,
    torch.relu_: nn.ReLU,
    F.leaky_relu: nn.LeakyReLU,
    F.elu: nn.ELU,
    F.celu: nn.CELU,
    F.selu: nn.SELU,
    F.gelu: nn.GELU,
    F.silu: nn.SiLU,
    F.mish: nn.Mish,
    F.tanh: nn.Tanh,
    torch.tanh: nn.Tanh,
    F.sigmoid: nn.Sigmoid,
    torch.sigmoid: nn.Sigmoid,
    F.softplus: nn.Softplus,
    F.relu6: nn.ReLU6,
    F.hardtanh: nn.Hardtanh,
    F.hardsigmoid: nn.Hardsigmoid,
    F.hardswish: nn.Hardswish,
}
_METHODS = {"relu": nn.ReLU, "relu_": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
_SUMS = (operator.add, operator.iadd, torch.add)


def known_activation(module: nn.Module) -> bool:
    """Whether a module is one of torch's elementwise activations."""
    return type(module) in _MODULES


def activation_of(node: fx.Node, module: nn.Module | None) -> tuple[Activation, Tensor | None] | None:
    """The activation that a node applies to its first argument, and trained slopes of PReLU; None if it does not."""
    if module is None:
        module = _as_module(node)
    if module is None or not known_activation(module):
        return None
    slope = module.weight.detach() if isinstance(module, nn.PReLU) else None
    resolved = resolve_activation(module)
    return None if resolved is None else (resolved, slope)


def _as_module(node: fx.Node) -> nn.Module | None:
    kind: type[nn.Module] | None = None
    if node.op == "call_function":
        kind = _FUNCTIONS.get(node.target)
    elif node.op == "call_method":
        kind = _METHODS.get(str(node.target))
    if kind is None:
        return None
    try:
        return kind(*node.args[1:], **{k: v for k, v in node.kwargs.items() if k != "input"})
    except TypeError:
        return None


def in_place(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether an activation or sum overwrites its first argument."""
    if module is not None:
        return bool(getattr(module, "inplace", False))
    name = str(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", ""))
    return bool(name == "iadd" or name.endswith("_") or node.kwargs.get("inplace"))


def summands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two values that a node adds; None if it does something else."""
    plain = node.op == "call_function" and node.target in _SUMS
    if not plain and not (node.op == "call_method" and node.target in ("add", "add_")):
        return None
    if node.kwargs or len(node.args) != 2 or not all(isinstance(arg, fx.Node) for arg in node.args):
        return None
    first, second = node.args
    return (first, second) if isinstance(first, fx.Node) and isinstance(second, fx.Node) else None


def is_cat(node: fx.Node) -> bool:
    """Whether a node concatenates along the channels."""
    if node.op != "call_function" or node.target not in (torch.cat, torch.concat, torch.concatenate):
        return False
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    return bool(axis == 1) and isinstance(node.args[0] if node.args else None, (tuple, list))


def is_shape_query(node: fx.Node) -> bool:
    """Whether a node asks for the size of a tensor only."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel", "ndimension")
    return (
        node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")
    )


class Modules:
    """The modules that a graph calls, and which of them belong to one place alone.

    Args:
        model: The model.
        graph: Its graph.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self._named = dict(model.named_modules(remove_duplicate=False))
        self._calls = Counter(id(self._named[str(n.target)]) for n in graph.nodes if n.op == "call_module")
        self._owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
        self._borrowed = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
        self.names: dict[int, list[str]] = {}
        for name, module in self._named.items():
            self.names.setdefault(id(module), []).append(name)

    def of(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls."""
        return self._named[str(node.target)] if node.op == "call_module" else None

    def once(self, module: nn.Module) -> bool:
        """Whether it is called in one place."""
        return self._calls[id(module)] == 1

    def check(self, module: nn.Module) -> None:
        """Refuse a module that is more than its class says.

        Raises:
            RefusedError: The text says why.
        """
        if not self.once(module):
            raise RefusedError("used more than once")
        if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in module.modules()):
            raise RefusedError("it has hooks")
        if "forward" in module.__dict__:
            raise RefusedError("its forward was replaced on the instance")
        if parametrize.is_parametrized(module) or (isinstance(module, LINEAR) and "weight" not in module._parameters):
            raise RefusedError("its weight is computed (parametrization, weight_norm, pruning); bake it in first")
        if any(self._owners[id(p)] > 1 for p in module.parameters()):
            raise RefusedError("its weight is used elsewhere too")
        if any(name.startswith(f"{own}.") for own in self.names[id(module)] for name in self._borrowed):
            raise RefusedError("its weight is used elsewhere too")
