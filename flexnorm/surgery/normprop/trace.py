"""The graph of a model for a conversion: traced in both modes, with the shape of every value and measured moments."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from flexnorm.nn.normprop import NormPropActivation, NormPropAdd
from flexnorm.probe import arguments, batch_inputs, isolated, map_tensors
from flexnorm.statistics import Pool
from flexnorm.surgery._producers import _Tracer
from flexnorm.surgery._reading import RefusedError

__all__ = ["Stats", "dropout_module", "functional_dropout", "measure", "shapes", "trace"]

Stats = dict[str, tuple[Tensor, Tensor]]
"""Mean and biased variance (C,) of a value over samples and positions, by the name of its node; float64."""

_DROPOUTS: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
}


class _Leaves(_Tracer):
    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return isinstance(m, (NormPropActivation, NormPropAdd)) or super().is_leaf_module(m, qualified_name)


def functional_dropout(node: fx.Node) -> bool:
    """Whether a node is a call of one of torch's dropout functions, whose ``training`` tracing turns into a number."""
    return node.op == "call_function" and node.target in _DROPOUTS


def dropout_module(node: fx.Node) -> nn.Module:
    """The module for a call of a dropout function, which follows the training flag."""
    p: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
    return _DROPOUTS[node.target](p)


def trace(model: nn.Module) -> fx.Graph:
    """The model's operations, in evaluation mode.

    Raises:
        RefusedError: If it cannot be traced, or does something else in training; the text says why.
    """
    try:
        graphs = [_trace(model, training) for training in (False, True)]
    except Exception as error:
        # Tracing runs the user's code on proxies: anything can happen.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RefusedError(f"the model cannot be traced ({lines[0]})") from error
    if _text(graphs[0]) != _text(graphs[1]):
        raise RefusedError("its forward does something else in training than in evaluation")
    return graphs[0]


def _trace(model: nn.Module, training: bool) -> fx.Graph:
    with isolated(model, 0):
        model.train(training)
        return _Leaves().trace(model)


def _text(graph: fx.Graph) -> list[str]:
    lines = []
    for node in graph.nodes:
        args, kwargs = node.args, dict(node.kwargs)
        if functional_dropout(node):
            args, kwargs = args[:2], {k: v for k, v in kwargs.items() if k != "training"}
        lines.append(f"{node.name} {node.op} {node.target} {args} {kwargs}")
    return lines


def positional(graph: fx.Graph, model: nn.Module, example: Any) -> list[Any]:
    """The values of the graph's placeholders for an example: a tensor, positional or keyword arguments."""
    args, kwargs = arguments(example)
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    if len(bound.arguments) != sum(node.op == "placeholder" for node in graph.nodes):
        raise RefusedError("its forward takes *args or **kwargs")
    return list(bound.arguments.values())


class _Watcher(fx.Interpreter):
    """Runs a graph on the modules of the model and shows the value of every node."""

    def __init__(self, model: nn.Module, graph: fx.Graph, look: Any) -> None:
        super().__init__(model, garbage_collect_values=True, graph=graph)
        self.look = look

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.look(n, value)
        return value


def shapes(model: nn.Module, graph: fx.Graph, example: Any) -> dict[fx.Node, torch.Size]:
    """Shape of every value that is a tensor, for an example input in evaluation."""
    found: dict[fx.Node, torch.Size] = {}

    def look(node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor):
            found[node] = value.shape

    with isolated(model, 0):
        model.eval()
        _Watcher(model, graph, look).run(*positional(graph, model, example))
    return found


def measure(model: nn.Module, graph: fx.Graph, nodes: Iterable[fx.Node], batches: Iterable[Any]) -> Stats:
    """Mean and variance per channel (axis 1) of the values of some nodes, over all batches, in evaluation.

    Args:
        model: The model.
        graph: Its graph.
        nodes: Which values.
        batches: Tensors, or tuples and lists whose first element is the input (the rest are targets), or mappings of
            keyword arguments.

    Raises:
        ValueError: If there is no batch.
        RuntimeError: If a value is not finite.
    """
    wanted, pools = set(nodes), dict[str, Pool]()
    first = next((t for t in (*model.parameters(), *model.buffers())), torch.empty(0))

    def look(node: fx.Node, value: Any) -> None:
        if node not in wanted or not isinstance(value, Tensor) or not value.numel():
            return
        # An in-place operation may come next, but only after this look.
        pools.setdefault(node.name, Pool(value.shape[1], value.device)).add_values(value)

    seen = 0
    with isolated(model, 0):
        model.eval()
        for batch in batches:
            moved = map_tensors(lambda tensor: tensor.to(first.device), batch_inputs(batch))
            _Watcher(model, graph, look).run(*positional(graph, model, moved))
            seen += 1
    if not seen:
        raise ValueError("batches is empty: there is nothing to measure")
    for name, pool in pools.items():
        if not bool(pool.finite.all()):
            raise RuntimeError(f"the values at {name} are not finite for some of the batches")
    return {name: (pool.mean.cpu().double(), pool.var.cpu().double()) for name, pool in pools.items()}
