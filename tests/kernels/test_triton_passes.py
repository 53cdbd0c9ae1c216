"""The Triton kernels, run on the CPU by Triton's interpreter, against the plain composition in float64.

The interpreter computes what the kernels say; it says nothing about their speed, nor about a GPU's arithmetic. It cuts
16-bit values off where a GPU rounds them.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import reference_tokens as reference
import torch
from torch import Tensor

from flexnorm.engine import flex_norm
from flexnorm.kernels import gpu, passes, tokens, triton_passes
from flexnorm.kernels.layout import Layout, table_dtype
from flexnorm.nn import rules

pytest.importorskip("triton", reason="Triton runs on Linux only, and comes with the extra flexnorm[triton]")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("these run by Triton's interpreter, which machines with a GPU leave alone", allow_module_level=True)

ULP = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
IMAGES = [(2, 3, 5), (1, 1, 2), (3, 17, 49), (2, 5, 150), (1, 140, 3)]
TOKENS = [(2, 6, 5, 3), (1, 1, 1, 1), (2, 36, 5, 12), (1, 192, 3, 64), (1, 300, 3, 1)]  # N, C, P, groups


@pytest.fixture(params=["whole", "in parts"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small shapes in one tile, and in parts of several tiles, as large ones are."""
    if request.param == "in parts":
        monkeypatch.setattr(triton_passes, "_TILE", 256)
        monkeypatch.setattr(triton_passes, "_PROGRAMS", 8)


