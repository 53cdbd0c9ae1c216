"""Tables of tokens as sums of outer products: (R, C) numbers that are never written down unless a rule insists.

A rule for tokens reads one number per token and has one parameter per channel; ``weight * (var + eps).rsqrt()`` would
be as large as the activation. :class:`Factored` stands for such a table: what multiplies, adds or divides goes to the
factors, anything else gets the whole table, as a tensor. A rule need not know.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from flexnorm.kernels.tokens import Factor, Terms, expanded

Operand: TypeAlias = "Factored | Tensor | float"

_ELEMENTWISE = {
    *("abs", "add", "addcmul", "clamp", "clamp_max", "clamp_min", "clone", "cos", "detach", "div", "double", "exp"),
    *("expm1", "float", "log", "log1p", "maximum", "minimum", "mul", "neg", "pow", "reciprocal", "relu", "rsqrt"),
    *("sigmoid", "sin", "softplus", "sqrt", "square", "sub", "tanh", "to", "where"),
}
_SAME = {
    "multiply": "mul",
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "subtract": "sub",
    "negative": "neg",
}
_MOST = 2  # outer products that the passes take


class Factored:
    """A table of R tokens by C channels (or by 1) that behaves as a tensor in a rule.

    Args:
        terms: The outer products whose sum it is; without any it is zero.
        tokens: R.
        channels: C.
        like: A tensor of its type and device.
        own: Whether every number of a token comes from the moments of that token alone, by operations on each number:
            then their derivatives are numbers of the token too.

    Attributes:
        shape: (R, 1) if it is the same for all channels, else (R, C).
    """

    def __init__(self, terms: Terms, tokens: int, channels: int, like: Tensor, own: bool = False) -> None:
        self.terms = terms
        self.own = own
        self.tokens, self.channels = tokens, channels
        self._like = like
        narrow = all(column is None and row is not None and row.shape[1] == 1 for row, column in terms)
        self.shape = torch.Size((tokens, 1 if narrow and terms else channels))

    @property
    def dtype(self) -> torch.dtype:
        """The type of its numbers."""
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        """Where its numbers are."""
        return self._like.device

    @property
    def requires_grad(self) -> bool:
        """Whether any of its factors does."""
        return any(t is not None and t.requires_grad for term in self.terms for t in term)

    def dense(self) -> Tensor:
        """The table as a tensor of its shape; gradients flow."""
        if not self.terms:
            return self._like.new_zeros(self.shape)
        total = functools.reduce(torch.add, (expanded(term, self.channels) for term in self.terms))
        return total.expand(self.shape)

    def _row(self) -> Tensor | None:
        """Its numbers (R, G), if it has one for each token or each group of its channels."""
        if len(self.terms) == 1 and self.terms[0][1] is None:
            return self.terms[0][0]
        return None

    def _with(self, terms: Iterable[Factor], *others: Any) -> Factored | Tensor:
        merged = _merge(terms)
        table = Factored(merged, self.tokens, self.channels, self._like, self.own and all(map(_constant, others)))
        return table if len(merged) <= _MOST else table.dense()

    def _map(self, function: Callable[[Factor], Factor], *others: Any) -> Factored:
        own = self.own and all(map(_constant, others))
        return Factored(tuple(map(function, self.terms)), self.tokens, self.channels, self._like, own)

    def become(self, table: Tensor) -> None:
        """Take the numbers (of its own shape) of a table that has been changed in place."""
        self.terms, self.own = ((table, None),), False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = getattr(Tensor, name)
        if name in ("register_hook", "retain_grad"):
            self.own = False  # its gradient is asked for, so it has to be computed
        if callable(found):
            return functools.partial(_dispatch, found, self)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, *args, **(kwargs or {}))

    def __add__(self, other: Operand) -> Any:
        return _dispatch(torch.add, self, other)

    def __sub__(self, other: Operand) -> Any:
        return _dispatch(torch.sub, self, other)

    def __rsub__(self, other: Operand) -> Any:
        return _dispatch(torch.add, _dispatch(torch.neg, self), other)

    def __mul__(self, other: Operand) -> Any:
        return _dispatch(torch.mul, self, other)

    def __truediv__(self, other: Operand) -> Any:
        return _dispatch(torch.div, self, other)

    def __rtruediv__(self, other: Operand) -> Any:
        return _dispatch(torch.mul, _dispatch(torch.reciprocal, self), other)

    def __pow__(self, other: Any) -> Any:
        return _dispatch(torch.pow, self, other)

    def __neg__(self) -> Any:
        return _dispatch(torch.neg, self)

    def __abs__(self) -> Any:
        return _dispatch(torch.abs, self)

    def __lt__(self, other: Operand) -> Any:
        return _dispatch(torch.lt, self, other)

    def __le__(self, other: Operand) -> Any:
        return _dispatch(torch.le, self, other)

    def __gt__(self, other: Operand) -> Any:
        return _dispatch(torch.gt, self, other)

    def __ge__(self, other: Operand) -> Any:
        return _dispatch(torch.ge, self, other)

    __radd__, __rmul__ = __add__, __mul__

    def __getitem__(self, index: Any) -> Tensor:
        return self.dense()[_written(index)]

    def __setitem__(self, index: Any, value: Any) -> None:
        _dispatch(Tensor.__setitem__, self, index, value)

    def __len__(self) -> int:
        return self.tokens

    def __repr__(self) -> str:
        return f"Factored(shape={tuple(self.shape)}, {len(self.terms)} outer products)"


def _merge(terms: Iterable[Factor]) -> Terms:
    """At most one term without a row and one without a column, beside the products."""
    row: Tensor | None = None
    column: Tensor | None = None
    products: list[Factor] = []
    for r, c in terms:
        if r is not None and c is not None:
            products.append((r, c))
        elif r is not None:
            row = r if row is None else _add_rows(row, r)
        elif c is not None:
            column = c if column is None else column + c
    ends: list[Factor] = [] if row is None else [(row, None)]
    return (*products, *ends, *([] if column is None else [(None, column)]))


def _add_rows(a: Tensor, b: Tensor) -> Tensor:
    return a + b  # (R, G) and (R, 1) broadcast


def _operator(name: str) -> Callable[..., Any]:
    function = getattr(Tensor, name)
    return lambda self, *others: _dispatch(function, self, *others)


for _name in (
    *("__eq__", "__ne__", "__pos__", "__mod__", "__rmod__", "__floordiv__", "__rfloordiv__", "__rpow__"),
    *("__matmul__", "__rmatmul__", "__float__", "__int__", "__bool__", "__contains__"),
):
    setattr(Factored, _name, _operator(_name))


def _in_place(func: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation that changes its first argument, a table or a tensor."""
    table, others = args[0], map(_written, args[1:])
    kwargs = {key: _written(value) for key, value in kwargs.items()}
    if not isinstance(table, Factored):
        return func(table, *others, **kwargs)
    changed = table.dense().clone()
    func(changed, *others, **kwargs)
    table.become(changed)
    return table


