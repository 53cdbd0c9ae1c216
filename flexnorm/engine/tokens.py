"""Tokens: each position of an activation by itself, R of them, as in transformers, perceptrons and graph networks.

The graph of one call is ``x -> _Reduce -> ... -> rule -> _Affine -> y``: one node for each kind of moments that the
rule asks for (of each token, of the batch), in a chain along which ``x`` passes, so that the gradient of the output
comes back along it and every node adds its part. Moments and tables are (R, 1) or (1, C), never (R, C), unless the rule
itself makes them so: then the whole is composed of torch's operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor

from flexnorm.engine.factored import Factored
from flexnorm.engine.moments import Moments, broadcasts, check_groups, pool_positions
from flexnorm.kernels import rowwise, tokens
from flexnorm.kernels.layout import Layout, table_dtype
from flexnorm.kernels.passes import gradients, must_compose
from flexnorm.kernels.rowwise import Slopes
from flexnorm.kernels.tables import Pair
from flexnorm.kernels.tokens import Source, Terms

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_Pending: TypeAlias = "list[Terms] | None"
_Table: TypeAlias = "Terms | Tensor"

Kind: TypeAlias = tuple[str, int]
"""Of what: "token" (in so many groups of its channels), "batch", or "squares" of a token, about zero."""


class _Reduce(torch.autograd.Function):
    """Moments of the tokens or of the batch, and x itself for whatever comes after."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kind: Kind, weights: Tensor | None, layout: Layout, pending: list[Terms]
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = _moments(x, kind, weights, layout)
        ctx.save_for_backward(x, mean, weights)
        ctx.set_materialize_grads(False)
        ctx.kind, ctx.layout, ctx.pending = kind, layout, pending
        return mean, var, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dmean: Tensor | None, dvar: Tensor | None, g: Tensor | None) -> tuple[Tensor | None, ...]:
        x, mean, weights = ctx.saved_tensors
        layout, (of, groups) = ctx.layout, ctx.kind
        scale = ctx.pending.pop() if ctx.pending else None
        if must_compose(dmean, dvar, g):

            def compose(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                return (*_composed(tokens.matrix(v, layout).to(mean.dtype), (of, groups), weights), v)

            (dx,) = gradients(compose, [x], [True], (dmean, dvar, g))
            return dx, None, None, None, None
        if g is not None and g.stride() != x.stride():
            g = torch.empty_like(x).copy_(g)  # the kernels walk both alike
        if dmean is None and dvar is None:
            return (g if g is None or scale is None else tokens.affine(g, scale, (), layout)), None, None, None, None
        samples, channels, positions = layout.size
        size: float | Tensor = samples * positions if of == "batch" else channels / groups
        if of == "batch" and weights is not None:
            size = weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)
        source = Source(mean, dmean, dvar, size, weights if of == "batch" else None)
        g = torch.zeros_like(x) if g is None else g
        rows, columns = (None, source) if of == "batch" else (source, None)
        return tokens.combine(g, x, scale, rows, columns, layout), None, None, None, None


def _moments(x: Tensor, kind: Kind, weights: Tensor | None, layout: Layout) -> Pair:
    """Means and biased variances; of "squares", second moments about zero, in the place of variances."""
    of, groups = kind
    if of == "batch":
        return tokens.column_moments(x, layout, weights)
    mean, var = tokens.row_moments(x, layout, groups)
    return (torch.zeros_like(mean), torch.addcmul(var, mean, mean)) if of == "squares" else (mean, var)


