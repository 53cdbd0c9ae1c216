"""flex_norm against plain composition in float64, on every kernel, layout, shape and type."""

from __future__ import annotations

import gc
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import flexnorm
from flexnorm.engine import Moments, flex_norm
from flexnorm.kernels import layout, normalization
from flexnorm.kernels.layout import Layout, layout_of, memory_order, positions_of
from flexnorm.nn import BatchNorm2d, reference, rules

BACKENDS = ["c", "torch", "composed"]
SHAPES = [(6, 4), (5, 3, 7), (4, 6, 5, 3), (2, 3, 4, 3, 2), (1, 4, 6, 6), (3, 1, 4, 4), (3, 4, 1, 1), (3, 300, 2, 2)]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test on one implementation of the passes, however small the tensors are."""
    name: str = request.param
    if name == "c" and normalization.load() is None:
        pytest.skip("no C compiler on this machine")

    def layout_of(x: Tensor) -> Layout:
        size = (x.shape[0], x.shape[1], positions_of(x))
        order = memory_order(x)
        usable = order != "none" and size[2] >= 2 and x.numel() > 0
        if name == "torch":
            usable = usable and order == "rows" and x.dtype in (torch.float32, torch.float64)
        return Layout(name if usable else "composed", order, size)

    monkeypatch.setattr("flexnorm.engine.functional.layout_of", layout_of)
    return name


def tensors(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    x = torch.randn(shape, dtype=torch.float64) * 2 + 3
    channel = [torch.rand(shape[1], dtype=torch.float64) + 0.5 for _ in range(3)]
    return [t.to(dtype).requires_grad_() for t in (x, *channel)]


RULES = {
    "batch": (lambda m, w, b, a: rules.batch(m, w, b), lambda x, w, b, a: reference.batch(x, w, b)),
    "instance": (lambda m, w, b, a: rules.instance(m, w, b), lambda x, w, b, a: reference.instance(x, w, b)),
    "layer": (lambda m, w, b, a: rules.layer(m, w, b), lambda x, w, b, a: reference.layer(x, w, b)),
    "group": (
        lambda m, w, b, a: rules.group(m, w, b, groups=max(1, w.numel() // 2)),
        lambda x, w, b, a: reference.group(x, w, b, groups=max(1, w.numel() // 2)),
    ),
    "unitized": (lambda m, w, b, a: rules.unitized(m, w, b, a), reference.unitized),
    "unitized rms": (
        lambda m, w, b, a: rules.unitized(m, w, b, a, unit_norm="rms"),
        lambda x, w, b, a: reference.unitized(x, w, b, a, unit_norm="rms"),
    ),
    "population": (
        lambda m, w, b, a: rules.population(m, b, a + 1, w, b),
        lambda x, w, b, a: reference.population(x, b, a + 1, w, b),
    ),
    "user": (
        lambda m, w, b, a: (w * m.pool("all").mean_square.rsqrt() * a, b * m.mean),
        lambda x, w, b, a: (
            x * (w * a).view(1, -1, *(1,) * (x.dim() - 2)) / x.square().mean().sqrt()
            + b.view(1, -1, *(1,) * (x.dim() - 2))
            * (x.mean(tuple(range(2, x.dim())), keepdim=True) if x.dim() > 2 else x)
        ),
    ),
}


def usable(name: str, shape: tuple[int, ...]) -> bool:
    """A single value has variance 0 whatever it is: there the reference is 0/0 and says nothing."""
    return name != "instance" or torch.Size(shape[2:]).numel() > 1


@pytest.mark.quick(62)
@pytest.mark.parametrize(("name", "shape"), [(n, s) for n in RULES for s in SHAPES if usable(n, s)], ids=str)
def test_equals_the_float64_reference_in_values_and_gradients(name: str, shape: tuple[int, ...], backend: str) -> None:
    rule, expected = RULES[name]
    ours, theirs = tensors(shape), tensors(shape)
    with torch.no_grad():
        for a, b in zip(theirs, ours, strict=True):
            a.copy_(b)
    weight = torch.randn(shape, dtype=torch.float64)
    y = flex_norm(ours[0], rule, *ours[1:])
    z = expected(*theirs)
    torch.testing.assert_close(y, z, rtol=1e-10, atol=1e-10)
    got = torch.autograd.grad((y * weight).sum(), ours, allow_unused=True)
    want = torch.autograd.grad((z * weight).sum(), theirs, allow_unused=True)
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if g is not None and w is not None:
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "holes": lambda x: torch.stack([x, x], -1)[..., 0],
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.quick(64)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 3, 7), (4, 6, 5, 3), (2, 3, 4, 3, 2), (3, 300, 3, 3)], ids=str)
def test_types_and_layouts(shape: tuple[int, ...], layout: str, dtype: torch.dtype, backend: str) -> None:
    x, w, b, a = tensors(shape)
    w, b, a = (t.detach().float().requires_grad_() if dtype != torch.float64 else t for t in (w, b, a))
    x = LAYOUTS[layout](x.detach().to(dtype)).detach().requires_grad_()
    y = flex_norm(x, rules.unitized, w, b, a)
    assert y.dtype == dtype
    kept = layout in ("contiguous", "channels last")
    assert y.stride() == (x if kept else torch.empty(shape)).stride()
    g = torch.randn(shape).to(dtype)
    gx, gw, gb, ga = torch.autograd.grad(y, (x, w, b, a), g)
    assert gx.dtype == dtype
    assert gw.dtype == w.dtype
    inputs = [t.detach().double().requires_grad_() for t in (x, w, b, a)]
    expected = reference.unitized(*inputs)
    want = torch.autograd.grad(expected, inputs, g.double())
    tolerance = {torch.float64: 1e-11, torch.float32: 3e-5, torch.bfloat16: 0.04, torch.float16: 0.006}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    for got, wanted in zip((gx, gw, gb, ga), want, strict=True):
        scale = wanted.abs().max().item()
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance * max(scale, 1))


@pytest.mark.quick(12)
@pytest.mark.parametrize("shape", [(3, 2), (2, 2, 3), (3, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("name", ["batch", "unitized", "layer", "user"])
def test_gradcheck_and_gradgradcheck(name: str, shape: tuple[int, ...], backend: str) -> None:
    rule = RULES[name][0]
    inputs = tensors(shape)
    assert gradcheck(lambda *t: flex_norm(t[0], rule, *t[1:]), inputs)
    assert gradgradcheck(lambda *t: flex_norm(t[0], rule, *t[1:]), inputs, atol=1e-4)


def test_gradients_of_some_inputs_only(backend: str) -> None:
    shape = (4, 3, 5, 5)
    everything = tensors(shape)
    g = torch.randn(shape, dtype=torch.float64)
    full = torch.autograd.grad(flex_norm(everything[0], rules.unitized, *everything[1:]), everything, g)
    for wanted in itertools.product([False, True], repeat=4):
        if not any(wanted):
            continue
        inputs = [t.detach().requires_grad_(keep) for t, keep in zip(everything, wanted, strict=True)]
        y = flex_norm(inputs[0], rules.unitized, *inputs[1:])
        got = torch.autograd.grad(y, [t for t in inputs if t.requires_grad], g)
        for a, b in zip(got, [f for f, keep in zip(full, wanted, strict=True) if keep], strict=True):
            torch.testing.assert_close(a, b)


def test_a_tensor_captured_by_the_rule_gets_its_gradient(backend: str) -> None:
    x, w, b, _ = tensors((4, 3, 5, 5))
    g = torch.randn(x.shape, dtype=torch.float64)
    captured = torch.autograd.grad(flex_norm(x, lambda m: rules.batch(m, w, b)), (x, w, b), g)
    passed = torch.autograd.grad(flex_norm(x, rules.batch, w, b), (x, w, b), g)
    for a, c in zip(captured, passed, strict=True):
        torch.testing.assert_close(a, c)


def test_backward_twice_over_one_graph_gives_the_same(backend: str) -> None:
    inputs = tensors((4, 3, 5, 5))
    y = flex_norm(inputs[0], rules.unitized, *inputs[1:])
    g = torch.randn(y.shape, dtype=torch.float64)
    first = torch.autograd.grad(y, inputs[1:], g, retain_graph=True)
    second = torch.autograd.grad(y, inputs, g, retain_graph=True)
    third = torch.autograd.grad(y, inputs, g, create_graph=True)
    fourth = torch.autograd.grad(y, inputs, g)
    for a, b in zip(first, second[1:], strict=True):
        assert torch.equal(a, b)
    for a, b, c in zip(second, third, fourth, strict=True):
        assert torch.equal(a, c)
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 0)], ids=str)
def test_empty_inputs_give_empty_outputs_and_zero_gradients(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    w, b = torch.ones(shape[1], requires_grad=True), torch.zeros(shape[1], requires_grad=True)
    y = flex_norm(x, rules.batch, w, b)
    assert y.shape == shape
    gx, gw, gb = torch.autograd.grad(y.sum(), (x, w, b))
    assert gx.shape == shape
    assert not gw.any()
    assert not gb.any()


def test_large_mean_keeps_its_digits() -> None:
    """E[x^2] - E[x]^2 would have lost all of them: 1e8 against a variance of 1, in 24 bits."""
    shape = (8, 16, 32, 32)
    base = torch.randn(shape, dtype=torch.float64)
    x = (base + 1e4).float().requires_grad_()
    w = torch.rand(16).requires_grad_()
    b = torch.rand(16).requires_grad_()
    g = torch.randn(shape)
    ours = flex_norm(x, rules.batch, w, b)
    double = [t.detach().double().requires_grad_() for t in (x, w, b)]
    exact = reference.batch(*double)
    torch_own = torch.nn.functional.batch_norm(x, None, None, w, b, True, 0.1, 1e-5)
    assert (ours - exact).abs().max() <= 2 * (torch_own - exact).abs().max()
    got = torch.autograd.grad(ours, (x, w, b), g)
    want = torch.autograd.grad(exact, double, g.double())
    for a, c in zip(got, want, strict=True):
        assert (a - c).norm() / c.norm() < 2e-3


def test_compiled_kernels_are_used_for_large_activations() -> None:
    if normalization.load() is None:
        pytest.skip("no C compiler on this machine")
    big = torch.zeros(8, 16, 16, 16)
    assert layout_of(big).backend == "c"
    assert layout_of(big.to(memory_format=torch.channels_last)) == ("c", "cols", (8, 16, 256))
    assert layout_of(torch.zeros(2, 4, 4, 4)).backend == "torch"
    assert layout_of(torch.zeros(200, 200)).backend == "composed"
    assert layout_of(big.transpose(2, 3)).order == "none"


def test_only_x_and_tables_are_saved() -> None:
    x = torch.randn(8, 16, 16, 16, requires_grad=True)
    w, b, a = (torch.rand(16, requires_grad=True) for _ in range(3))
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        flex_norm(x, rules.unitized, w, b, a)
    large = {t.untyped_storage().data_ptr() for t in saved if t.numel() > 8 * 16}
    assert large == {x.untyped_storage().data_ptr()}


@pytest.mark.parametrize(("shape", "axis"), [((64, 300), 1), ((4, 40, 300), -1), ((4, 3, 50, 50), 1)])
@pytest.mark.parametrize("rule", [rules.batch, rules.layer, rules.instance])
def test_a_call_leaves_no_circle_of_objects_that_keeps_its_graph(rule, shape: tuple[int, ...], axis: int) -> None:
    x = torch.randn(shape, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        flex_norm(2 * x, lambda moments: rule(moments), channel_axis=axis).sum().backward()
        assert not [thing for thing in gc.get_objects() if issubclass(type(thing), Moments)]
    finally:
        gc.enable()


@pytest.mark.parametrize("over", ["batch", "channels", None])
@pytest.mark.parametrize(("shape", "axis"), [((8, 16, 16, 16), 1), ((8, 16, 40), -1)])
def test_moments_that_are_first_read_without_gradients_have_them_later(over, shape: tuple[int, ...], axis: int) -> None:
    def rule(moments: Moments, quietly: bool) -> tuple[Tensor, Tensor]:
        pooled = moments if over is None else moments.pool(over)
        if quietly:
            with torch.no_grad():
                assert not pooled.mean.sum().isnan()
        return (pooled.var + 1e-5).rsqrt(), -pooled.mean

    for memory_format in (torch.contiguous_format, torch.channels_last)[: len(shape) - 2]:
        x = torch.randn(shape).to(memory_format=memory_format).requires_grad_()
        g = torch.randn(shape)
        quiet, plain = (
            torch.autograd.grad(flex_norm(x, rule, quietly, channel_axis=axis), x, g)[0] for quietly in (True, False)
        )
        torch.testing.assert_close(quiet, plain)


def test_in_place_activation_may_follow(backend: str) -> None:
    inputs = tensors((4, 3, 5, 5))
    y = torch.relu_(flex_norm(inputs[0], rules.unitized, *inputs[1:]))
    z = torch.relu(reference.unitized(*inputs))
    for a, b in zip(torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(z.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_traces_the_plain_composition(dynamic: bool) -> None:
    torch._dynamo.reset()
    inputs = tensors((4, 3, 5, 5), torch.float32)

    def run(*t: Tensor) -> Tensor:
        return flex_norm(t[0], rules.unitized, *t[1:])

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    y, z = compiled(*inputs), run(*inputs)
    torch.testing.assert_close(y, z)
    g = torch.randn(y.shape)
    for a, b in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(z, inputs, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_vmap_and_per_sample_gradients() -> None:
    x = torch.randn(5, 4, 3, 3)
    w, b = torch.rand(4), torch.rand(4)

    def loss(w: Tensor, b: Tensor, sample: Tensor) -> Tensor:
        return flex_norm(sample[None], rules.layer, w, b).square().sum()

    gw, gb = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, None, 0))(w, b, x)
    for i in range(5):
        ow, ob = w.clone().requires_grad_(), b.clone().requires_grad_()
        a, c = torch.autograd.grad(loss(ow, ob, x[i]), (ow, ob))
        torch.testing.assert_close(gw[i], a)
        torch.testing.assert_close(gb[i], c)


def test_forward_mode_agrees_with_backward() -> None:
    x, w, b, a = tensors((3, 2, 3, 3))
    t = torch.randn(x.shape, dtype=torch.float64)
    value, tangent = torch.func.jvp(lambda x: flex_norm(x, rules.unitized, w, b, a), (x.detach(),), (t,))
    g = torch.randn(x.shape, dtype=torch.float64)
    y = flex_norm(x, rules.unitized, w, b, a)
    torch.testing.assert_close(value, y)
    torch.testing.assert_close((tangent * g).sum(), (torch.autograd.grad(y, x, g)[0] * t).sum())


def test_meta_device() -> None:
    assert flex_norm(torch.empty(2, 3, 4, 4, device="meta"), rules.batch).shape == (2, 3, 4, 4)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    inputs = tensors((4, 3, 5, 5))

    def run(*t: Tensor) -> Tensor:
        return flex_norm(t[0], rules.unitized, *t[1:]).tanh()

    for reentrant in (False, True):
        y = torch.utils.checkpoint.checkpoint(run, *inputs, use_reentrant=reentrant)
        y.sum().backward()
        got = [t.grad for t in inputs]
        for t in inputs:
            t.grad = None
        for a, b in zip(got, torch.autograd.grad(run(*inputs).sum(), inputs), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: flex_norm(torch.ones(3), rules.batch), ValueError, r"got shape \(3,\)"),
        (lambda: flex_norm(torch.ones(1, 1, 1, 1, 1, 1), rules.batch), ValueError, "1 to 3 spatial axes"),
        (lambda: flex_norm(torch.ones(2, 3, dtype=torch.long), rules.batch), TypeError, "int64"),
        (lambda: flex_norm("x", rules.batch), TypeError, "got str"),
        (lambda: flex_norm(torch.ones(2, 3), lambda m: m.mean), TypeError, "pair"),
        (lambda: flex_norm(torch.ones(2, 3), lambda m: (m.mean, torch.ones(7))), ValueError, r"shift of shape \(7,\)"),
        (lambda: flex_norm(torch.ones(2, 3), lambda m: rules.group(m, groups=2)), ValueError, "does not divide"),
        (lambda: Moments(torch.ones(2, 3), torch.ones(2, 3)).pool("bacth"), ValueError, "did you mean 'batch'"),
        (lambda: Moments(torch.ones(2, 3), torch.ones(2, 3)).pool("batch", groups=3), ValueError, "groups=3"),
        (lambda: Moments(torch.ones(2, 3)), TypeError, "both mean and var"),
    ],
)
def test_errors_say_what_was_wrong(call, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("over", ["batch", "channels", "all"])
def test_pooled_moments_are_those_of_the_union(over: str) -> None:
    x = torch.randn(4, 6, 5, dtype=torch.float64) * 3 + torch.arange(6.0).view(1, 6, 1)
    mean, var = x.mean(2), x.var(2, correction=0)
    pooled = Moments(mean, var, 5).pool(over)
    axes = {"batch": (0, 2), "channels": (1, 2), "all": (0, 1, 2)}[over]
    torch.testing.assert_close(pooled.mean.flatten(), x.mean(axes).flatten())
    torch.testing.assert_close(pooled.var.flatten(), x.var(axes, correction=0).flatten())
    assert pooled.count == x.numel() // pooled.mean.numel()
    grouped = Moments(mean, var, 5).pool("channels", groups=3)
    torch.testing.assert_close(grouped.mean[:, ::2], x.view(4, 3, 10).mean(2))
    torch.testing.assert_close(grouped.var[:, 1::2], x.view(4, 3, 10).var(2, correction=0))
    assert Moments(mean, var, 5).pool("channels", groups=6).mean is mean
    assert "count=5" in repr(Moments(mean, var, 5))


def test_moments_are_lazy_and_detach_costs_no_graph() -> None:
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    seen: list[Moments] = []

    def rule(moments: Moments) -> tuple[Tensor, Tensor]:
        seen.append(moments)
        assert "not computed" in repr(moments)
        own = moments.detach()
        assert not own.mean.requires_grad
        return torch.full((3,), 2.0), own.mean

    y = flex_norm(x, rule)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.full_like(x, 2.0))
    assert seen[0]._mean is None


def test_top_level_names() -> None:
    assert flexnorm.flex_norm is flex_norm
    assert set(flexnorm.__all__) <= set(dir(flexnorm))
    assert flexnorm.nn.rules is rules
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        flexnorm.nope  # noqa: B018


@pytest.mark.parametrize("norm", ["paper", "rms"])
@pytest.mark.parametrize("shape", [(16, 40, 8, 8), (7, 300, 4, 4)], ids=str)
def test_fused_tables_equal_the_composition(shape: tuple[int, ...], norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large activations take pooling, folding and unitization in compiled calls; FLEXNORM_KERNELS=0 takes none."""
    if normalization.load() is None:
        pytest.skip("no C compiler on this machine")
    monkeypatch.setattr(layout, "_SMALL", 1)
    g = torch.randn(shape, dtype=torch.float64)
    inputs = tensors(shape)
    fused = flex_norm(inputs[0], lambda m, *p: rules.unitized(m, *p, unit_norm=norm), *inputs[1:])
    got = torch.autograd.grad(fused, inputs, g)
    monkeypatch.setattr(normalization, "load", lambda: None)
    plain = flex_norm(inputs[0], lambda m, *p: rules.unitized(m, *p, unit_norm=norm), *inputs[1:])
    want = torch.autograd.grad(plain, inputs, g)
    torch.testing.assert_close(fused, plain, rtol=1e-11, atol=1e-11)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_compiled_running_statistics_equal_the_composed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    if normalization.load() is None:
        pytest.skip("no C compiler on this machine")
    for momentum in (0.3, None):
        compiled, composed = (flexnorm.nn.BatchNorm2d(8, momentum=momentum) for _ in range(2))
        for step in range(3):
            x = torch.randn(16, 8, 32, 48) * (step + 1) + step
            if step == 1:
                x[0, 3, 0, 0] = float("nan")
            version = compiled.running_mean._version
            compiled(x)
            assert compiled.running_mean._version > version
            with monkeypatch.context() as patch:
                patch.setattr(normalization, "load", lambda: None)
                composed(x)
        for a, b in zip(compiled.state_dict().values(), composed.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("shape", [(3, 4, 5, 5), (16, 8, 40, 40)])
@pytest.mark.parametrize("norm", ["batch", "group", "unitized", "population"])
def test_a_trace_holds_the_operations_and_not_the_numbers(norm: str, shape: tuple[int, ...]) -> None:
    """torch.jit.trace records what torch does: a kernel of ours would leave its result in the trace as a constant."""
    layer = flexnorm.nn.make_norm(norm, shape[1]).eval()
    for parameter in layer.parameters():
        torch.nn.init.uniform_(parameter, 0.5, 1.5)
    with torch.no_grad():
        traced = torch.jit.trace(layer, torch.randn(shape), check_trace=False)
        x = torch.randn(shape)
        torch.testing.assert_close(traced(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", [{}, {"channel_axis": -1}, {"per_position": True}], ids=["samples", "tokens", "each"])
def test_a_loss_of_the_output_and_of_its_gradient(backend: str, where: dict[str, Any]) -> None:
    """Gradient penalties: the second backward goes through the node of the output and through those of the first."""
    x, (weight, bias) = torch.randn(8, 16, 8, 16, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)

    def mixed(m: Moments) -> tuple[torch.Tensor, torch.Tensor]:
        batch, own = m.pool("batch"), m.pool("channels")
        scale = weight * (own.var + 0.1).rsqrt()
        return scale, bias - (own.mean + 1) * scale + batch.mean * (batch.var + 0.1).rsqrt()

    def naive(leaf: torch.Tensor) -> torch.Tensor:
        axis = where.get("channel_axis", 1)
        over = (axis,) if where else (1, 2, 3)
        rest = [d for d in range(4) if d != axis % 4]
        shape = [1] * 4
        shape[axis] = 16
        own_var, own_mean = torch.var_mean(leaf, over, correction=0, keepdim=True)
        var, mean = torch.var_mean(leaf, rest, correction=0, keepdim=True)
        y = weight.view(shape) * (leaf - own_mean - 1) / (own_var + 0.1).sqrt()
        return y + bias.view(shape) + mean / (var + 0.1).sqrt()

    found = []
    for function in (lambda leaf: flex_norm(leaf, mixed, **where), naive):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        (first,) = torch.autograd.grad((y**3).sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum() + (y**3).sum(), leaf)[0])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_a_rule_of_ones_own_is_what_small_inputs_are_normalized_by() -> None:
    own = type("Own", (BatchNorm2d,), {"rule": lambda self, moments: (self.weight, self.bias)})
    x = torch.randn(2, 6, 3, 3)
    for layer in (own(6).train(), own(6).eval()):
        torch.testing.assert_close(layer(x), x)
