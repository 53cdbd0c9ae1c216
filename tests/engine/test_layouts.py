"""The guide's rules as they stand on every layout, masked or not, against moments written from their definitions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from flexnorm.engine import Segments, flex_norm

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "rules.md"
C = 6


def _rules() -> dict[str, Any]:
    """The longest block of the guide holds the rules, the first what they share."""
    found = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    for block in (found[0], max(found, key=len)):
        exec(block, names)
    return names


NAMES = _rules()
NAMES["zero"] = 0.0
PARAMETERS = {
    **dict.fromkeys(("batch", "layer", "group", "instance", "filter_response"), "wb"),
    **dict.fromkeys(("mean_only", "variance_only", "quadratic"), "wb"),
    "rms": "w",
    "population": "bawb",
    "renormalization": "bawb",
    "switchable": "mwb",
    "unitized": "wba",
    "gated": "awb",
}
INDEPENDENT = ("batch", "layer", "group", "unitized", "switchable")


class Dense:
    """Moments of values (N, P, C) with weights (N, P), each from its definition; of single positions as (N P, C)."""

    def __init__(self, values: Tensor, weights: Tensor, per_position: bool) -> None:
        self.values, self.weights, self.apart = values, weights, per_position
        own = values.flatten(0, 1) if per_position else self._over((1,))[0].squeeze(1)
        self.mean, self.var = own, own * 0 if per_position else self._over((1,))[1].squeeze(1)
        self.count: Any = 1 if per_position else weights.sum(1, keepdim=True)

    def _over(self, axes: tuple[int, ...], values: Tensor | None = None) -> tuple[Tensor, Tensor]:
        values = self.values if values is None else values
        weights = self.weights.view(*self.weights.shape, *[1] * (values.dim() - 2)).expand(values.shape)
        if axes == (2,) or axes == (3,):  # channels of single positions: each counts
            weights = torch.ones_like(weights)
        total = weights.sum(axes, keepdim=True)
        mean = (weights * values).sum(axes, keepdim=True) / total
        return mean, (weights * (values - mean).square()).sum(axes, keepdim=True) / total

    @property
    def mean_square(self) -> Tensor:
        return self.var + self.mean.square()

    def pool(self, over: str, groups: int = 1) -> Dense:
        made = Dense.__new__(Dense)
        if over == "batch":
            made.mean, made.var = (t.squeeze(0) for t in self._over((0, 1)))
        elif over == "all":
            made.mean, made.var = (t.reshape(1, 1) for t in self._over((0, 1, 2)))
        elif over == "positions":
            mean, var = (t.expand(self.values.shape) if self.apart else t for t in self._over((1,)))
            made.mean, made.var = (t.flatten(0, 1) for t in (mean, var))
        else:
            split = self.values.unflatten(2, (groups, -1))
            pooled = self._over((3,) if self.apart else (1, 3), split)
            made.mean, made.var = (t.expand(-1, -1, -1, split.shape[3]).flatten(2).flatten(0, 1) for t in pooled)
        return made


def expected(x: Tensor, name: str, params: list[Tensor], axis: int, per_position: bool, mask: Tensor | None) -> Tensor:
    moved = x if axis == -1 else x.movedim(1, -1)
    values = moved.reshape(moved.shape[0], -1, C)
    weights = values.new_ones(values.shape[:2]) if mask is None else mask.reshape(values.shape[:2]).to(values)
    scale, shift = NAMES[name](Dense(values, weights, per_position), *params)
    tables = []
    for table in map(torch.as_tensor, (scale, shift)):
        table = table.unsqueeze(1) if table.dim() == 2 and not per_position else table
        shape = (len(values) * values.shape[1], C) if per_position else (len(values), 1, C)
        tables.append(table.broadcast_to(shape).reshape(values.shape if per_position else shape))
    y = (values * tables[0] + tables[1]).view(moved.shape)
    return y if axis == -1 else y.movedim(-1, 1)


def _strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


# Name: shape small and large, channel axis, per position, arrangement of the memory.
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int, bool | None, Any]] = {
    "tokens": ((4, 7, C), (40, 70, C), -1, None, None),
    "features": ((12, C), (3000, C), 1, None, None),
    "channels last": ((3, 4, 2, C), (12, 20, 12, C), -1, None, None),
    "rows of the sequence first": ((4, 7, C), (40, 70, C), -1, None, lambda x: x.mT.contiguous().mT),
    "strided tokens": ((4, 7, C), (40, 70, C), -1, None, _strided),
    "sequences": ((4, 7, C), (40, 70, C), -1, False, None),
    "images": ((3, C, 4, 2), (12, C, 20, 12), 1, None, None),
    "images in memory channels last": ((3, C, 4, 2), (12, C, 20, 12), 1, None, "channels_last"),
    "strided images": ((3, C, 4, 2), (12, C, 20, 12), 1, None, _strided),
    "positions of images": ((3, C, 4, 2), (12, C, 20, 12), 1, True, None),
    "positions of images channels last": ((3, C, 4, 2), (12, C, 20, 12), 1, True, "channels_last"),
}


def arranged(x: Tensor, how: Any) -> Tensor:
    if how == "channels_last":
        return x.to(memory_format=torch.channels_last)
    return x if how is None else how(x)


def inputs(layout: str, large: bool, name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    shape = LAYOUTS[layout][large]
    x = arranged((torch.randn(shape, dtype=torch.float64) * 2 + 1).to(dtype), LAYOUTS[layout][4])
    known = {key: torch.rand(C, dtype=torch.float64) + 0.5 for key in "wba"}
    known["m"] = torch.randn(3, dtype=torch.float64)
    table = dtype if dtype == torch.float64 else torch.float32
    return x.requires_grad_(), [known[key].to(table).requires_grad_() for key in PARAMETERS[name]]


def mask_of(x: Tensor, axis: int) -> Tensor:
    shape = list(x.shape)
    del shape[axis]
    mask = torch.rand(shape) < 0.7
    mask.view(shape[0], -1)[:, 0] = True  # something counts in every sample
    if len(shape) == 1:
        mask[: len(mask) // 2] = True
    return mask


@pytest.mark.quick(40)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PARAMETERS)
def test_values_and_gradients(name: str, layout: str, large: bool, masked: bool) -> None:
    _, _, axis, per_position, _ = LAYOUTS[layout]
    x, params = inputs(layout, large, name)
    mask = mask_of(x, axis) if masked else None
    apart = layout == "features" or (axis == -1 if per_position is None else per_position)
    y = flex_norm(x, NAMES[name], *params, channel_axis=axis, per_position=per_position, mask=mask)
    z = expected(x, name, params, axis, apart, mask)
    torch.testing.assert_close(y, z)
    g = torch.randn(y.shape, dtype=y.dtype)
    found, wanted = (torch.autograd.grad(t, [x, *params], g, allow_unused=True) for t in (y, z))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


POOLS = {"batch": ("batch",), "positions": ("positions",), "all": ("all",), "groups": ("channels", 3)}


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_pooled_and_how_many_values_that_are(layout: str, large: bool, masked: bool) -> None:
    _, _, axis, per_position, _ = LAYOUTS[layout]
    x, _ = inputs(layout, large, "layer")
    mask = mask_of(x, axis) if masked else None
    apart = layout == "features" or (axis == -1 if per_position is None else per_position)
    moved = x if axis == -1 else x.movedim(1, -1)
    values = moved.reshape(len(x), -1, C)
    weights = values.new_ones(values.shape[:2]) if mask is None else mask.reshape(values.shape[:2]).to(values)
    dense, each = Dense(values, weights, apart), weights.sum(1, keepdim=True)
    rows = each.repeat_interleave(values.shape[1], 0) if apart else each
    counts = {"batch": weights.sum(), "all": C * weights.sum(), "positions": rows}
    counts["groups"] = C // 3 * (weights.reshape(-1, 1) if apart else each)

    def rule(m: Any) -> tuple[Tensor, Tensor]:
        found = {name: m.pool(*how) for name, how in POOLS.items()}
        of_positions = found["positions"]
        pooled = {**found, "twice": of_positions.pool("batch"), "thrice": of_positions.pool("all")}
        for name, one in pooled.items():
            name = {"twice": "batch", "thrice": "all"}.get(name, name)
            other, count = dense.pool(*POOLS[name]), torch.as_tensor(one.count)
            for got, want in ((one.mean, other.mean), (one.var, other.var), (one.mean_square, other.mean_square)):
                torch.testing.assert_close(got + torch.zeros_like(want), want)
            torch.testing.assert_close(count.double().expand(counts[name].shape), counts[name])
        return torch.ones(1), torch.zeros(1)

    flex_norm(x, rule, channel_axis=axis, per_position=per_position, mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_types(layout: str, large: bool, dtype: torch.dtype) -> None:
    _, _, axis, per_position, how = LAYOUTS[layout]
    tolerance = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    # Not of groups: the variance of two channels can be tiny, and the derivative of its root loses all digits.
    for name in (name for name in INDEPENDENT if name != "group"):
        x, params = inputs(layout, large, name, dtype)
        y = flex_norm(x, NAMES[name], *params, channel_axis=axis, per_position=per_position)
        exact = [t.detach().double().requires_grad_() for t in (x, *params)]
        z = flex_norm(exact[0], NAMES[name], *exact[1:], channel_axis=axis, per_position=per_position)
        assert y.dtype == dtype
        if how in (None, "channels_last"):
            assert y.stride() == x.stride()
        torch.testing.assert_close(y.double(), z, rtol=tolerance, atol=tolerance)
        g = torch.randn(y.shape, dtype=torch.float64).to(dtype)
        (found,), (wanted,) = torch.autograd.grad(y, x, g), torch.autograd.grad(z, exact[0], g.double())
        torch.testing.assert_close(found.double(), wanted, rtol=4 * tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("name", INDEPENDENT)
@pytest.mark.parametrize(
    "layout", ["tokens", "rows of the sequence first", "features", "sequences", "positions of images"]
)
def test_second_derivatives(layout: str, name: str) -> None:
    _, _, axis, per_position, _ = LAYOUTS[layout]
    shapes = {"features": (3, C), "positions of images": (2, C, 2, 1)}
    torch.manual_seed(0)
    x = torch.randn(shapes.get(layout, (2, 2, C)), dtype=torch.float64, requires_grad=True)
    _, params = inputs(layout, False, name)
    params = [p.detach() for p in params]

    def run(x: Tensor) -> Tensor:
        return flex_norm(x, NAMES[name], *params, channel_axis=axis, per_position=per_position)

    assert gradcheck(run, x)
    assert gradgradcheck(run, x)
    # The kernels hand a second derivative to the composition.
    x, _ = inputs(layout, True, name)
    (first,) = torch.autograd.grad(run(x).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    apart = layout == "features" or (axis == -1 if per_position is None else per_position)
    z = expected(x, name, params, axis, apart, None)
    (first,) = torch.autograd.grad(z.pow(3).sum(), x, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(first.square().sum(), x)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PARAMETERS)
def test_segments_are_the_samples(name: str) -> None:
    """Graphs of one size, rows shuffled, are sequences of that length."""
    x, params = inputs("sequences", False, name)
    order = torch.randperm(28)
    index = torch.arange(4).repeat_interleave(7)
    y = flex_norm(x.flatten(0, 1)[order], NAMES[name], *params, segments=Segments(index[order], 4))
    z = expected(x, name, params, -1, False, None).flatten(0, 1)[order]
    torch.testing.assert_close(y, z)
    g = torch.randn_like(y)
    found, wanted = (torch.autograd.grad(t, [x, *params], g, allow_unused=True) for t in (y, z))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(0, 5, C), (2, 0, C), (0, C), (1, C), (1, 1, C)], ids=str)
@pytest.mark.parametrize("name", PARAMETERS)
def test_no_token_and_one(name: str, shape: tuple[int, ...]) -> None:
    _, params = inputs("tokens", False, name)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    for mask in (None, torch.ones(shape[:-1])):
        y = flex_norm(x, NAMES[name], *params, channel_axis=-1, mask=mask)
        assert y.shape == x.shape
        grads = torch.autograd.grad(y.sum(), [x, *params], allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in grads)


def test_per_sample_and_forward_derivatives_of_tokens() -> None:
    x, params = inputs("tokens", False, "layer")
    x, weight, bias = x.detach(), *(p.detach() for p in params)

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        return flex_norm(x, NAMES["layer"], weight, bias, channel_axis=-1).pow(3).sum()

    many = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, x)
    for i, row in enumerate(many):
        torch.testing.assert_close(row, torch.func.grad(loss)(weight, x[i]))
    _, tangent = torch.func.jvp(lambda x: loss(weight, x), (x,), (x.cos(),))
    torch.testing.assert_close(tangent, (torch.func.grad(loss, 1)(weight, x) * x.cos()).sum())


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(4, 6), r"\(4, 6\) does not fit x of shape \(4, 7, 6\): \(4, 7\) does"),
        (torch.full((4, 7), -2), "negative or not finite: -2.0 and 27 more"),
        (torch.full((4, 7), float("nan")), "negative or not finite: nan"),
    ],
)
def test_wrong_masks_are_refused(mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flex_norm(torch.randn(4, 7, C), NAMES["layer"], torch.ones(C), torch.zeros(C), channel_axis=-1, mask=mask)
    with pytest.raises(ValueError, match="at least, got -1"):
        Segments(torch.zeros(0, dtype=torch.long), -1)


@pytest.mark.parametrize("tokens", [8, 400])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_part_of_a_rule_without_gradients_leaves_the_rest_its_own(tokens: int, dtype: torch.dtype) -> None:
    def rule(moments: Any) -> Any:
        with torch.no_grad():
            mean = moments.pool("channels").mean
        scale = (moments.pool("channels").var + 0.1).rsqrt()
        return scale, -mean * scale + moments.pool("batch").mean

    x = torch.randn(tokens, 64, dtype=dtype, requires_grad=True)
    y = flex_norm(x, rule, channel_axis=-1)
    z = x.double()
    scale = (z.var(1, correction=0, keepdim=True) + 0.1).rsqrt()
    z = (z - z.mean(1, keepdim=True).detach()) * scale + z.mean(0)
    found, wanted = (torch.autograd.grad(t.pow(3).sum(), x)[0] for t in (y, z))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