def _dispatch(func: Any, *args: Any, **kwargs: Any) -> Any:
    name = func.__name__
    if name == "__setitem__" or (name.endswith("_") and not name.startswith("_")):
        return _in_place(func, *args, **kwargs)
    name = name.strip("_")
    reverse = name in ("radd", "rmul", "rsub", "rdiv", "rtruediv", "rpow")
    name = name[1:] if reverse else name
    name = _SAME.get(name, name)
    if reverse and name in ("sub", "div"):
        args = (args[1], args[0])
        func = getattr(torch, name)
    linear = _LINEAR.get(name) if kwargs.keys() <= {"alpha", "value"} else None
    if linear is not None and (found := linear(*args, **kwargs)) is not NotImplemented:
        return found
    values = (*args, *kwargs.values())
    tables = [a for a in values if isinstance(a, Factored)]
    rows = [t._row() for t in tables]
    if tables and all(r is not None for r in rows) and not any(isinstance(a, (list, tuple)) for a in values):
        first, widths = tables[0], {r.shape[1] for r in rows if r is not None}
        others = [a for a in values if isinstance(a, Tensor)]
        # One number per token: any operation means on it what it means on the table. One per group: only what acts on
        # each number alone does.
        if widths == {1} or (len(widths) == 1 and name in _ELEMENTWISE and all(o.numel() == 1 for o in others)):
            made = func(*map(_numbers, args), **{key: _numbers(value) for key, value in kwargs.items()})
            (width,) = widths
            if isinstance(made, Tensor) and made.shape == (first.tokens, width) and made.is_floating_point():
                own = name in _ELEMENTWISE and all(map(_constant, values))
                return Factored(((made, None),), first.tokens, first.channels, made, own)
            return made
    return func(*map(_written, args), **{key: _written(value) for key, value in kwargs.items()})


def _numbers(value: Any) -> Any:
    return value._row() if isinstance(value, Factored) else value


def _written(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_written, value))
    return value.dense() if isinstance(value, Factored) else value


