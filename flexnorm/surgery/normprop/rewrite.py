"""Put NormProp layers where linear maps, normalizations, activations and sums were, operation by operation.

Every value of the new network stands for one of the original (:mod:`~flexnorm.surgery.normprop.layers`). Where an
operation is not understood, the values that it reads are turned back into the original's by a scale and a shift, and it
is left as it was. So the network computes the same function whatever is understood of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from flexnorm.nn.normprop import Activation, ChannelAffine
from flexnorm.surgery._producers import LINEAR
from flexnorm.surgery._reading import RefusedError, is_candidate
from flexnorm.surgery.fold import as_affine
from flexnorm.surgery.normprop import graph as ops
from flexnorm.surgery.normprop import layers
from flexnorm.surgery.normprop.layers import HANDS_ON, Moments, ScaleShift, Tail, joined, passed
from flexnorm.surgery.plan import ConversionRow


class Options(NamedTuple):
    """What the user wants."""

    layer: Mapping[str, Any]  # constructor arguments of the NormProp layers
    keep_padding: bool  # pad with the values that stand for zero
    chosen: Callable[[str], bool]  # whether a module of that name may be replaced


class Rewriter:
    """One conversion, in place, of a model, whose modules are exchanged, and of its graph where that is not enough.

    ``stats`` is empty if nothing was measured. Afterwards ``rows`` has a report row per layer, and ``rewired`` says
    whether the graph differs from what the model's own forward does.
    """

    def __init__(self, network: ops.Network, stats: ops.Stats, options: Options) -> None:
        self.network, self.stats, self.options = network, stats, options
        self.model, self.shapes = network.model, network.shapes
        self.rows: list[ConversionRow] = []
        self.rewired = False
        self._scaling: dict[fx.Node, ScaleShift] = {}
        self._known: dict[fx.Node, Moments] = {}
        self._restored: dict[fx.Node, fx.Node] = {}
        self._done: set[fx.Node] = set()
        self._added = 0
        self._like = next((p for p in self.model.parameters() if p.is_floating_point()), torch.empty(0))

    def run(self) -> None:
        """Convert; RefusedError if an operation overwrites a value that is read afterwards."""
        self._refuse_overwriting()
        for node in list(self.network.graph.nodes):
            if node in self._done or node.op in ("placeholder", "get_attr") or ops.is_shape_query(node):
                continue
            module = self.network.module(node)
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
                self._row(node, status=status, reason=str(reason))

    def _refuse_overwriting(self) -> None:
        order = {node: index for index, node in enumerate(self.network.graph.nodes)}
        for node in order:
            module, before = self.network.module(node), _first(node)
            changes = ops.activation_of(node, module) or ops.summands(node)
            if before is None or not changes or not ops.in_place(node, module):
                continue
            if any(order[user] > order[node] for user in before.users):
                raise RefusedError(f"{self._name(node)} overwrites a value that is used after it")

    # -- the kinds of operations

    def _rule(self, node: fx.Node, module: nn.Module | None) -> Callable[[fx.Node, Any], None] | None:
        if isinstance(module, LINEAR):
            return self._linear
        if module is not None and is_candidate(module):
            return self._norm
        if ops.activation_of(node, module) is not None:
            return self._activation if _first(node) in self._scaling else None
        return self._sum if any(n in self._scaling for n in ops.summands(node) or ()) else None

    def _linear(self, node: fx.Node, module: Any) -> None:
        before = _first(node)
        if before is None or before not in self.shapes:
            raise RefusedError("its input is no single tensor")
        self.network.check(module)
        if type(module) not in LINEAR:
            raise RefusedError(f"{type(module).__name__} is a subclass of torch's layer")
        shape = self.shapes[before]
        if len(shape) != (2 if isinstance(module, nn.Linear) else module.weight.dim()):
            raise RefusedError(f"its input has {len(shape)} axes, not a batch of samples with channels on axis 1")
        scaling = self._scaling.get(before)
        linear = layers.through(module, scaling, shape, keep_padding=self.options.keep_padding)
        tail = self._tail(node)
        if tail is None:
            if scaling is not None:
                self._put(module, layers.plain_linear(module, linear))
            notes = ("its weight takes standardized input",) * (scaling is not None)
            self._row(node, status="keep", reason="no normalization, activation or sum after it", notes=notes)
            return
        moments = self._moments(node)
        if moments is None:
            norms = (_moments_before(self.network.module(user)) for user in node.users)
            moments = next((m for m in norms if m is not None and len(m.mean) == len(tail.scale)), None)
        new, self._scaling[node] = layers.linear_layer(module, linear, moments, tail, self.options.layer)
        _keep_frozen(new, module, self.network.module(tail.nodes[0]) if tail.nodes else None)
        self._put(module, new.train(module.training))
        notes = ("its unit filters are taken to yield unit variance",) * (moments is None)
        self._row(node, target=type(new).__name__, notes=notes)
        for follower in tail.nodes:
            self._row(follower, target=f"(part of {self._name(node)})")
            self._bypass(follower, node)

    def _tail(self, node: fx.Node) -> Tail | None:
        """What follows a linear map and goes into its layer; None if nothing does that wants standardized values."""
        channels = int(self.shapes[node][1])
        same = ScaleShift.identity(channels)
        tail, follower = Tail(same.scale, same.shift), _only_user(node)
        affine = None if follower is None else self._norm_affine(follower)
        if follower is not None and affine is not None and affine[0].numel() == channels:
            with contextlib.suppress(RefusedError):
                inner = _inner_activation(self.network.module(follower), follower)
                tail = Tail(*affine, [follower], *(inner or (None, None)))
                follower = None if inner else _only_user(follower)
        if follower is not None and (found := self._replaceable_activation(follower)) is not None:
            tail.activation, tail.slope = found
            tail.nodes.append(follower)
        return tail if tail.nodes or any(self._wants(user) for user in node.users) else None

    def _norm(self, node: fx.Node, module: nn.Module) -> None:
        self.network.check(module)
        scale, shift = (table.cpu() for table in as_affine(module))
        inner, before = _inner_activation(module, node), _first(node)
        if before is None or before not in self.shapes:
            raise RefusedError("its input is no single tensor")
        if bool((scale == 0).any()):
            raise RefusedError("a scale of it is zero, and there is no linear map directly before it")
        old = self._scaling.get(before, ScaleShift.identity(scale.numel()))
        after = ScaleShift(scale * old.scale, scale * old.shift + shift)
        moments = self._moments(before) or _moments_before(module)
        known = None if moments is None else Moments(scale * moments.mean + shift, scale.abs() * moments.std)
        if inner is not None:
            self._put_activation(node, module, after, known, inner)
            return
        self._scaling[node] = after
        if known is not None:
            self._known[node] = known
        self._bypass(node, before)
        self._row(node, target="(taken into its neighbours)")

    def _activation(self, node: fx.Node, module: nn.Module | None) -> None:
        before, found = _first(node), ops.activation_of(node, module)
        if before is None or found is None:
            raise RefusedError("its input is no single tensor")
        if module is not None and (module._forward_hooks or module._forward_pre_hooks):
            raise RefusedError("it has hooks")
        moments = self._moments(before) or self._known.get(before)
        self._put_activation(node, module, self._scaling[before], moments, found)

    def _put_activation(
        self,
        node: fx.Node,
        module: nn.Module | None,
        scaling: ScaleShift,
        moments: Moments | None,
        activation: tuple[Activation, Tensor | None],
    ) -> None:
        spatial = len(self.shapes[node]) - 2
        new, after = layers.activation_layer(scaling, moments, activation, spatial, self._like, self.options.layer)
        new.train(self.model.training if module is None else module.training)
        if module is not None and is_candidate(module):
            _keep_frozen(new, module, module)
        if module is not None and self.network.once(module):
            self._put(module, new)
        else:
            self._call(node, new, (_first(node),))
        self._scaling[node] = after
        self._row(node, module, target=type(new).__name__)

    def _sum(self, node: fx.Node, _: nn.Module | None) -> None:
        pair = ops.summands(node)
        if pair is None or any(self.shapes.get(n) != self.shapes[node] for n in pair) or len(self.shapes[node]) < 2:
            raise RefusedError("its summands have different shapes")
        channels, spatial = int(self.shapes[node][1]), len(self.shapes[node]) - 2
        first, second = (self._scaling.get(n, ScaleShift.identity(channels)) for n in pair)
        new, self._scaling[node] = layers.add_layer(first, second, self._moments(node), spatial, self._like)
        self._call(node, new.train(self.model.training), pair)
        self._row(node, None, target=type(new).__name__)

    def _pass(self, node: fx.Node, module: nn.Module | None) -> bool:
        """Let an operation work on standardized values, if it can; whether it does."""
        after: ScaleShift | None
        if ops.is_cat(node):
            parts: Any = node.args[0]
            if not all(isinstance(part, fx.Node) for part in parts):
                return False
            after = joined([self._scaling.get(p) for p in parts], [int(self.shapes[p][1]) for p in parts])
        else:
            before = _first(node)
            scaled = [n for n in node.all_input_nodes if n in self._scaling]
            if before is None or scaled != [before]:
                return not scaled
            after, dropout = self._scaling[before], ops.dropout_of(node)
            if dropout is not None:
                self._call(node, dropout.train(self.model.training), (before,))
            else:
                after = passed(node, module, after, self.shapes[before], self.shapes.get(node))
                if after is None:
                    return False
        if after is not None:
            self._scaling[node] = after
        return True

    # -- what is known

    def _norm_affine(self, node: fx.Node) -> tuple[Tensor, Tensor] | None:
        module = self.network.module(node)
        if module is None or not is_candidate(module) or not self.options.chosen(self._name(node)):
            return None
        with contextlib.suppress(RefusedError):
            self.network.check(module)
            scale, shift = as_affine(module)
            return scale.cpu(), shift.cpu()
        return None

    def _replaceable_activation(self, node: fx.Node) -> tuple[Activation, Tensor | None] | None:
        module = self.network.module(node)
        if module is not None:
            hooked = module._forward_hooks or module._forward_pre_hooks
            if hooked or not self.options.chosen(self._name(node)):
                return None
        return ops.activation_of(node, module)

    def _wants(self, node: fx.Node) -> bool:
        """Whether an operation is better fed with standardized values."""
        module = self.network.module(node)
        activation = ops.activation_of(node, module) is not None
        if activation or ops.summands(node) is not None or self._norm_affine(node) is not None:
            return True
        # A pooling or concatenation hands on what it gets.
        neutral = ops.is_cat(node) or type(module) in HANDS_ON
        return neutral and any(self._wants(user) for user in node.users)

    def _moments(self, node: fx.Node) -> Moments | None:
        found = self.stats.get(node.name)
        return None if found is None else Moments(found[0], found[1].sqrt())

    # -- edits

    def _put(self, old: nn.Module, new: nn.Module) -> None:
        """Hang a module into all places of another."""
        for name in self.network.names[id(old)]:
            parent, _, key = name.rpartition(".")
            self.model.get_submodule(parent)._modules[key] = new

    def _bypass(self, node: fx.Node, before: fx.Node) -> None:
        """Let a node do nothing."""
        module = self.network.module(node)
        self._done.add(node)
        self._scaling.setdefault(node, self._scaling.get(before, ScaleShift.identity(1)))
        if module is not None and self.network.once(module):
            self._put(module, nn.Identity().train(module.training))
        else:
            self._call(node, nn.Identity(), (before,))

    def _add(self, new: nn.Module) -> str:
        self.rewired = True
        self._added += 1
        self.model.add_module(f"normprop_{self._added}", new)
        return f"normprop_{self._added}"

    def _call(self, node: fx.Node, new: nn.Module, args: tuple[Any, ...]) -> None:
        """Turn a node into the call of a new module."""
        node.op, node.target, node.args, node.kwargs = "call_module", self._add(new), args, {}

    def _restore_inputs(self, node: fx.Node) -> None:
        """Give an operation that stays as it is the values that the original gave it."""
        for before in node.all_input_nodes:
            if before in self._scaling and before not in self._restored:
                scaling, spatial = self._scaling[before], len(self.shapes[before]) - 2
                affine = ChannelAffine(spatial, self._like.dtype, scale=scaling.scale, shift=scaling.shift)
                name = self._add(affine.to(self._like.device).train(self.model.training))
                with self.network.graph.inserting_after(before):
                    self._restored[before] = self.network.graph.call_module(name, (before,))
            if before in self._scaling:
                node.replace_input_with(before, self._restored[before])

    # -- report

    def _name(self, node: fx.Node) -> str:
        return str(node.target) if node.op == "call_module" else node.name

    def _row(self, node: fx.Node, *module: nn.Module | None, **fields: Any) -> None:
        (called,) = module or (self.network.module(node),)
        names = (node.name,) if called is None else tuple(self.network.names[id(called)])
        kind = node.name.rstrip("_0123456789") if called is None else type(called).__name__
        self.rows.append(ConversionRow(names[0], names, kind, effect="", **fields))


def _first(node: fx.Node) -> fx.Node | None:
    """The value that an operation works on: its first argument."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    return first if isinstance(first, fx.Node) else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _inner_activation(module: nn.Module | None, node: fx.Node) -> tuple[Activation, Tensor | None] | None:
    """The activation inside of a normalization, None if there is none."""
    act, drop = (None if module is None else module._modules.get(name) for name in ("act", "drop"))
    if act is None or type(act) is nn.Identity:
        return None
    if not ops.is_activation(act) or not (drop is None or type(drop) is nn.Identity):
        raise RefusedError("its activation is not known")
    return ops.activation_of(node, act)


def _moments_before(module: nn.Module | None) -> Moments | None:
    """What the running statistics of a normalization say about its input."""
    if module is None or not is_candidate(module):
        return None
    mean, var = (module._buffers.get(name) for name in ("running_mean", "running_var"))
    if mean is None or var is None:
        return None
    return Moments(mean.double().cpu(), (var.double().cpu() + float(module.eps)).sqrt())  # type: ignore[arg-type]


def _keep_frozen(new: nn.Module, linear: nn.Module, norm: nn.Module | None) -> None:
    affine = norm if norm is not None and norm._parameters.get("weight") is not None else linear
    for name, owner, old in (("weight", linear, "weight"), ("gamma", affine, "weight"), ("bias", affine, "bias")):
        own, other = new._parameters.get(name), owner._parameters.get(old)
        if own is not None and other is not None:
            own.requires_grad_(other.requires_grad)
