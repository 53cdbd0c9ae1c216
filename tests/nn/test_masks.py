"""Layers of tokens, with masks and segments, against plain float64 compositions on the values that count alone."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import flexnorm.nn as fx
from flexnorm.engine import FlexNorm, Segments
from flexnorm.nn import reference

EPS = 1e-5
SIZES = {"B": 3, "T": 11, "C": 6}  # 33 tokens: more than population normalization calls few
OPTIONS: dict[str, dict] = {"group": {"num_groups": 3}, "renorm": {"warmup": 0, "ramp": 0}}
TOKEN_NORMS = [n for n, layers in fx.NORMS.items() if n != "none" and not next(iter(layers.values())).pools_positions]
POOLING = [n for n, layers in fx.NORMS.items() if n != "none" and next(iter(layers.values())).pools_positions]
STATISTICS = [n for n in fx.NORMS if n != "none" and fx.make_norm(n, 6)._buffers.get("running_mean") is not None]


def made(name: str, **kwargs: object) -> FlexNorm:
    torch.manual_seed(3)
    layer = fx.make_norm(name, SIZES["C"], **{"ndim": 1, "dtype": torch.float64, **OPTIONS.get(name, {}), **kwargs})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.rand_like(parameter) + 0.25)
    return layer


def data(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 1


def expected(layer: FlexNorm, x: Tensor, kept: Tensor, frozen_values: Tensor | None = None) -> Tensor:
    """The layer on tokens ``x`` (R, C), batch statistics from the rows ``kept`` alone, by the definitions."""
    name, w, b = layer.norm_name, layer.weight, layer.bias
    counted = x[kept]
    mean, var = counted.mean(0), counted.var(0, correction=0)
    if name in ("layer", "rms", "group"):
        rows = {"layer": reference.layer, "rms": reference.rms, "group": reference.group}[name]
        options = {"groups": 3} if name == "group" else {}
        options |= {"eps": torch.finfo(x.dtype).eps} if name == "rms" else {"bias": b}
        return rows(x, w, **options)
    if name == "renorm":
        mean_run, var_run = torch.zeros_like(mean), torch.ones_like(var)
        sigma, run = (var + EPS).sqrt(), (var_run + EPS).sqrt()
        r, d = (sigma / run).detach(), ((mean - mean_run) / run).detach()
        r_max, d_max = (1.0, 0.0)
        return ((x - mean) / sigma * r.clamp(1 / r_max, r_max) + d.clamp(-d_max, d_max)) * w + b
    if name == "unitized":
        return reference.unitized(x, w, b, layer.alpha, mean, var)
    if name == "mean_only":
        return (x - mean) * w + b
    if name == "variance_only":
        return x / (var + EPS).sqrt() * w + b
    return (x - mean) / (var + EPS).sqrt() * w + b


def per_sample(layer: FlexNorm, samples: list[Tensor]) -> list[Tensor]:
    """A layer that pools positions on samples (P, C) of any length, by the definitions."""
    w, b, eps = layer.weight, layer.bias, layer.eps
    joined = torch.cat(samples)
    batch_mean, batch_var = joined.mean(0), joined.var(0, correction=0)
    made = []
    for x in samples:
        mean, var = x.mean(0), x.var(0, correction=0)
        own, of_batch = (x - mean) / (var + eps).sqrt(), (x - batch_mean) / (batch_var + eps).sqrt()
        if layer.norm_name == "frn":
            y = x / (x.square().mean(0) + eps).sqrt()
        elif layer.norm_name == "switchable":
            first, second = layer.mean_weight.softmax(0), layer.var_weight.softmax(0)
            centre = first[0] * mean + first[1] * x.mean() + first[2] * batch_mean
            spread = second[0] * var + second[1] * x.var(correction=0) + second[2] * batch_var
            y = (x - centre) / (spread + eps).sqrt()
        elif layer.norm_name == "batch_instance":
            gate = layer.gate.clamp(0, 1)
            y = gate * of_batch + (1 - gate) * own
        elif layer.norm_name == "layer":
            y = (x - x.mean()) / (x.var(correction=0) + eps).sqrt()
        else:
            y = own
        made.append(y * w + b)
    return made


def same_gradients(y: Tensor, z: Tensor, inputs: list[Tensor], g: Tensor) -> None:
    torch.testing.assert_close(y, z)
    for a, b in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(z, inputs, g), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("shape", [(33,), (3, 11), (3, 11, 1, 1), (60, 50)], ids=str)
@pytest.mark.parametrize("name", TOKEN_NORMS)
def test_tokens_in_training(name: str, shape: tuple[int, ...], masked: bool) -> None:
    layer, x = made(name, channel_axis=-1), data(*shape, 6).requires_grad_()
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6 if masked else torch.ones(shape) > 0
    y = layer(x, mask=keep if masked else None)
    rows = x.reshape(-1, 6)
    z = expected(layer, rows, keep.flatten()).view(x.shape)
    inputs = [x, *layer.parameters()]
    same_gradients(y, z, inputs, data(*y.shape, seed=2))
    if layer.running_mean is not None:
        counted = rows.detach()[keep.flatten()]
        rate = 1.0 if name == "population" else layer.momentum
        var = counted.var(0, correction=0) if name == "population" else counted.var(0)
        torch.testing.assert_close(layer.running_mean, rate * counted.mean(0))
        torch.testing.assert_close(layer.running_var, (1 - rate) + rate * var)


@pytest.mark.parametrize("name", [*POOLING, "layer"])
@pytest.mark.parametrize("how", ["last", "masked", "masked last", "segments", "masked segments"])
def test_samples_of_unequal_length(name: str, how: str) -> None:
    """Padding under a mask and rows in segments are two ways to say the same."""
    where = {"channel_axis": -1, "per_position": False} if "last" in how else {}
    layer = made(name, **where)
    if layer._parameters.get("tau") is not None:
        pytest.skip("built without")
    lengths = [7, 7, 7] if how == "last" else [4, 7, 2]
    samples = [data(n, 6, seed=n + i).requires_grad_() for i, n in enumerate(lengths)]
    wanted = torch.cat(per_sample(layer, samples))
    if "segments" in how:
        order = torch.randperm(13 + 2, generator=torch.Generator().manual_seed(5)) if "masked" in how else None
        rows, index = torch.cat(samples), torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
        keep = None
        if order is not None:
            rows = torch.cat([rows, torch.full((2, 6), 1e6, dtype=torch.float64)])[order]
            index, keep = torch.cat([index, torch.tensor([0, 2])])[order], (torch.arange(15) < 13)[order]
        y = layer(rows, mask=keep, segments=Segments(index, 3))
        y = y if order is None else y[order.argsort()][:13]
    else:
        padded = nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=1e6)
        keep = torch.arange(7) < torch.tensor(lengths)[:, None]
        mask = keep if "masked" in how else None
        y = layer(padded if "last" in how else padded.mT, mask=mask)
        y = (y if "last" in how else y.mT)[keep]
    same_gradients(y, wanted, [*samples, *layer.parameters()], data(*y.shape, seed=4))


@pytest.mark.parametrize("how", ["mask", "segments", "both"])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_of_instances_leave_out_samples_without_values(momentum: float | None, how: str) -> None:
    layer = made("instance", track_running_stats=True, momentum=momentum)
    samples = [data(5, 6, seed=1), data(3, 6, seed=2)]
    if how == "mask":
        padded = nn.utils.rnn.pad_sequence([*samples, data(5, 6)], batch_first=True)
        layer(padded.mT, mask=torch.arange(5) < torch.tensor([5, 3, 0])[:, None])
    else:
        index = torch.repeat_interleave(torch.tensor([0, 2, 1]), torch.tensor([5, 3, 2]))
        keep = torch.arange(10) < 8 if how == "both" else None
        rows = torch.cat([*samples, data(2, 6)])[: 10 if how == "both" else 8]
        layer(rows, mask=keep, segments=Segments(index[: len(rows)], 4))
    rate = momentum or 1.0
    mean, var = (torch.stack([f(s) for s in samples]).mean(0) for f in (lambda s: s.mean(0), lambda s: s.var(0)))
    torch.testing.assert_close(layer.running_mean, rate * mean)
    torch.testing.assert_close(layer.running_var, (1 - rate) + rate * var)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("per_position", [True, False])
@pytest.mark.parametrize("name", STATISTICS)
def test_a_batch_of_which_nothing_counts_changes_nothing(name: str, per_position: bool, momentum: float | None) -> None:
    if name in POOLING and per_position:
        per_position = False
    options = {"track_running_stats": True} if name == "instance" else {}
    layer = made(name, channel_axis=-1, per_position=per_position, momentum=momentum, **options)
    x = data(3, 11, 6)
    layer(x)
    before = copy.deepcopy(layer.state_dict())
    padding = x.clone().requires_grad_()
    y = layer(padding, mask=torch.zeros(3, 11, dtype=torch.bool))
    y.square().sum().backward()
    assert y.isfinite().all()
    assert all(t.grad.isfinite().all() for t in (padding, *layer.parameters()) if t.grad is not None)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", ["batch", "unitized", "population", "instance", "layer"])
@pytest.mark.parametrize("per_position", [True, False])
def test_weights_are_repetitions(name: str, per_position: bool) -> None:
    """A weight of 2 counts as two of the same value do; halves of all weights change no moments."""
    if name == "instance" and per_position:
        return
    options = {"track_running_stats": True} if name == "instance" else {}
    layers = [
        made(name, channel_axis=-1, **({} if name == "layer" else {"per_position": per_position}), **options)
        for _ in range(2)
    ]
    x, weights = data(2, 20, 6), torch.arange(40).view(2, 20) % 3
    weights[1] = weights[0]
    often = torch.repeat_interleave(x, weights[0], 1)
    y, z = layers[0](x, mask=weights), layers[1](often)
    torch.testing.assert_close(torch.repeat_interleave(y, weights[0], 1), z)
    torch.testing.assert_close(layers[0].state_dict(), layers[1].state_dict())
    shares = layers[0].eval().train()(x, mask=weights * 0.01)
    if name not in ("population", "unitized"):  # what follows, and what divides by the number of positions
        torch.testing.assert_close(shares, y)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), name=st.sampled_from([*TOKEN_NORMS, *POOLING]), dead=st.integers(0, 32))
def test_what_the_mask_hides_does_not_matter(seed: int, name: str, dead: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keep = torch.ones(33, dtype=torch.bool)
    keep[torch.randperm(33, generator=generator)[:dead]] = False
    keep = keep.view(3, 11)
    found = []
    for hidden in (0.0, float("nan")):
        layer = made(name, channel_axis=-1)
        x = torch.where(keep.unsqueeze(-1), data(3, 11, 6, seed=seed), hidden).requires_grad_()
        y = layer(x, mask=keep)[keep]
        (grad, *rest) = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
        found.append((y, grad[keep], *rest, *layer.buffers()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
        assert a.isfinite().all()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    name=st.sampled_from(["layer", "instance", "frn", "unitized", "group"]),
)
def test_segments_are_graphs_whatever_the_order_of_the_rows(seed: int, sizes: list[int], name: str) -> None:
    if sum(sizes) < 2:
        sizes = [*sizes, 3]
    layer = made(name).eval() if name == "instance" else made(name)
    index = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    rows = data(len(index), 6, seed=seed)
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))
    y = layer(rows, segments=Segments(index, len(sizes)))
    torch.testing.assert_close(layer(rows[order], segments=Segments(index[order], len(sizes))), y[order])
    if name in ("layer", "instance", "frn"):
        graphs = [g for g in rows.split(sizes) if len(g)]
        torch.testing.assert_close(torch.cat(per_sample(layer, graphs)), y)


def test_segments_serve_many_layers_and_graph_norm_is_instance_normalization_of_graphs() -> None:
    segments = Segments(torch.tensor([0, 0, 0, 1, 1]))
    model = nn.ModuleList([made("instance"), made("layer"), fx.LayerNorm(6, dtype=torch.float64), made("batch")])
    x = data(5, 6)
    first, second, third, fourth = (layer(x, segments=segments) for layer in model)
    torch.testing.assert_close(first[:3].mean(0), model[0].bias)
    torch.testing.assert_close(second, torch.cat(per_sample(model[1], [x[:3], x[3:]])))
    torch.testing.assert_close(third, torch.cat([nn.functional.layer_norm(g, g.shape) for g in (x[:3], x[3:])]))
    torch.testing.assert_close(fourth, model[3].train()(x))


@pytest.mark.parametrize("name", ["batch", "population", "instance"])
def test_frozen_and_evaluation_ignore_the_mask(name: str) -> None:
    layer = made(name, channel_axis=-1, **({"track_running_stats": True} if name == "instance" else {}))
    x, keep = data(3, 11, 6), torch.arange(11).expand(3, 11) < 6
    layer(x)
    for mode in (lambda: layer.eval(), lambda: layer.freeze().train()):
        mode()
        torch.testing.assert_close(layer(x, mask=keep), layer(x))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", STATISTICS)
def test_checkpointing_with_a_mask_counts_once(name: str, reentrant: bool) -> None:
    plain, again = made(name, channel_axis=-1), made(name, channel_axis=-1)
    x, keep = data(3, 11, 6), torch.arange(11).expand(3, 11) < torch.tensor([[4], [11], [9]])
    x.requires_grad_()
    (grad,) = torch.autograd.grad(plain(x, mask=keep)[keep].square().sum(), x)
    y = checkpoint(again, x, keep, use_reentrant=reentrant)
    y[keep].square().sum().backward()
    torch.testing.assert_close(x.grad, grad)
    torch.testing.assert_close(again.state_dict(), plain.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["batch", "layer", "rms", "unitized", "instance"])
def test_half_precision_with_masks_is_counted_in_float32(name: str, dtype: torch.dtype) -> None:
    exact, layer = made(name, channel_axis=-1), made(name, channel_axis=-1, dtype=torch.float32)
    layer.load_state_dict(exact.state_dict())
    x, keep = data(3, 11, 6).to(dtype), torch.arange(11).expand(3, 11) < 6
    y = layer(x, mask=keep)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact(x.double(), mask=keep), atol=0.05, rtol=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(
            layer(x.float(), mask=keep).double(), exact(x.double(), mask=keep), atol=0.05, rtol=0.02
        )


@pytest.mark.parametrize("name", ["batch", "layer", "group", "unitized", "instance"])
def test_derivatives_of_both_orders(name: str) -> None:
    layer = made(name, channel_axis=-1)
    x, keep = data(2, 3, 6).requires_grad_(), torch.tensor([[1, 1, 0], [1, 1, 1]])
    layer.train(name != "instance")

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(dict(layer.named_parameters()), parameters, strict=True))
        with torch.no_grad():
            state = {k: v.clone() for k, v in layer.named_buffers()}
        return torch.func.functional_call(layer, {**named, **state}, (x, keep))

    inputs = (x, *(p.detach().clone().requires_grad_() for p in layer.parameters()))
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)
    rows, plain = torch.tensor([0, 1, 0, 1, 1]), made(name).train(name != "instance")

    def graphs(x: Tensor) -> Tensor:
        state = {k: v.clone() for k, v in plain.named_buffers()}
        return torch.func.functional_call(plain, state, (x, None, Segments(rows, 2)))

    assert torch.autograd.gradcheck(graphs, data(5, 6).requires_grad_())
    assert torch.autograd.gradgradcheck(graphs, data(5, 6).requires_grad_())


@pytest.mark.parametrize("name", ["layer", "rms", "group"])
def test_per_sample_gradients_by_vmap(name: str) -> None:
    layer, x = made(name, channel_axis=-1), data(4, 3, 6)
    keep = torch.ones(3)

    def loss(parameters: dict, x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x, keep)).square().sum()

    parameters = {k: p.detach() for k, p in layer.named_parameters()}
    many = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i in range(4):
        one = torch.func.grad(loss)(parameters, x[i])
        for key, value in one.items():
            torch.testing.assert_close(many[key][i], value)


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("name", TOKEN_NORMS)
def test_no_row_and_one(name: str, rows: int) -> None:
    layer = made(name, channel_axis=-1)
    x = data(rows, 6).requires_grad_()
    if rows and fx.needs_batch(layer):
        with pytest.raises(ValueError, match="more than 1 value"):
            layer(x)
        layer.eval()
    y = layer(x, mask=torch.ones(rows))
    y.sum().backward()
    assert y.shape == x.shape
    assert x.grad.isfinite().all()
    by_segments = made("layer")(data(rows, 6), segments=Segments(torch.zeros(rows, dtype=torch.long), 2))
    assert by_segments.shape == (rows, 6)


@pytest.mark.parametrize("name", ["batch", "layer", "unitized", "instance"])
def test_strides_do_not_matter(name: str) -> None:
    x, keep = data(12, 20, 6), torch.arange(20).expand(12, 20) < 13
    views = [x.transpose(0, 1).contiguous().transpose(0, 1), x.movedim(-1, 0).contiguous().movedim(0, -1)]
    views.append(torch.stack([x, x], -1)[..., 0])
    wanted = made(name, channel_axis=-1)(x, mask=keep)
    for view in views:
        torch.testing.assert_close(made(name, channel_axis=-1)(view, mask=keep.T.contiguous().T), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["batch", "layer", "rms", "unitized", "instance", "population"])
def test_compiles_for_any_length_once(name: str) -> None:
    torch._dynamo.reset()
    layer, eager = (made(name, channel_axis=-1, dtype=torch.float32) for _ in range(2))
    count = CompileCounter()
    run = torch.compile(lambda x, keep: layer(x, mask=keep), backend=count, fullgraph=True, dynamic=True)
    for batch, length in ((3, 11), (4, 13), (5, 17)):
        x, keep = data(batch, length, 6).float(), torch.arange(length).expand(batch, length) < length - 2
        torch.testing.assert_close(run(x, keep), eager(x, mask=keep))
    torch.testing.assert_close(layer.state_dict(), eager.state_dict())
    assert count.frame_count == 1
    torch._dynamo.reset()
    made_of = torch.compile(lambda x, index: plain(x, segments=Segments(index, 3)), backend="eager", fullgraph=True)
    plain = made("layer", dtype=torch.float32)
    rows, index = data(9, 6).float(), torch.arange(9) % 3
    torch.testing.assert_close(made_of(rows, index), plain(rows, segments=index))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["batch", "layer", "rms", "instance"])
def test_exports_with_a_mask(name: str) -> None:
    layer = made(name, channel_axis=-1, dtype=torch.float32).eval()
    x, keep = data(3, 11, 6).float(), torch.arange(11).expand(3, 11) < 9
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(layer, (x, keep), dynamic_shapes=({1: length}, {1: length}), strict=False)
    torch.testing.assert_close(program.module()(x[:, :8], keep[:, :8]), layer(x[:, :8], mask=keep[:, :8]))


@pytest.mark.parametrize("name", STATISTICS)
def test_copies_pickles_and_state_dicts_after_a_masked_batch(name: str) -> None:
    layer = made(name, channel_axis=-1)
    x, keep = data(3, 11, 6), torch.arange(11).expand(3, 11) < 6
    layer(x, mask=keep)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = made(name, channel_axis=-1)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    wanted = layer.eval()(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(other.eval()(x), wanted)


def test_torchs_state_dicts_load_both_ways_for_any_shape() -> None:
    for shape in (6, (6,), (11, 6), (3, 11, 6), torch.Size([6])):
        for ours, theirs in ((fx.LayerNorm(shape), nn.LayerNorm(shape)), (fx.RMSNorm(shape), nn.RMSNorm(shape))):
            with torch.no_grad():
                for p in theirs.parameters():
                    p.normal_()
            ours.load_state_dict(theirs.state_dict())
            theirs.load_state_dict(ours.state_dict())
            x = data(3, 11, 6).float()
            torch.testing.assert_close(ours(x), theirs(x))
            assert (ours.normalized_shape, ours.eps) == (theirs.normalized_shape, theirs.eps)
            assert ours.elementwise_affine is theirs.elementwise_affine is True
    x = data(6).float()
    torch.testing.assert_close(fx.LayerNorm(6)(x), nn.LayerNorm(6)(x))
    assert fx.LayerNorm(6, bias=False).bias is None
    assert not list(fx.LayerNorm(6, elementwise_affine=False).parameters())
    with pytest.raises(ValueError, match="normalized_shape is"):
        fx.LayerNorm((2, 3), channel_axis=1)
    with pytest.raises(ValueError, match="normalized_shape is"):
        fx.RMSNorm(())


def test_what_does_not_fit_is_named() -> None:
    layer = made("batch", channel_axis=-1)
    with pytest.raises(ValueError, match=r"at least 2 axes"):
        layer(data(6))
    with pytest.raises(ValueError, match=r"mask of shape \(3,\) does not fit"):
        layer(data(3, 11, 6), mask=torch.ones(3))
    with pytest.raises(ValueError, match="segments"):
        layer(data(3, 11, 6), segments=torch.zeros(33, dtype=torch.long))
    with pytest.raises(ValueError, match="was built for 6 channels"):
        layer(data(3, 11, 5))
    with pytest.raises(ValueError, match="leaves it none"):
        made("instance", per_position=True)


def test_the_thresholded_unit_finds_the_channels() -> None:
    x = data(3, 11, 6)
    plain, layer = fx.FilterResponseNorm1d(6, dtype=torch.float64), None
    with torch.no_grad():
        plain.tau.copy_(torch.linspace(-1, 1, 6))
    layer = fx.FilterResponseNorm1d(6, dtype=torch.float64, channel_axis=-1)
    layer.load_state_dict(plain.state_dict())
    torch.testing.assert_close(layer(x), plain(x.mT).mT)
    torch.testing.assert_close(plain(x[0], segments=torch.zeros(11, dtype=torch.long)), layer(x)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["layer", "instance", "batch", "unitized"])
def test_segments_of_any_type_and_strides(name: str, dtype: torch.dtype) -> None:
    exact, layer = made(name), made(name, dtype=torch.float32)
    layer.load_state_dict(exact.state_dict())
    x, index = data(20, 6).to(dtype), torch.arange(20) % 3
    strided = torch.stack([x, x], -1)[..., 0]
    y = layer(x, segments=index)
    assert y.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(y.double(), exact(x.double(), segments=index), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(layer(strided, segments=Segments(index)), y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(x, segments=index.int()), y)


def test_gradients_of_segments_under_vmap_over_parameters() -> None:
    layer, x, graphs = made("layer"), data(7, 6), Segments(torch.tensor([0, 1, 0, 2, 2, 1, 0]))

    def loss(weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (x,), {"segments": graphs}).pow(3).sum()

    weights = data(4, 6)
    many = torch.func.vmap(torch.func.grad(loss))(weights)
    for weight, found in zip(weights, many, strict=True):
        torch.testing.assert_close(found, torch.func.grad(loss)(weight))


@pytest.mark.slow
def test_exports_segments_of_a_known_number() -> None:
    class Graphs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = made("layer", dtype=torch.float32)

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return self.norm(x, segments=Segments(index, 3))

    model, x, index = Graphs(), data(9, 6).float(), torch.arange(9) % 3
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(model, (x, index), dynamic_shapes=({0: rows}, {0: rows}), strict=False)
    torch.testing.assert_close(program.module()(x[:5], index[:5]), model(x[:5], index[:5]))