def _terms(value: Any, table: Factored) -> Terms | None:
    """What is added to or multiplies a table, as terms; ``None`` if it is none."""
    if isinstance(value, Factored):
        return value.terms if (value.tokens, value.channels) == (table.tokens, table.channels) else None
    if not isinstance(value, Tensor):
        value = torch.full((1,), float(value), dtype=table.dtype, device=table.device)
    if not value.is_floating_point() or value.dim() > 2:
        return None
    if value.dim() == 2 and value.shape == (table.tokens, 1):
        return ((value, None),)
    if value.shape[:-1] in ((), (1,)) and (value.numel() == 1 or value.shape[-1:] == (table.channels,)):
        # The same tensor stays the same tensor: columns that are one are seen to be.
        alike = value.shape == (table.channels,)
        return ((None, value if alike else value.reshape(-1).expand(table.channels)),)
    return None


def _constant(value: Any) -> bool:
    """Whether numbers of a token stay its own where this joins them: nothing of other tokens that has a gradient."""
    if isinstance(value, Factored):
        return value.own
    if not isinstance(value, Tensor) or not value.requires_grad:
        return True
    return value.numel() > 1 and value.shape[-1] == value.numel()  # a row of channels joins the columns


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a * b


def _scalar(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)


def _scaled(table: Factored, by: Any) -> Factored:
    by = by.reshape(()) if isinstance(by, Tensor) else by
    return table._map(lambda term: (term[0], term[1] * by) if term[0] is None else (term[0] * by, term[1]), by)


def _mul(a: Any, b: Any, **kwargs: Any) -> Any:
    table, other = (a, b) if isinstance(a, Factored) else (b, a)
    if kwargs or not isinstance(table, Factored):
        return NotImplemented
    if _scalar(other):
        return _scaled(table, other)
    terms = _terms(other, table)
    if terms is None:
        return NotImplemented
    return table._with(((_product(r, s), _product(c, d)) for r, c in table.terms for s, d in terms), other)


def _add(a: Any, b: Any, *, alpha: float = 1) -> Any:
    table, other = (a, b) if isinstance(a, Factored) else (b, a)
    if not isinstance(table, Factored):
        return NotImplemented
    if alpha != 1:
        b = b * alpha
        other = b if table is a else a
        table = table if table is a else b
    row = table._row()
    if _scalar(other) and row is not None:
        other = other.reshape(()) if isinstance(other, Tensor) else other
        return table._with([(row + other, None)], other)
    terms = _terms(other, table)
    return NotImplemented if terms is None else table._with((*table.terms, *terms), other)


def _sub(a: Any, b: Any, *, alpha: float = 1) -> Any:
    return _add(a, -b, alpha=alpha)


def _div(a: Any, b: Any, **kwargs: Any) -> Any:
    if kwargs:
        return NotImplemented
    if isinstance(b, Factored):
        inverse = _reciprocal(b)
        return NotImplemented if inverse is NotImplemented else inverse * a
    if _scalar(b):
        b = b.reshape(()) if isinstance(b, Tensor) else b
        return a._map(lambda term: (term[0], term[1] / b) if term[0] is None else (term[0] / b, term[1]), b)
    return _mul(a, b.reciprocal())


def _inverse(factor: Tensor | None) -> Tensor | None:
    return None if factor is None else factor.reciprocal()


def _reciprocal(table: Factored) -> Any:
    if len(table.terms) != 1:
        return NotImplemented
    return table._map(lambda term: (_inverse(term[0]), _inverse(term[1])))


def _neg(table: Factored) -> Factored:
    return _scaled(table, -1)


def _addcmul(start: Any, a: Any, b: Any, *, value: float = 1) -> Any:
    if not isinstance(a, Factored) and not isinstance(b, Factored):
        return start + a * b * value
    product = a * b
    return start + (product if value == 1 else product * value)


def _zeros_like(table: Factored, **kwargs: Any) -> Any:
    if kwargs:
        return NotImplemented
    made = Factored((), table.tokens, table.channels, table._like, True)
    made.shape = table.shape
    return made


def _detached(factor: Tensor | None) -> Tensor | None:
    return None if factor is None else factor.detach()


def _detach(table: Factored) -> Factored:
    return table._map(lambda term: (_detached(term[0]), _detached(term[1])))


_LINEAR: dict[str, Callable[..., Any]] = {
    "mul": _mul,
    "add": _add,
    "sub": _sub,
    "div": _div,
    "neg": _neg,
    "reciprocal": _reciprocal,
    "addcmul": _addcmul,
    "zeros_like": _zeros_like,
    "detach": _detach,
}
