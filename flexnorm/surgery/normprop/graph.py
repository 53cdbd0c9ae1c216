"""The graph of a model for a conversion: traced in both modes, with the shape of every value and measured moments."""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from flexnorm.nn.normprop import ACTIVATION_MODULES, Activation, NormPropAdd, resolve_activation
from flexnorm.probe import arguments, batch_inputs, isolated, map_tensors
from flexnorm.statistics import Pool
from flexnorm.surgery._producers import LINEAR, _Tracer
from flexnorm.surgery._reading import RefusedError

Stats = dict[str, tuple[Tensor, Tensor]]
"""Mean and biased variance (C,) of a value over samples and positions, by the name of its node; float64."""

_DROPOUTS: dict[Any, type[nn.Module]] = {F.dropout: nn.Dropout, F.dropout1d: nn.Dropout1d}
_DROPOUTS |= {F.dropout2d: nn.Dropout2d, F.dropout3d: nn.Dropout3d}


class _Leaves(_Tracer):
    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return isinstance(m, NormPropAdd) or super().is_leaf_module(m, qualified_name)


class _Watcher(fx.Interpreter):
    """Runs a graph on the modules of the model and shows the value of every node."""

    def __init__(self, model: nn.Module, graph: fx.Graph, look: Callable[[fx.Node, Any], None]) -> None:
        super().__init__(model, garbage_collect_values=True, graph=graph)
        self.look = look

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.look(n, value)
        return value


class Network:
    """A model as a graph of operations; RefusedError if it cannot be traced, or does something else in training.

    Attributes:
        model: The model.
        graph: Its operations in evaluation mode.
        shapes: Shape of every value that is a tensor, for the example input.
        names: All names of a module, by its ``id``.
    """

    def __init__(self, model: nn.Module, example_input: Any) -> None:
        self.model = model
        try:
            self.graph, other = (_trace(model, training) for training in (False, True))
        except Exception as error:
            # Tracing runs the user's code on proxies: anything can happen.
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise RefusedError(f"the model cannot be traced ({lines[0]})") from error
        if _text(self.graph) != _text(other):
            raise RefusedError("its forward does something else in training than in evaluation")
        self.shapes: dict[fx.Node, torch.Size] = {}
        self._run([example_input], lambda n, x: self.shapes.update({n: x.shape} if isinstance(x, Tensor) else {}))
        self._named = dict(model.named_modules(remove_duplicate=False))
        self._calls = Counter(id(self._named[str(n.target)]) for n in self.graph.nodes if n.op == "call_module")
        self._owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
        self._borrowed = {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}
        self.names: dict[int, list[str]] = {}
        for name, module in self._named.items():
            self.names.setdefault(id(module), []).append(name)

    def _run(self, inputs: Iterable[Any], look: Callable[[fx.Node, Any], None]) -> None:
        """Run the graph in evaluation mode."""
        with isolated(self.model, 0):
            self.model.eval()
            for example in inputs:
                args, kwargs = arguments(example)
                bound = inspect.signature(self.model.forward).bind(*args, **kwargs)
                bound.apply_defaults()
                if len(bound.arguments) != sum(node.op == "placeholder" for node in self.graph.nodes):
                    raise RefusedError("its forward takes *args or **kwargs")
                _Watcher(self.model, self.graph, look).run(*bound.arguments.values())

    def measure(self, batches: Iterable[Any]) -> Stats:
        """Mean and variance per channel (axis 1) of all values with channels, over all batches, in evaluation."""
        pools: dict[str, Pool] = {}
        first = next((t for t in (*self.model.parameters(), *self.model.buffers())), torch.empty(0))

        def look(node: fx.Node, value: Any) -> None:
            # An in-place operation may come next, but only after this look.
            if isinstance(value, Tensor) and len(self.shapes[node]) >= 2 and value.numel():
                pools.setdefault(node.name, Pool(value.shape[1], value.device)).add_values(value)

        self._run((map_tensors(lambda t: t.to(first.device), batch_inputs(batch)) for batch in batches), look)
        if not pools:
            raise ValueError("batches is empty: there is nothing to measure")
        for name, pool in pools.items():
            if not bool(pool.finite.all()):
                raise RuntimeError(f"the values at {name} are not finite for some of the batches")
        return {name: (pool.mean.cpu().double(), pool.var.cpu().double()) for name, pool in pools.items()}

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls."""
        return self._named[str(node.target)] if node.op == "call_module" else None

    def once(self, module: nn.Module) -> bool:
        """Whether it is called in one place."""
        return self._calls[id(module)] == 1

    def check(self, module: nn.Module) -> None:
        """Refuse a module that is more than its class says: RefusedError says why."""
        if not self.once(module):
            raise RefusedError("used more than once")
        if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in module.modules()):
            raise RefusedError("it has hooks")
        if "forward" in module.__dict__:
            raise RefusedError("its forward was replaced on the instance")
        if parametrize.is_parametrized(module) or (isinstance(module, LINEAR) and "weight" not in module._parameters):
            raise RefusedError("its weight is computed (parametrization, weight_norm, pruning); bake it in first")
        borrowed = any(name.startswith(f"{own}.") for own in self.names[id(module)] for name in self._borrowed)
        if borrowed or any(self._owners[id(p)] > 1 for p in module.parameters()):
            raise RefusedError("its weight is used elsewhere too")


def _trace(model: nn.Module, training: bool) -> fx.Graph:
    with isolated(model, 0):
        model.train(training)
        return _Leaves().trace(model)


def _text(graph: fx.Graph) -> list[str]:
    lines = []
    for node in graph.nodes:
        args, kwargs = node.args, dict(node.kwargs)
        if node.op == "call_function" and node.target in _DROPOUTS:
            # Tracing turns their flag into a number.
            args, kwargs = args[:2], {k: v for k, v in kwargs.items() if k != "training"}
        lines.append(f"{node.name} {node.op} {node.target} {args} {kwargs}")
    return lines


# -- what the operations are

_NAMES = {activation.__name__.lower(): activation for activation in ACTIVATION_MODULES if activation is not nn.PReLU}
_NAMES = {"relu_": nn.ReLU, "leaky_relu": nn.LeakyReLU, **_NAMES}
_FUNCTIONS: dict[Any, type[nn.Module]] = {
    getattr(place, name): kind for name, kind in _NAMES.items() for place in (torch, F) if hasattr(place, name)
}
_METHODS: dict[Any, type[nn.Module]] = {name: _NAMES[name] for name in ("relu", "relu_", "tanh", "sigmoid")}


def dropout_of(node: fx.Node) -> nn.Module | None:
    """The module for a call of one of torch's dropout functions, which follows the training flag; None for others."""
    if node.op != "call_function" or node.target not in _DROPOUTS:
        return None
    p: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
    return _DROPOUTS[node.target](p)


