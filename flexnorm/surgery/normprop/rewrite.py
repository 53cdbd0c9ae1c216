"""Walk over the graph of a model and put NormProp layers where linear maps, normalizations, activations and sums were.

Every value of the new network stands for one of the original (:mod:`~flexnorm.surgery.normprop.carry`). Where an
operation is not understood, the values that it reads are turned back into the original's by a scale and a shift, and it
is left as it was. So the network computes the same function whatever the walk understands of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from flexnorm.nn.normprop import ChannelAffine
from flexnorm.surgery._affine import as_affine
from flexnorm.surgery._producers import LINEAR
from flexnorm.surgery._reading import RefusedError, is_candidate
from flexnorm.surgery.normprop import operations as ops
from flexnorm.surgery.normprop.carry import HANDS_ON, Carry, joined, passed
from flexnorm.surgery.normprop.layers import (
    Moments,
    activation_layer,
    add_layer,
    linear_layer,
    plain_linear,
    through,
)
from flexnorm.surgery.normprop.trace import Stats, dropout_module, functional_dropout
from flexnorm.surgery.plan import ConversionRow

__all__ = ["Options", "Rewriter"]


@dataclass(frozen=True)
class Options:
    """What the user wants.

    Attributes:
        layer: Constructor arguments of the NormProp layers.
        keep_padding: Pad with the values that stand for zero.
        chosen: Whether a module of that name may be replaced.
    """

    layer: Mapping[str, Any] = field(default_factory=dict)
    keep_padding: bool = True
    chosen: Callable[[str], bool] = lambda _: True


@dataclass
class _Tail:
    """What follows a linear map and is taken into its layer: a normalization, an activation, or both."""

    nodes: list[fx.Node]
    affine: tuple[Tensor, Tensor]
    activation: Any = None
    slope: Tensor | None = None


class Rewriter:
    """One conversion, in place, of a model and its graph.

    Args:
        model: The model; its modules are exchanged.
        graph: Its graph; edited where exchanging modules is not enough (:attr:`rewired`).
        shapes: Of the values.
        stats: Measured moments of the values by name of node, empty if nothing was measured.
        options: What the user wants.

    Attributes:
        rows: A report row per layer.
        rewired: Whether the graph differs from what the model's own forward does.
    """

    def __init__(
        self, model: nn.Module, graph: fx.Graph, shapes: Mapping[fx.Node, torch.Size], stats: Stats, options: Options
    ) -> None:
        self.model, self.graph, self.shapes, self.stats, self.options = model, graph, shapes, stats, options
        self.modules = ops.Modules(model, graph)
        self.rows: list[ConversionRow] = []
        self.rewired = False
        self._carry: dict[fx.Node, Carry] = {}
        self._known: dict[fx.Node, Moments] = {}
        self._restored: dict[fx.Node, fx.Node] = {}
        self._done: set[fx.Node] = set()
        self._added = 0
        self._like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))

    def run(self) -> None:
        """Do it.

        Raises:
            RefusedError: If an operation overwrites a value that is read afterwards.
        """
        self._refuse_overwriting()
        for node in list(self.graph.nodes):
            if node in self._done or node.op in ("placeholder", "get_attr") or ops.is_shape_query(node):
                continue
            module = self.modules.of(node)
            rule = self._rule(node, module)
            try:
                if rule is not None:
                    if module is not None and not self.options.chosen(self._name(node)):
                        raise RefusedError("excluded")
                    rule(node, module)
                elif not self._pass(node, module):
                    self._restore_inputs(node)
            except RefusedError as reason:
                self._restore_inputs(node)
                status = "keep" if str(reason) == "excluded" else "refuse"
                self._row(node, module, status=status, reason=str(reason))

    def _refuse_overwriting(self) -> None:
        order = {node: index for index, node in enumerate(self.graph.nodes)}
        for node in self.graph.nodes:
            module, source = self.modules.of(node), self._source(node)
            changes = ops.activation_of(node, module) or ops.summands(node)
            if source is None or not changes or not ops.in_place(node, module):
                continue
            if any(order[user] > order[node] for user in source.users):
                raise RefusedError(f"{self._name(node)} overwrites a value that is used after it")

    # -- the kinds of operations

    def _rule(self, node: fx.Node, module: nn.Module | None) -> Callable[[fx.Node, nn.Module | None], None] | None:
        if isinstance(module, LINEAR):
            return self._linear
        if module is not None and is_candidate(module):
            return self._norm
        if ops.activation_of(node, module) is not None:
            return self._activation if self._source(node) in self._carry else None
        pair = ops.summands(node)
        if pair is not None and any(n in self._carry for n in pair):
            return self._sum
        return None

    def _linear(self, node: fx.Node, module: nn.Module | None) -> None:
        source = self._source(node)
        if module is None or source is None or source not in self.shapes:
            raise RefusedError("its input is no single tensor")
        self.modules.check(module)
        if type(module) not in LINEAR:
            raise RefusedError(f"{type(module).__name__} is a subclass of torch's layer")
        shape = self.shapes[source]
        if len(shape) != (2 if isinstance(module, nn.Linear) else module.weight.dim()):  # type: ignore[operator]
            raise RefusedError(f"its input has {len(shape)} axes, not a batch of samples with channels on axis 1")
        carry = self._carry.get(source)
        linear = through(module, carry, shape, keep_padding=self.options.keep_padding)
        tail = self._tail(node)
        if tail is None:
            notes: tuple[str, ...] = ()
            if carry is not None:
                self._put(node, plain_linear(module, linear))
                notes = ("its weight takes standardized input",)
            why = "no normalization, activation or sum after it"
            self._row(node, module, status="keep", reason=why, notes=notes)
            return
        moments = self._moments(node)
        if moments is None:
            norms = (self._moments_before(self.modules.of(user)) for user in node.users)
            moments = next((m for m in norms if m is not None and len(m.mean) == len(tail.affine[0])), None)
        new, after = linear_layer(module, linear, moments, tail.activation, tail.affine, tail.slope, self.options.layer)
        new.train(module.training)
        norm = self.modules.of(tail.nodes[0]) if tail.nodes else None
        _trainable(new, module, norm)
        self._put(node, new)
        self._carry[node] = after
        notes = () if moments is not None else ("its unit filters are taken to yield unit variance",)
        self._row(node, module, target=type(new).__name__, notes=notes)
        for follower in tail.nodes:
            self._row(follower, self.modules.of(follower), target=f"(part of {self._name(node)})")
            self._bypass(follower, node)

    def _tail(self, node: fx.Node) -> _Tail | None:
        """What follows a linear map and goes into its layer; None if nothing does that wants standardized values."""
        out = int(self.shapes[node][1])
        tail = _Tail([], (torch.ones(out, dtype=torch.float64), torch.zeros(out, dtype=torch.float64)))
        last = node
        follower = self._only_user(last)
        if follower is not None and self._norm_affine(follower) is not None:
            norm = self.modules.of(follower)
            affine, act = self._norm_affine(follower) or tail.affine, self._inner_activation(norm)
            if affine[0].numel() == out and act is not False:
                tail.nodes.append(follower)
                tail.affine = affine
                if act is not None:
                    tail.activation, tail.slope = act
                    return tail
                last, follower = follower, self._only_user(follower)
        if follower is not None and self._replaceable_activation(follower):
            found = ops.activation_of(follower, self.modules.of(follower))
            if found is not None:
                tail.activation, tail.slope = found
                tail.nodes.append(follower)
                return tail
        return tail if tail.nodes or any(self._wants(user) for user in node.users) else None

    def _norm(self, node: fx.Node, module: nn.Module | None) -> None:
        if module is None:
            return
        self.modules.check(module)
        scale, shift = as_affine(module)
        inner = self._inner_activation(module)
        source = self._source(node)
        if source is None or inner is False or source not in self.shapes:
            raise RefusedError("its activation is not known")
        if bool((scale == 0).any()):
            raise RefusedError("a scale of it is zero, and there is no linear map directly before it")
        before = self._carry.get(source, Carry.identity(scale.numel()))
        scale, shift = scale.cpu(), shift.cpu()
        after = Carry(scale * before.scale, scale * before.shift + shift)
        own = self._moments_before(module)
        moments = self._moments(source) or own
        known = None if moments is None else Moments(scale * moments.mean + shift, scale.abs() * moments.std)
        if inner is None:
            self._carry[node] = after
            if known is not None:
                self._known[node] = known
            self._bypass(node, source)
            self._row(node, module, target="(taken into its neighbours)")
            return
        new, out = activation_layer(
            after, known, inner[0], inner[1], len(self.shapes[node]) - 2, self._like, self.options.layer
        )
        _trainable(new, module, module)
        self._put(node, new.train(module.training))
        self._carry[node] = out
        self._row(node, module, target=type(new).__name__)

    def _activation(self, node: fx.Node, module: nn.Module | None) -> None:
        source = self._source(node)
        found = ops.activation_of(node, module)
        if source is None or found is None:
            raise RefusedError("its input is no single tensor")
        if module is not None and (module._forward_hooks or module._forward_pre_hooks):
            raise RefusedError("it has hooks")
        moments = self._moments(source) or self._known.get(source)
        new, after = activation_layer(
            self._carry[source], moments, *found, len(self.shapes[node]) - 2, self._like, self.options.layer
        )
        new.train(self.model.training if module is None else module.training)
        if module is not None and self.modules.once(module):
            self._put(node, new)
        else:
            self._call(node, new, (source,))
        self._carry[node] = after
        self._row(node, module, target=type(new).__name__)

    def _sum(self, node: fx.Node, _: nn.Module | None) -> None:
        pair = ops.summands(node)
        if pair is None or any(self.shapes.get(n) != self.shapes[node] for n in pair) or len(self.shapes[node]) < 2:
            raise RefusedError("its summands have different shapes")
        channels = int(self.shapes[node][1])
        first, second = (self._carry.get(n, Carry.identity(channels)) for n in pair)
        new, after = add_layer(first, second, self._moments(node), len(self.shapes[node]) - 2, self._like)
        self._call(node, new.train(self.model.training), pair)
        self._carry[node] = after
        self._row(node, None, target=type(new).__name__)

    def _pass(self, node: fx.Node, module: nn.Module | None) -> bool:
        """Let an operation work on standardized values, if it can; whether it does."""
        if ops.is_cat(node):
            parts = node.args[0]
            if not isinstance(parts, (tuple, list)) or not all(isinstance(p, fx.Node) for p in parts):
                return False
            nodes = [p for p in parts if isinstance(p, fx.Node)]
            after = joined([self._carry.get(p) for p in nodes], [int(self.shapes[p][1]) for p in nodes])
        else:
            source = self._source(node)
            tensors = [n for n in node.all_input_nodes if n in self._carry]
            if source is None or tensors != [source]:
                return not tensors
            carry, shape = self._carry[source], self.shapes[source]
            if functional_dropout(node):
                self._call(node, dropout_module(node).train(self.model.training), (source,))
                after = carry
            else:
                found = passed(node, module, carry, shape, self.shapes.get(node))
                if found is None:
                    return False
                after = found
        if after is not None:
            self._carry[node] = after
        return True

    # -- what is known

    def _source(self, node: fx.Node) -> fx.Node | None:
        first = node.args[0] if node.args else node.kwargs.get("input")
        return first if isinstance(first, fx.Node) else None

    def _only_user(self, node: fx.Node) -> fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    def _norm_affine(self, node: fx.Node) -> tuple[Tensor, Tensor] | None:
        module = self.modules.of(node)
        if module is None or not is_candidate(module) or not self.options.chosen(self._name(node)):
            return None
        try:
            self.modules.check(module)
            scale, shift = as_affine(module)
        except RefusedError:
            return None
        return scale.cpu(), shift.cpu()

    def _inner_activation(self, module: nn.Module | None) -> Any:
        """The activation inside of a normalization: None if there is none, False if it is not known."""
        act = None if module is None else module._modules.get("act")
        if act is None or type(act) is nn.Identity:
            return None
        drop = None if module is None else module._modules.get("drop")
        if not ops.known_activation(act) or not (drop is None or type(drop) is nn.Identity):
            return False
        node = next(iter(self.graph.nodes))
        return ops.activation_of(node, act)

    def _replaceable_activation(self, node: fx.Node) -> bool:
        module = self.modules.of(node)
        if ops.activation_of(node, module) is None:
            return False
        if module is None:
            return True
        return self.options.chosen(self._name(node)) and not module._forward_hooks and not module._forward_pre_hooks

    def _wants(self, node: fx.Node) -> bool:
        """Whether an operation is better fed with standardized values."""
        module = self.modules.of(node)
        norm = self._norm_affine(node) is not None
        if norm or ops.summands(node) is not None or ops.activation_of(node, module) is not None:
            return True
        # A pooling or concatenation hands on what it gets.
        neutral = ops.is_cat(node) or (module is not None and type(module) in HANDS_ON)
        return neutral and any(self._wants(user) for user in node.users)

    def _moments(self, node: fx.Node) -> Moments | None:
        found = self.stats.get(node.name)
        return None if found is None else Moments(found[0], found[1].sqrt())

    def _moments_before(self, module: nn.Module | None) -> Moments | None:
        """What the running statistics of a normalization say about its input."""
        if module is None or not is_candidate(module):
            return None
        mean, var = (module._buffers.get(name) for name in ("running_mean", "running_var"))
        if mean is None or var is None:
            return None
        return Moments(mean.double().cpu(), (var.double().cpu() + float(module.eps)).sqrt())  # type: ignore[arg-type]

    # -- edits

    def _put(self, node: fx.Node, new: nn.Module) -> None:
        """Hang a module into all places of the one that a node calls."""
        old = self.modules.of(node)
        for name in self.modules.names[id(old)]:
            self._set(name, new)

    def _set(self, name: str, new: nn.Module) -> None:
        parent, _, key = name.rpartition(".")
        self.model.get_submodule(parent)._modules[key] = new

    def _bypass(self, node: fx.Node, source: fx.Node) -> None:
        """Let a node do nothing."""
        module = self.modules.of(node)
        self._done.add(node)
        self._carry.setdefault(node, self._carry.get(source, Carry.identity(1)))
        if module is not None and self.modules.once(module):
            self._put(node, nn.Identity().train(module.training))
            return
        self._call(node, nn.Identity(), (source,))

    def _call(self, node: fx.Node, new: nn.Module, args: tuple[fx.Node, ...]) -> None:
        """Turn a node into the call of a new module."""
        self.rewired = True
        self._added += 1
        name = f"normprop_{self._added}"
        self.model.add_module(name, new)
        node.op, node.target, node.args, node.kwargs = "call_module", name, args, {}

    def _restore_inputs(self, node: fx.Node) -> None:
        """Give an operation that stays as it is the values that the original gave it."""
        for source in node.all_input_nodes:
            if source in self._carry:
                node.replace_input_with(source, self._restore(source))

    def _restore(self, source: fx.Node) -> fx.Node:
        if source not in self._restored:
            carry = self._carry[source]
            self.rewired = True
            self._added += 1
            name = f"normprop_{self._added}"
            spatial = len(self.shapes[source]) - 2
            affine = ChannelAffine(spatial, self._like.dtype, scale=carry.scale, shift=carry.shift).to(
                self._like.device
            )
            self.model.add_module(name, affine.train(self.model.training))
            with self.graph.inserting_after(source):
                self._restored[source] = self.graph.call_module(name, (source,))
        return self._restored[source]

    # -- report

    def _name(self, node: fx.Node) -> str:
        return str(node.target) if node.op == "call_module" else node.name

    def _row(self, node: fx.Node, module: nn.Module | None, **fields: Any) -> None:
        names = (node.name,) if module is None else tuple(self.modules.names[id(module)])
        source = node.name.rstrip("_0123456789") if module is None else type(module).__name__
        self.rows.append(ConversionRow(names[0], names, source, effect="", **fields))


def _trainable(new: nn.Module, linear: nn.Module, norm: nn.Module | None) -> None:
    """Keep frozen what was frozen."""
    weight = linear._parameters.get("weight")
    if "weight" in new._parameters and weight is not None:
        new.get_parameter("weight").requires_grad_(weight.requires_grad)
    owner = norm if norm is not None and norm._parameters.get("weight") is not None else linear
    for name, old in (("gamma", "weight"), ("bias", "bias")):
        own, other = new._parameters.get(name), owner._parameters.get(old)
        if own is not None and other is not None:
            own.requires_grad_(other.requires_grad)