def _composed(values: Tensor, kind: Kind, weights: Tensor | None) -> Pair:
    """As :func:`_moments`, of a matrix (R, C), by differentiable operations; zeros where nothing counts."""
    of, groups = kind
    if of != "batch":
        split = values.reshape(values.shape[0], groups, values.shape[1] // groups)
        if values.numel() == 0:
            return split.sum(2), split.sum(2)
        if of == "squares":
            return values.new_zeros(()), split.square().mean(2)
        var, mean = torch.var_mean(split, 2, correction=0)
        return mean, var
    if weights is None:
        if values.numel() == 0:
            zeros = values.sum(0, keepdim=True)
            return zeros, zeros
        var, mean = torch.var_mean(values, 0, correction=0, keepdim=True)
        return mean, var
    total = weights.sum()
    share = (weights / torch.where(total > 0, total, 1)).unsqueeze(1)
    values = torch.where(share > 0, values, 0)
    mean = (share * values).sum(0, keepdim=True)
    return mean, (share * (values - mean).square()).sum(0, keepdim=True)


class _Affine(torch.autograd.Function):
    """``y = scale * x + shift``; ``pending`` takes the scale still to be applied to the gradient of x."""

    @staticmethod
    def forward(
        ctx: Any,
        through: Tensor,  # noqa: ARG004 - the same values; only this node may use it, so that its gradient is its own
        x: Tensor,
        center: Tensor | None,
        layout: Layout,
        pending: _Pending,
        shape: str,
        slopes: Slopes | None,
        *factors: Tensor,
    ) -> Tensor:
        ctx.own = slopes is not None
        ctx.save_for_backward(x, center, *(slopes or ()), *factors)
        ctx.layout, ctx.pending, ctx.shape = layout, pending, shape
        return tokens.affine(x, *_unflatten(shape, factors), layout)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, center, *factors = ctx.saved_tensors
        slopes = Slopes(*factors[:4]) if ctx.own else None
        factors = factors[4:] if ctx.own else factors
        layout, needed, shape = ctx.layout, ctx.needs_input_grad, ctx.shape
        nothing = (None,) * 6
        if ctx.pending is not None:
            ctx.pending.clear()
        if must_compose(g):

            def compose(v: Tensor, *parts: Tensor) -> Tensor:
                scale, shift = (_sum(terms, layout.size[1]) for terms in _unflatten(shape, parts))
                values = tokens.matrix(v, layout)
                return tokens.like(values.to(table_dtype(v.dtype)) * scale + shift, v, layout)

            of_x, *found = gradients(compose, [x, *factors], [needed[0], *needed[7:]], (g,))
            return of_x, *nothing, *found
        if g.stride() != x.stride():
            g = torch.empty_like(x).copy_(g)  # the kernels walk both alike
        scale, shift = _unflatten(shape, factors)
        if slopes is not None:
            columns = [need and kind == "c" for need, kind in zip(needed[7:], _kinds(shape), strict=True)]
            of_x, of_k, of_b = rowwise.backward(g, x, center, scale, shift, slopes, any(columns), layout)
            # The column of the scale stands in the shift again, where its gradient is already in.
            firsts = _first_columns(shape)
            given = {firsts[0]: of_k, firsts[1]: of_b}
            return of_x, *nothing, *(given.get(i) if need else None for i, need in enumerate(columns))
        grads: list[Tensor | None] = [None] * len(factors)
        if any(needed[7:]):
            of_scale, of_shift = tokens.sums(g, x, center, scale, shift, layout)
            grads = [t for term in (*of_scale, *of_shift) for t in term if t is not None]
            grads = [t if need else None for t, need in zip(grads, needed[7:], strict=True)]
        dx: Tensor | None = None
        if needed[0] and ctx.pending is None:
            dx = tokens.affine(g, scale, (), layout)
        elif needed[0]:
            ctx.pending.append(scale)
            dx = g
        return dx, *nothing, *grads


def _sum(terms: Terms, channels: int) -> Tensor | float:
    return sum(tokens.expanded(term, channels) for term in terms)


def _flatten(scale: Terms, shift: Terms) -> tuple[str, list[Tensor]]:
    """The factors there are, and where they stand: a letter for each term, a bar between scale and shift."""
    kinds = ["".join("c" if r is None else "r" if c is None else "b" for r, c in terms) for terms in (scale, shift)]
    return "|".join(kinds), [t for term in (*scale, *shift) for t in term if t is not None]


def _kinds(shape: str) -> str:
    """Of each factor, whether it is a "r"ow of numbers per token or a "c"olumn per channel."""
    return shape.replace("|", "").replace("b", "rc")


def _first_columns(shape: str) -> tuple[int, int]:
    """Where the column of the scale stands among the factors, and the one that stands by itself in the shift; or -1."""
    scale, shift = shape.split("|")
    at = len(_kinds(scale))
    alone = shift.find("c")
    return (at - 1 if "b" in scale else -1), (at + len(_kinds(shift[:alone])) if alone >= 0 else -1)


def _unflatten(shape: str, factors: Sequence[Tensor]) -> tuple[Terms, Terms]:
    rest = iter(factors)
    scale, shift = (
        tuple((next(rest) if kind in "br" else None, next(rest) if kind in "bc" else None) for kind in part)
        for part in shape.split("|")
    )
    return scale, shift


class Tokens:
    """The activation of one call, and what its moments need.

    Args:
        x: The activation.
        channel_axis: 1 or -1.
        layout: Its layout; with the backend "composed" everything is composed of torch's operations.
        weights: (R,), how much each token counts in the moments of the batch.
    """

    def __init__(self, x: Tensor, channel_axis: int, layout: Layout | None, weights: Tensor | None) -> None:
        self.layout = layout
        self.weights = weights
        self._recording = torch.is_grad_enabled()
        self._origin = self._x = x  # the second passes through the nodes of the moments, on its way to the affine map
        self._pending: list[Terms] = []
        self._own = True  # whether all that a rule returned for tokens is made of their own moments
        self._center: Tensor | None = None
        self._last = channel_axis == -1 or x.dim() == 2
        self._shape = x.shape if self._last else x.movedim(1, -1).shape
        self.samples, self.channels = x.shape[0], self._shape[-1]
        self.positions = 1
        for length in self._shape[1:-1]:
            self.positions *= length
        self._found: dict[tuple[Kind, bool], Pair] = {}
        self._matrix: Tensor | None = None

    @property
    def through(self) -> Tensor:
        """The activation behind the nodes of the moments so far."""
        return self._x

    @property
    def backend(self) -> str:
        """Where its moments come from."""
        return "composed" if self.layout is None else self.layout.backend

    @property
    def matrix(self) -> Tensor:
        """(R, C), in the type of the tables; gradients flow."""
        if self._matrix is None:
            if torch.is_grad_enabled() != self._recording:
                with torch.set_grad_enabled(self._recording):
                    return self.matrix
            moved = self._origin if self._last else self._origin.movedim(1, -1)
            self._matrix = moved.reshape(self.samples * self.positions, self.channels).to(table_dtype(moved.dtype))
        return self._matrix

    def _restored(self, matrix: Tensor) -> Tensor:
        y = matrix.to(self._origin.dtype).reshape(self._shape)
        if self._last:
            return y
        y = y.movedim(-1, 1)
        return y.contiguous() if self._origin.is_contiguous() else y

    def reduce(self, kind: Kind, differentiable: bool) -> Pair:
        """Moments of a kind."""
        # A rule may turn gradients off for a part of it, which must not take the moments of the rest out of the graph.
        # The composition is also differentiated forwards, where nothing requires gradients.
        recorded = self.layout is None or (self._recording and self._origin.requires_grad)
        differentiable = differentiable and recorded and torch.is_grad_enabled() == self._recording
        found = self._found.get((kind, True)) or self._found.get((kind, differentiable))
        if found is None:
            found = self._found[kind, differentiable] = self._reduce(kind, differentiable)
            if self._center is None or kind[0] == "token":
                self._center = found[0].detach()
        return found if differentiable else (found[0].detach(), found[1].detach())

    def _reduce(self, kind: Kind, differentiable: bool) -> Pair:
        if self.layout is None:
            return _composed(self.matrix if differentiable else self.matrix.detach(), kind, self.weights)
        if not differentiable:
            return _moments(self._x, kind, self.weights, self.layout)
        mean, var, self._x = _Reduce.apply(self._x, kind, self.weights, self.layout, self._pending)  # type: ignore[no-untyped-call]
        return mean, var

    def affine(self, scale: _Table, shift: _Table) -> Tensor:
        """``scale * x + shift``."""
        if self.layout is None or isinstance(scale, Tensor) or isinstance(shift, Tensor):
            whole = [t if isinstance(t, Tensor) else _sum(t, self.channels) for t in (scale, shift)]
            if isinstance(whole[0], Tensor) and isinstance(whole[1], Tensor):
                return self._restored(torch.addcmul(whole[1], self.matrix, whole[0]))
            return self._restored(self.matrix * whole[0] + whole[1])
        shape, factors = _flatten(scale, shift)
        if not torch.is_grad_enabled() or not (self._x.requires_grad or any(t.requires_grad for t in factors)):
            return tokens.affine(self._x, scale, shift, self.layout)
        slopes = self._slopes(scale, shift)
        link = self._pending if any(key[1] for key in self._found) else None
        made = _Affine.apply(self._x, self._origin, self._center, self.layout, link, shape, slopes, *factors)  # type: ignore[no-untyped-call]
        return cast("Tensor", made)

    def _slopes(self, scale: Terms, shift: Terms) -> Slopes | None:
        """Derivatives of the factors by the moments of their own token, where that is all they are made of."""
        kinds = {kind for kind, differentiable in self._found if differentiable}
        if not self._own or kinds - {("token", 1), ("squares", 1)} or len(kinds) != 1 or self.layout is None:
            return None
        if not rowwise.fits(self._origin, scale, shift, self.layout):
            return None
        (kind,) = kinds
        moments = self._found[kind, True]
        r, q = scale[0][0], next((row for row, _ in shift if row is not None), None)
        found: list[Tensor | None] = []
        for factor in (r, q):
            slopes: tuple[Tensor | None, ...] = (None, None)
            if factor is not None and factor.requires_grad:
                seed = torch.ones_like(factor)
                slopes = torch.autograd.grad(factor, moments, seed, retain_graph=True, allow_unused=True)
            found += slopes
        return Slopes(None if kind[0] == "squares" else found[0], found[1], *found[2:])

    def terms(self, table: Any, name: str) -> _Table:
        """What a rule has returned, as terms, or as a tensor if it is one that no outer product makes.

        Raises:
            TypeError: If it is neither a tensor nor a number.
            ValueError: If it does not broadcast to (R, C).
        """
        dtype, rows = table_dtype(self._x.dtype), self.samples * self.positions
        if isinstance(table, Factored):
            self._own = self._own and table.own
            if any(r is not None and r.shape[1] == self.channels > 1 for r, _ in table.terms):
                return table.dense().to(dtype)
            return tuple((_cast(r, dtype), _cast(c, dtype)) for r, c in table.terms)
        if not isinstance(table, Tensor):
            if not isinstance(table, (int, float)):
                raise TypeError(
                    f"the rule returned {table!r} as {name}; it must be a tensor or a number (0.0 for none)"
                )
            if table == 0 and self.layout is not None:
                return ()
            table = torch.full((1,), float(table), device=self._x.device)
        flat: Tensor = table if table.dtype == dtype else table.to(dtype)
        flat = flat.reshape(1, -1) if flat.dim() < 2 else flat
        if not broadcasts(flat, rows, self.channels):
            raise ValueError(
                f"the rule returned a {name} of shape {tuple(table.shape)}, "
                f"which does not broadcast to (R, C) = {(rows, self.channels)}"
            )
        if self.layout is None:
            return flat
        # Rows that come as a tensor may be made of anything: other tokens, parameters.
        self._own = self._own and (flat.shape[0] == 1 or not flat.requires_grad)
        if flat.shape[0] == 1:
            return ((None, flat.reshape(-1).expand(self.channels)),)
        return ((flat, None),) if flat.shape[1] == 1 else flat


def _cast(factor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return factor if factor is None or factor.dtype == dtype else factor.to(dtype)


class TokenMoments(Moments):
    """The moments that a rule for tokens receives: those of each token and channel are the values themselves."""

    def __init__(self, source: Tokens, process_group: ProcessGroup | None, differentiable: bool = True) -> None:
        def compute(wanted: bool) -> Pair:  # a method would make a circle, in which the graph lives until it is found
            values = source.matrix if wanted and differentiable else source.matrix.detach()
            return values, torch.zeros_like(values)

        super().__init__(process_group=process_group, _compute=compute)
        self._source = source
        self._differentiable = differentiable

    def detach(self) -> Moments:
        """Return the same moments outside the graph: for running statistics, at the price of one forward pass only."""
        return TokenMoments(self._source, self.process_group, False)

    def _pool_channels(self, groups: int) -> Moments:
        source = self._source
        check_groups(groups, source.channels)
        if groups == source.channels:
            return self
        size = source.channels // groups
        count = size if source.weights is None else size * source.weights.unsqueeze(1)

        def table(kind: str, which: int, differentiable: bool) -> Any:
            found = source.reduce((kind, groups), differentiable and self._differentiable)[which]
            if source.layout is not None:
                return Factored(((found, None),), len(found), source.channels, found, own=groups == 1)
            return found.repeat_interleave(size, 1) if groups > 1 else found

        return Moments(
            count=count,
            process_group=self.process_group,
            _compute=lambda differentiable: (table("token", 0, differentiable), table("token", 1, differentiable)),
            _square=lambda: table("squares", 1, True),
        )

    def _pool_batch(self) -> Moments:
        source = self._source
        count = source.samples * source.positions if source.weights is None else source.weights.sum()
        found = source.reduce(("batch", 0), self._differentiable)
        return self._over_processes(Moments(*found, count, backend=source.backend))

    def _pool_positions(self) -> Moments:
        source = self._source
        values = self.mean.view(source.samples, source.positions, source.channels)
        weights = None if source.weights is None else source.weights.view(source.samples, source.positions, 1)
        mean, var, count = pool_positions(values, weights)
        if weights is not None:
            count = count.repeat_interleave(source.positions, 0)
        mean, var = (t.repeat_interleave(source.positions, 0) for t in (mean, var))
        return _SequenceMoments(self, mean, var, count)


class _SequenceMoments(Moments):
    """Those of each sequence, repeated for its tokens; of the batch, those of the tokens, each counted once."""

    def __init__(self, tokens: TokenMoments, mean: Tensor, var: Tensor, count: Any) -> None:
        super().__init__(mean, var, count, process_group=tokens.process_group)
        self._tokens = tokens

    def _pool_batch(self) -> Moments:
        return self._tokens._pool_batch()

    def _pool_all(self) -> Moments:
        return self._tokens._pool_all()