def is_activation(module: nn.Module) -> bool:
    """Whether a module is one of torch's elementwise activations."""
    return type(module) in ACTIVATION_MODULES and type(module) is not nn.Identity


def activation_of(node: fx.Node, module: nn.Module | None) -> tuple[Activation, Tensor | None] | None:
    """The activation that a node applies to its first argument, and trained slopes of PReLU; None if it does not."""
    if module is None:
        kind: Any = {"call_function": _FUNCTIONS, "call_method": _METHODS}.get(node.op, {}).get(node.target)
        try:
            module = kind and kind(*node.args[1:], **{k: v for k, v in node.kwargs.items() if k != "input"})
        except TypeError:
            return None
    if module is None or not is_activation(module):
        return None
    slope = module.weight.detach() if isinstance(module, nn.PReLU) else None
    resolved = resolve_activation(module)
    return None if resolved is None else (resolved, slope)


def in_place(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether an activation or sum overwrites its first argument."""
    if module is not None:
        return bool(getattr(module, "inplace", False))
    name = str(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", ""))
    return bool(name == "iadd" or name.endswith("_") or node.kwargs.get("inplace"))


def summands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two values that a node adds; None if it does something else."""
    plain = node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add)
    if not plain and not (node.op == "call_method" and node.target in ("add", "add_")):
        return None
    nodes = [arg for arg in node.args if isinstance(arg, fx.Node)]
    return (nodes[0], nodes[1]) if len(nodes) == len(node.args) == 2 and not node.kwargs else None


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
    attribute = node.op == "call_function" and node.target is getattr
    return attribute and node.args[1] in ("shape", "ndim", "dtype", "device")