def cases(shapes: list[tuple[int, ...]]) -> Any:
    """Every shape in both orders, whole and in parts, the types in turn."""
    found = itertools.product(["whole", "in parts"], ["rows", "cols"], shapes)
    kinds = [(shape, order, TYPES[(k + k // len(shapes)) % 4], cut) for k, (cut, order, shape) in enumerate(found)]
    return pytest.mark.parametrize(("shape", "order", "dtype", "cut"), kinds, indirect=["cut"], ids=str)


def case(shape: tuple[int, ...], order: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Layout]:
    n, c, p = shape[:3]
    x, g = ((torch.randn((n, c, p) if order == "rows" else (n, p, c)) + k).to(dtype) for k in (3, 0))
    return x, g, Layout("triton", order, (n, c, p))


def wide(value: Any) -> Any:
    """The same in float64."""
    if isinstance(value, Tensor):
        return value.double()
    return type(value)(map(wide, value)) if type(value) in (tuple, list) else value


def close(found: Tensor | None, wanted: Tensor | None, dtype: torch.dtype, within: float = 1) -> None:
    assert (found is None) == (wanted is None)
    if found is not None and wanted is not None:
        assert found.shape == wanted.shape
        size = max(1.0, wanted.detach().abs().max().item()) * ULP[dtype] * within
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=size)


@pytest.mark.quick(10)
@cases(IMAGES)
def test_passes_over_images(shape: tuple[int, ...], order: str, dtype: torch.dtype, cut: None) -> None:
    x, g, layout = case(shape, order, dtype)
    last, plain, tables = order == "cols", layout._replace(backend="composed"), table_dtype(dtype)
    values, incoming = (wide(t.movedim(-1, 1) if last else t) for t in (x, g))
    mean, var = passes.moments(x, layout)
    assert mean.dtype == var.dtype == tables
    for found, wanted in zip((mean, var), passes.moments(values, plain), strict=True):
        close(found, wanted, tables)

    def same(found: Tensor, wanted: Tensor) -> None:
        assert found.dtype == dtype
        close(found.movedim(-1, 1) if last else found, wanted, dtype)

    whole, channel, sample = (torch.randn(size, dtype=tables) for size in (shape[:2], (1, shape[1]), (shape[0], 1)))
    for scale, shift in [(whole, channel), (sample, whole), (channel, None)]:
        same(passes.affine(x, scale, shift, layout), passes.affine(*wide((values, scale, shift)), plain))
    for center in (mean, None):
        shapes = (whole.shape, channel.shape)
        wanted = passes.sums(incoming, values, wide(center), plain, shapes)
        for found, right in zip(passes.sums(g, x, center, layout, shapes), wanted, strict=True):
            close(found, right, tables)
    for scale, dmean, dvar in [(whole, channel, whole), (None, None, sample), (channel, whole, None)]:
        wanted = passes.combine(incoming, values, *wide((scale, dmean, dvar, mean)), plain)
        same(passes.combine(g, x, scale, dmean, dvar, mean, layout), wanted)


def term_structures(rows: int, channels: int, groups: int, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Sums of at most two outer products, as rules make them."""
    token, group = torch.randn(rows, 1, dtype=dtype), torch.randn(rows, groups, dtype=dtype)
    channel, same = torch.randn(channels, dtype=dtype), torch.randn(1, dtype=dtype).expand(channels)
    return [
        ((token, channel),),
        ((group, channel), (None, same)),
        ((group, None), (token, channel)),
        ((None, channel),),
    ]


@pytest.mark.quick(6)
@cases(TOKENS)
def test_passes_over_tokens(shape: tuple[int, ...], order: str, dtype: torch.dtype, cut: None) -> None:
    x, g, layout = case(shape, order, dtype)
    n, channels, p, groups = shape
    rows, tables = n * p, table_dtype(dtype)
    weights = torch.rand(rows, dtype=tables) * (torch.arange(rows) % 3 != 1)
    own = tokens.row_moments(x, layout, groups)
    batch = tokens.column_moments(x, layout)
    for found, wanted in [
        (own, reference.row_moments(x, layout, groups)),
        (batch, reference.column_moments(x, layout)),
        (tokens.column_moments(x, layout, weights), reference.column_moments(x, layout, weights)),
    ]:
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == tables
            close(a, b, tables)

    def same(found: Tensor, wanted: Tensor) -> None:
        assert found.dtype == dtype
        assert found.shape == x.shape
        close(reference.matrix(found, layout), wanted, dtype)

    kinds = term_structures(rows, channels, groups, tables)
    for scale, shift in [*zip(kinds, kinds[1:] + kinds[:1], strict=True), (kinds[0], ()), ((), kinds[3])]:
        wanted = reference.affine(x, scale, shift, layout).expand(rows, channels)
        same(tokens.affine(x, scale, shift, layout), wanted)
        sums = reference.sums(g, x, scale, shift, layout)
        for center in (None, own[0], batch[0]):
            for side, right in zip(tokens.sums(g, x, center, scale, shift, layout), sums, strict=True):
                for a, b in itertools.zip_longest(itertools.chain(*side), itertools.chain(*right)):
                    close(a, b, tables, within=4)
    by_group, by_channel = torch.randn(rows, groups, dtype=tables), torch.randn(1, channels, dtype=tables)
    of_rows = tokens.Source(own[0], by_group, by_group + 1, channels / groups)
    of_batch = tokens.Source(batch[0], by_channel, by_channel - 1, rows)
    masked = tokens.Source(batch[0], None, by_channel, weights.sum(), weights)
    of_token = of_rows._replace(mean=own[0][:, :1], dmean=by_group[:, :1], dvar=by_group[:, :1])
    for scale, *sources in [
        (kinds[0], of_rows, None),
        (kinds[3], None, of_batch),
        (None, of_rows._replace(dvar=None), masked),
        ((), of_token, of_batch._replace(dvar=None)),
    ]:
        same(tokens.combine(g, x, scale, *sources, layout), reference.combine(g, x, scale, *sources, layout))


def test_groups_of_different_widths_meet() -> None:
    x, g, layout = case((2, 12, 3), "cols", torch.float32)
    scale = ((torch.randn(6, 2), None), (torch.randn(6, 3), torch.randn(12)))
    close(
        reference.matrix(tokens.affine(x, scale, (), layout), layout), reference.affine(x, scale, (), layout), x.dtype
    )
    found, wanted = tokens.sums(g, x, None, scale, (), layout), reference.sums(g, x, scale, (), layout)
    for a, b in zip(itertools.chain(*found[0]), itertools.chain(*wanted[0]), strict=True):
        close(a, b, torch.float32)


@pytest.mark.parametrize("order", ["rows", "cols"])
def test_large_mean_keeps_the_digits_of_the_variance(order: str, cut: None) -> None:
    """``E[x^2] - E[x]^2`` would have none left."""
    x, _, layout = case((2, 3, 200), order, torch.float32)
    x = x + 2e4
    values = x.double().movedim(1 if order == "rows" else 2, 1)  # (N, C, P)
    for found, axes in [(passes.moments(x, layout), (2,)), (tokens.column_moments(x, layout), (0, 2))]:
        mean, var = (t.double().view_as(values.mean(axes)) for t in found)
        torch.testing.assert_close(mean, values.mean(axes), rtol=2e-7, atol=0)
        torch.testing.assert_close(var, values.var(axes, correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("order", ["rows", "cols"])
def test_what_does_not_count_is_not_read(order: str, cut: None) -> None:
    x, _, layout = case((2, 3, 10), order, torch.float32)
    weights = torch.ones(20).index_fill(0, torch.arange(3, 17), 0)
    clean = tokens.column_moments(x, layout, weights)
    hidden = torch.where(weights > 0, 0.0, torch.nan)
    spoilt = x + (hidden.view(2, 10, 1) if order == "cols" else hidden.view(2, 1, 10))
    for a, b in zip(tokens.column_moments(spoilt, layout, weights), clean, strict=True):
        assert torch.equal(a, b)
    source = tokens.Source(*clean, clean[1], 6.0, weights)
    found = tokens.combine(x, spoilt, None, None, source, layout)
    assert torch.equal(found, tokens.combine(x, x, None, None, source, layout))
    for table in tokens.column_moments(spoilt, layout, torch.zeros(20)):
        assert torch.equal(table, torch.zeros(1, 3))  # nothing counts: zeros, as the composition has it


RULES: dict[str, Any] = {
    "batch": lambda m, w, b, a: rules.batch(m, w, b),
    "instance": lambda m, w, b, a: rules.instance(m, w, b),
    "layer": lambda m, w, b, a: rules.layer(m, w, b),
    "group": lambda m, w, b, a: rules.group(m, w, b, groups=3),
    "unitized": lambda m, w, b, a: rules.unitized(m, w, b, a),
    "population": lambda m, w, b, a: rules.population(m, b, a + 1, w, b),
    "root mean square": lambda m, w, b, a: (w * (m.pool("channels").mean_square + 1e-6).rsqrt(), 0.0),
}
WAYS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "images": ((3, 12, 4, 5), {}),
    "channels last": ((3, 12, 4, 5), {}),
    "tokens": ((3, 4, 12), {"channel_axis": -1}),
    "masked tokens": ((3, 4, 12), {"channel_axis": -1, "mask": torch.arange(12).view(3, 4) % 4 != 1}),
    "tokens of images": ((2, 12, 3, 4), {"per_position": True}),
    "features": ((7, 12), {}),
}


KINDS = [(r, w) for r in RULES for w in WAYS if r != "instance" or w in ("images", "channels last")]


@pytest.mark.quick(14)
@pytest.mark.parametrize(("rule", "way"), KINDS)
def test_flex_norm_equals_the_composition(rule: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients of a whole call, on a CPU that stands in for a GPU."""
    shape, how = WAYS[way]
    x = torch.randn(shape, dtype=torch.float64) * 2 + 3
    if way == "channels last":
        x = x.to(memory_format=torch.channels_last)
    weight, params = torch.randn_like(x), [torch.rand(12, dtype=torch.float64) + 0.5 for _ in range(3)]

    def run(kind: torch.dtype) -> tuple[Tensor, list[Tensor | None]]:
        leaves = [t.detach().to(kind).requires_grad_() for t in (x, *params)]
        y = flex_norm(leaves[0], RULES[rule], *leaves[1:], **how)
        return y, torch.autograd.grad((y * weight.to(kind)).sum(), leaves, allow_unused=True)

    dtype = torch.float32
    y, grads = run(torch.float64)
    launched: list[str] = []

    def launch(name: str, *arguments: Any, **constants: Any) -> None:
        launched.append(name)
        gpu.launch(name, *arguments, **constants)

    monkeypatch.setattr(gpu, "available", lambda x: x.dtype in gpu.DTYPES)
    monkeypatch.setattr(triton_passes, "launch", launch)
    found, ours = run(dtype)
    for a, b in zip((found, *ours), (y, *grads), strict=True):
        close(a, b, dtype, within=10)
    assert "moments" in launched or rule == "population"
    if "affine" in launched:  # else the rule has asked for whole tables
        assert found.stride() == x.stride()
    else:
        assert way.startswith(("tokens", "masked", "features"))
        assert rule == "unitized"


@pytest.mark.parametrize("shape", [(2, 3, 4), (5, 3)], ids=str)
def test_gradcheck_and_gradgradcheck(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward by the kernels is right, and one that is itself differentiated leaves them."""
    monkeypatch.setattr(gpu, "available", lambda x: x.dtype in gpu.DTYPES)
    inputs = [torch.randn(size, dtype=torch.float64).requires_grad_() for size in (shape, (3,), (3,))]

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return flex_norm(x, rules.batch, weight, bias)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
