"""Every normalization layer against its reference, torch's own layer and the ways in which layers are used."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import flexnorm.nn as fx
from flexnorm.engine import FlexNorm, Moments
from flexnorm.kernels import normalization
from flexnorm.nn import reference


@dataclass(frozen=True)
class LayerInfo:
    """What the generated tests need to know of a layer."""

    build: Callable[..., FlexNorm]
    shape: tuple[int, ...]
    expected: Callable[[FlexNorm, Tensor], Tensor]
    torch_layer: Callable[[], nn.Module] | None = None
    mixes_samples: bool = False
    statistics: bool = False


def _batch(m: FlexNorm, x: Tensor) -> Tensor:
    return reference.batch(x, m.weight, m.bias, eps=m.eps)


def _unitized(m: FlexNorm, x: Tensor) -> Tensor:
    return reference.unitized(x, m.weight, m.bias, m.alpha, eps=m.eps, unit_norm=m.unit_norm)


def _population(m: FlexNorm, x: Tensor) -> Tensor:
    """After its first batch the population is that batch; with few values its statistics are constants."""
    axes = (0, *range(2, x.dim()))
    mean, var = x.mean(axes), x.var(axes, correction=0)
    if x.numel() // x.shape[1] < 16:
        mean, var = mean.detach(), var.detach()
    return reference.population(x, mean, var, m.weight, m.bias)


def _filter_response(m: FlexNorm, x: Tensor) -> Tensor:
    y = reference.filter_response(x, m.weight, m.bias, eps=m.eps)
    return torch.maximum(y, m.tau.view((1, -1) + (1,) * (x.dim() - 2)))


def _renorm(m: FlexNorm, x: Tensor) -> Tensor:
    start = torch.zeros(6, dtype=x.dtype), torch.ones(6, dtype=x.dtype)
    r_max, d_max = (3.0, 5.0) if m.num_batches_tracked > 1 else (1.0, 0.0)
    return reference.renorm(x, *start, m.weight, m.bias, r_max=r_max, d_max=d_max)


def _last_axes(m: FlexNorm, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    x = x if m.channel_axis == -1 else x.movedim(1, -1)
    return x, tuple(range(-len(m.normalized_shape), 0))


def _back(m: FlexNorm, y: Tensor) -> Tensor:
    return y if m.channel_axis == -1 else y.movedim(-1, 1)


def _last_layer(m: FlexNorm, x: Tensor) -> Tensor:
    x, axes = _last_axes(m, x)
    centered = x - x.mean(axes, keepdim=True)
    return _back(m, centered / (centered.square().mean(axes, keepdim=True) + 1e-5).sqrt() * m.weight + m.bias)


def _last_rms(m: FlexNorm, x: Tensor) -> Tensor:
    x, axes = _last_axes(m, x)
    eps = torch.finfo(x.dtype).eps
    return _back(m, x / (x.square().mean(axes, keepdim=True) + eps).sqrt() * m.weight)


IMAGE, SEQUENCE, VOLUME, FLAT = (4, 6, 5, 3), (4, 6, 7), (3, 6, 2, 3, 4), (5, 6)
LAYERS = {
    "BatchNorm1d flat": LayerInfo(
        lambda **k: fx.BatchNorm1d(6, **k), FLAT, _batch, lambda: nn.BatchNorm1d(6), True, True
    ),
    "BatchNorm1d": LayerInfo(
        lambda **k: fx.BatchNorm1d(6, **k), SEQUENCE, _batch, lambda: nn.BatchNorm1d(6), True, True
    ),
    "BatchNorm2d": LayerInfo(lambda **k: fx.BatchNorm2d(6, **k), IMAGE, _batch, lambda: nn.BatchNorm2d(6), True, True),
    "BatchNorm3d": LayerInfo(lambda **k: fx.BatchNorm3d(6, **k), VOLUME, _batch, lambda: nn.BatchNorm3d(6), True, True),
    "UnitizedBatchNorm1d": LayerInfo(lambda **k: fx.UnitizedBatchNorm1d(6, **k), FLAT, _unitized, None, True, True),
    "UnitizedBatchNorm2d": LayerInfo(lambda **k: fx.UnitizedBatchNorm2d(6, **k), IMAGE, _unitized, None, True, True),
    "UnitizedBatchNorm2d rms": LayerInfo(
        lambda **k: fx.UnitizedBatchNorm2d(6, unit_norm="rms", **k), IMAGE, _unitized, None, True, True
    ),
    "UnitizedBatchNorm3d": LayerInfo(lambda **k: fx.UnitizedBatchNorm3d(6, **k), VOLUME, _unitized, None, True, True),
    "PopulationNorm1d": LayerInfo(lambda **k: fx.PopulationNorm1d(6, **k), FLAT, _population, None, False, True),
    "PopulationNorm2d": LayerInfo(lambda **k: fx.PopulationNorm2d(6, **k), IMAGE, _population, None, False, True),
    "PopulationNorm3d": LayerInfo(lambda **k: fx.PopulationNorm3d(6, **k), VOLUME, _population, None, False, True),
    "GroupNorm": LayerInfo(
        lambda **k: fx.GroupNorm(3, 6, **k),
        IMAGE,
        lambda m, x: reference.group(x, m.weight, m.bias, groups=3),
        lambda: nn.GroupNorm(3, 6),
    ),
    "GroupNorm flat": LayerInfo(
        lambda **k: fx.GroupNorm(2, 6, **k),
        FLAT,
        lambda m, x: reference.group(x, m.weight, m.bias, groups=2),
        lambda: nn.GroupNorm(2, 6),
    ),
    **{
        f"LayerNorm{d}d": LayerInfo(
            lambda d=d, **k: getattr(fx, f"LayerNorm{d}d")(6, **k),
            shape,
            lambda m, x: reference.layer(x, m.weight, m.bias),
            lambda: nn.GroupNorm(1, 6),
        )
        for d, shape in ((1, SEQUENCE), (2, IMAGE), (3, VOLUME))
    },
    **{
        f"InstanceNorm{d}d": LayerInfo(
            lambda d=d, **k: getattr(fx, f"InstanceNorm{d}d")(6, affine=True, **k),
            shape,
            lambda m, x: reference.instance(x, m.weight, m.bias),
            lambda d=d: getattr(nn, f"InstanceNorm{d}d")(6, affine=True),
        )
        for d, shape in ((1, SEQUENCE), (2, IMAGE), (3, VOLUME))
    },
}

for _d, _shape in ((1, SEQUENCE), (2, IMAGE), (3, VOLUME)):
    LAYERS |= {
        f"RMSNorm{_d}d": LayerInfo(
            lambda d=_d, **k: getattr(fx, f"RMSNorm{d}d")(6, **k), _shape, lambda m, x: reference.rms(x, m.weight)
        ),
        f"FilterResponseNorm{_d}d": LayerInfo(
            lambda d=_d, **k: getattr(fx, f"FilterResponseNorm{d}d")(6, **k), _shape, _filter_response
        ),
        f"BatchRenorm{_d}d": LayerInfo(
            lambda d=_d, **k: getattr(fx, f"BatchRenorm{d}d")(6, warmup=0, ramp=0, **k),
            _shape,
            _renorm,
            None,
            True,
            True,
        ),
        f"SwitchableNorm{_d}d": LayerInfo(
            lambda d=_d, **k: getattr(fx, f"SwitchableNorm{d}d")(6, **k),
            _shape,
            lambda m, x: reference.switchable(x, m.mean_weight, m.var_weight, m.weight, m.bias),
            None,
            True,
            True,
        ),
        f"BatchInstanceNorm{_d}d": LayerInfo(
            lambda d=_d, **k: getattr(fx, f"BatchInstanceNorm{d}d")(6, **k),
            _shape,
            lambda m, x: reference.batch_instance(x, m.gate, m.weight, m.bias),
            None,
            True,
            True,
        ),
        f"MeanOnlyBatchNorm{_d}d": LayerInfo(
            lambda d=_d, **k: getattr(fx, f"MeanOnlyBatchNorm{d}d")(6, **k),
            _shape,
            lambda m, x: reference.mean_only(x, m.weight, m.bias),
            None,
            True,
            True,
        ),
        f"VarianceOnlyBatchNorm{_d}d": LayerInfo(
            lambda d=_d, **k: getattr(fx, f"VarianceOnlyBatchNorm{d}d")(6, **k),
            _shape,
            lambda m, x: reference.variance_only(x, m.weight, m.bias),
            None,
            True,
            True,
        ),
    }

for _name, _place, _shape, _torch in (
    ("", {}, (4, 5, 6), lambda name: getattr(nn, name)(6)),
    (" of axes", {}, (4, 2, 3, 6), lambda name: getattr(nn, name)((2, 3, 6))),
    (" at each position", {"channel_axis": 1}, IMAGE, None),
):
    for _norm, _rule in (("LayerNorm", _last_layer), ("RMSNorm", _last_rms)):
        LAYERS[_norm + _name] = LayerInfo(
            lambda n=_norm, s=(2, 3, 6) if "axes" in _name else 6, p=_place, **k: getattr(fx, n)(s, **p, **k),
            _shape,
            _rule,
            _torch and (lambda n=_norm, t=_torch: t(n)),
        )

every_layer = pytest.mark.parametrize("info", LAYERS.values(), ids=LAYERS)


def randomized(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.rand_like(p) + 0.25)
    return module


def batch_of(info: LayerInfo, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(info.shape, dtype=torch.float64) * 2 + 1).to(dtype)


def test_every_layer_has_a_record() -> None:
    named = {name.split()[0] for name in LAYERS}
    layers = {n for n in fx.__all__ if inspect.isclass(c := getattr(fx, n)) and issubclass(c, FlexNorm)}
    assert layers == named


@pytest.mark.quick(14)
@every_layer
def test_training_forward_and_backward(info: LayerInfo) -> None:
    module = randomized(info.build(dtype=torch.float64))
    x = batch_of(info).requires_grad_()
    g = torch.randn(info.shape, dtype=torch.float64)
    y, z = module(x), info.expected(module, x)
    torch.testing.assert_close(y, z)
    inputs = [x, *module.parameters()]
    for a, b in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(z, inputs, g), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", [name for name, info in LAYERS.items() if info.torch_layer])
def test_same_as_torch_in_training_and_evaluation_with_its_state_dict(name: str) -> None:
    info = LAYERS[name]
    assert info.torch_layer is not None
    theirs = randomized(info.torch_layer())
    ours = info.build()
    ours.load_state_dict(theirs.state_dict())
    for _ in range(3):
        x = batch_of(info, torch.float32)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = batch_of(info, torch.float32)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0, None])
def test_running_statistics_follow_torch(momentum: float | None) -> None:
    ours, theirs = fx.BatchNorm2d(6, momentum=momentum), nn.BatchNorm2d(6, momentum=momentum)
    for _ in range(4):
        x = torch.randn(IMAGE) * 3 + 1
        ours(x), theirs(x)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    instance = fx.InstanceNorm2d(6, momentum=momentum, track_running_stats=True)
    peer = nn.InstanceNorm2d(6, momentum=0.1 if momentum is None else momentum, track_running_stats=True)
    for _ in range(2):
        x = torch.randn(IMAGE)
        instance(x), peer(x)
    if momentum is not None:
        torch.testing.assert_close(instance.running_mean, peer.running_mean)
        torch.testing.assert_close(instance.running_var, peer.running_var)
        torch.testing.assert_close(instance.eval()(x), peer.eval()(x))


@pytest.mark.quick(14)
@every_layer
def test_evaluation_uses_running_statistics(info: LayerInfo) -> None:
    module = randomized(info.build(dtype=torch.float64))
    for _ in range(2):
        module(batch_of(info))
    module.eval()
    x = batch_of(info)
    whole = module(x)
    alone = torch.cat([module(s) for s in x.split(1)])
    torch.testing.assert_close(whole, alone)
    if info.statistics:
        before = {k: v.clone() for k, v in module.state_dict().items()}
        module(x + 5)
        for key, value in module.state_dict().items():
            assert torch.equal(value, before[key])


@pytest.mark.quick(28)
@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_keeps_statistics_in_float32(info: LayerInfo, dtype: torch.dtype) -> None:
    module = randomized(info.build()).to(dtype)
    x = batch_of(info, dtype)
    y = module(x)
    assert y.dtype == dtype
    double = copy.deepcopy(module).double()
    expected = info.expected(double, x.double())
    torch.testing.assert_close(y.double(), expected, rtol=0.05, atol=0.05)
    for name, buffer in module.named_buffers():
        assert buffer.dtype in (torch.float32, torch.int64), name


@pytest.mark.quick(14)
@every_layer
def test_autocast_keeps_statistics_in_float32(info: LayerInfo) -> None:
    module = randomized(info.build())
    x = batch_of(info, torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None
    assert module.weight.grad.dtype == torch.float32


@pytest.mark.quick(14)
@every_layer
def test_copies_pickles_and_loads_weights_only(info: LayerInfo, tmp_path: Path) -> None:
    module = randomized(info.build())
    module(batch_of(info, torch.float32))
    x = batch_of(info, torch.float32)
    torch.save(module.state_dict(), tmp_path / "m.pt")
    loaded = info.build()
    loaded.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert torch.equal(other.eval()(x), module.eval()(x))
        assert repr(other) == repr(module)
        for a, b in zip(other.state_dict().values(), module.state_dict().values(), strict=True):
            assert torch.equal(a, b)
            assert a.data_ptr() != b.data_ptr() or a.numel() == 0


@pytest.mark.quick(4)
@every_layer
def test_compiles_whole_with_gradients_and_statistics(info: LayerInfo) -> None:
    torch._dynamo.reset()
    for momentum in ({"momentum": None}, {}) if info.statistics else ({},):
        module = randomized(info.build(**momentum))
        twin = copy.deepcopy(module)
        compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            x = batch_of(info, torch.float32)
            y, z = module(x), compiled(x)
            torch.testing.assert_close(y, z)
        for a, b in zip(
            torch.autograd.grad(y.sin().sum(), list(module.parameters())),
            torch.autograd.grad(z.sin().sum(), list(twin.parameters())),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        for a, b in zip(module.state_dict().values(), twin.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.quick(8)
@every_layer
def test_exports(info: LayerInfo) -> None:
    module = randomized(info.build()).eval()
    x = batch_of(info, torch.float32)
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.quick(14)
@every_layer
def test_checkpointing_counts_a_batch_once(info: LayerInfo) -> None:
    module, twin = info.build(), info.build()
    x = batch_of(info, torch.float32).requires_grad_()
    torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False).sum().backward()
    twin(x)
    for (name, a), b in zip(module.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.quick(14)
@every_layer
def test_device_and_dtype_reach_every_tensor(info: LayerInfo) -> None:
    module = info.build(device="meta", dtype=torch.float64)
    tensors = [*module.parameters(), *module.buffers()]
    assert {t.device.type for t in tensors} == {"meta"}
    assert {p.dtype for p in module.parameters()} == {torch.float64}


@pytest.mark.quick(14)
@every_layer
def test_empty_batch_leaves_statistics_alone(info: LayerInfo) -> None:
    module = info.build()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    x = torch.zeros((0, *info.shape[1:]), requires_grad=True)
    y = module(x)
    assert y.shape == x.shape
    y.sum().backward()
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.quick(14)
@every_layer
def test_wrong_inputs_are_named(info: LayerInfo) -> None:
    module = info.build()
    other = (2, *(5 if size == 6 else size for size in info.shape[1:]))
    with pytest.raises(ValueError, match=r"built for (6 channels.*got|the last axes).* 5"):
        module(torch.zeros(other))
    if getattr(module, "channel_axis", 1) == 1:
        with pytest.raises(ValueError, match=r"shape \(6,\)|shape \(2, 6, 1, 1, 1, 1\)"):
            module(torch.zeros(6))


@pytest.mark.parametrize("shape", [IMAGE, (16, 6, 16, 16)], ids=["small", "large"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    "name", [f"{n}2d" for n in ("BatchNorm", "UnitizedBatchNorm", "PopulationNorm", "BatchRenorm")]
)
def test_a_non_finite_batch_does_not_poison_the_statistics(
    name: str, momentum: float | None, shape: tuple[int, ...]
) -> None:
    """First, in the middle, whole or in one value: as if it had not been."""
    module, twin = (getattr(fx, name)(6, momentum=momentum) for _ in range(2))
    for k in range(3):
        bad = torch.randn(shape)
        bad[0, 2, 0, 0] = float("nan") if k else float("inf")
        module(bad)
        x = torch.randn(shape) + k
        module(x), twin(x)
    for (key, a), b in zip(module.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("shape", [IMAGE, (16, 6, 16, 16)], ids=["small", "large"])
@pytest.mark.parametrize("name", [n for n in LAYERS if LAYERS[n].statistics and n.endswith("2d")])
def test_training_between_an_evaluation_and_its_backward(name: str, shape: tuple[int, ...]) -> None:
    module = LAYERS[name].build()
    module(torch.randn(shape))
    x = torch.randn(shape, requires_grad=True)
    expected = torch.autograd.grad(module.eval()(x).square().sum(), x)[0]
    y = module.eval()(x)
    module.train()(torch.randn(shape))
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], expected)


@pytest.mark.parametrize("name", [n for n in LAYERS if n.endswith("2d")])
def test_batched_gradients_of_large_activations(name: str) -> None:
    module = LAYERS[name].build()
    x = torch.randn(16, 6, 16, 16, requires_grad=True)
    y = module(x)
    g = torch.randn(2, *y.shape)
    (batched,) = torch.autograd.grad(y, x, g, is_grads_batched=True, retain_graph=True)
    for k in range(2):
        torch.testing.assert_close(
            batched[k], torch.autograd.grad(y, x, g[k], retain_graph=True)[0], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", [n for n in LAYERS if n.endswith("2d")])
def test_second_derivatives_of_large_activations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, twin = (LAYERS[name].build(dtype=torch.float64) for _ in range(2))
    data = [torch.randn(16, 6, 16, 16, dtype=torch.float64) for _ in range(3)]
    results = []
    for layer in (module, twin):
        with monkeypatch.context() as patch:
            if layer is twin:
                patch.setattr(normalization, "load", lambda: None)
            layer(data[0])
            x = data[1].clone().requires_grad_()
            (first,) = torch.autograd.grad((layer(x) ** 3).sum(), x, create_graph=True)
            results.append(torch.autograd.grad((first * data[2]).sum(), x)[0])
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("reentrant", [False, True])
def test_renormalization_is_recomputed_by_the_statistics_it_had(reentrant: bool) -> None:
    module, twin = (fx.BatchRenorm2d(6, warmup=0, ramp=2) for _ in range(2))
    for _ in range(4):
        x = torch.randn(IMAGE) * 2 + 1
        module(x), twin(x)
    x = torch.randn(IMAGE, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=reentrant)
    y.pow(3).sum().backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(twin(x).pow(3).sum(), x)[0])


def test_half_precision_state_is_loaded_into_float32() -> None:
    state = {k: v.half() if v.is_floating_point() else v for k, v in fx.BatchNorm2d(6).state_dict().items()}
    module = fx.BatchNorm2d(6)
    module.load_state_dict(state, assign=True)
    assert module.running_mean.dtype == torch.float32
    population = fx.PopulationNorm2d(6, device="meta").to_empty(device="cpu")
    population.reset_parameters()
    assert population.clipped == 0
    tracked = fx.InstanceNorm2d(6, track_running_stats=True)
    tracked(torch.randn(IMAGE))
    before = tracked.running_mean.clone()
    tracked(torch.zeros(0, 6, 5, 3))
    assert torch.equal(before, tracked.running_mean)
    assert tracked.num_batches_tracked == 1


@pytest.mark.quick(9)
@pytest.mark.parametrize("name", [n for n in LAYERS if LAYERS[n].statistics])
def test_frozen_survives_train(name: str) -> None:
    info = LAYERS[name]
    module = info.build()
    module(batch_of(info, torch.float32))
    state = {k: v.clone() for k, v in module.state_dict().items()}
    assert module.freeze().train() is module
    assert "frozen=True" in repr(module)
    x = batch_of(info, torch.float32)
    y = module(x)
    for key, value in module.state_dict().items():
        assert torch.equal(value, state[key])
    assert torch.equal(y, copy.deepcopy(module).eval()(x))
    module.freeze(False)(x)
    assert not torch.equal(module.running_mean, state["running_mean"])


def test_errors_of_the_constructors() -> None:
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: fx.BatchNorm2d(-1), "num_features must not be negative, got -1"),
        (lambda: fx.BatchNorm2d(3, eps=-1.0), "eps must not be negative, got -1.0"),
        (lambda: fx.BatchNorm2d(3, momentum=1.5), "momentum must lie in"),
        (lambda: fx.BatchNorm2d(3, process_group="wrld"), "got 'wrld'"),
        (lambda: fx.GroupNorm(4, 6), "got 4 and 6"),
        (lambda: fx.UnitizedBatchNorm2d(6, norm="papr"), "did you mean 'paper'"),
        (lambda: fx.PopulationNorm2d(6, statistics="runing"), "did you mean 'running'"),
        (lambda: fx.PopulationNorm2d(6, gradient="bach"), "did you mean 'batch'"),
        (lambda: fx.PopulationNorm2d(6, max_ratio=0.5), "at least 1"),
        (lambda: fx.BatchRenorm2d(6, r_max=0.5), "r_max must be at least 1"),
        (lambda: fx.make_norm("bacth", 6), "did you mean 'batch'"),
        (lambda: fx.make_norm("batch", 6, ndim=4), "0 to 3, got 4"),
    ]
    for call, match in cases:
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(RuntimeError, match="nothing to freeze"):
        fx.LayerNorm2d(3).freeze()
    with pytest.raises(NotImplementedError, match="must implement rule"):
        FlexNorm(3)(torch.zeros(2, 3))


@pytest.mark.parametrize("layer", [fx.BatchNorm2d(3), fx.UnitizedBatchNorm2d(3), fx.InstanceNorm2d(3)])
def test_one_value_is_refused_with_advice(layer: FlexNorm) -> None:
    with pytest.raises(ValueError, match="more than 1"):
        layer(torch.zeros(1, 3, 1, 1))
    layer.eval()(torch.zeros(1, 3, 1, 1))


def test_no_affine_and_no_bias() -> None:
    for build in (fx.BatchNorm2d, fx.UnitizedBatchNorm2d, fx.PopulationNorm2d, fx.LayerNorm2d):
        assert build(3, affine=False).weight is None
        layer = build(3, bias=False)
        assert layer.bias is None
        assert layer(torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4)
    assert fx.GroupNorm(1, 3, bias=False).bias is None


def test_without_running_statistics_evaluation_uses_the_batch() -> None:
    layer = fx.BatchNorm2d(6, track_running_stats=False).eval()
    x = torch.randn(IMAGE)
    torch.testing.assert_close(layer(x), reference.batch(x))


def test_state_dict_without_counter_loads() -> None:
    state = nn.BatchNorm2d(6).state_dict()
    del state["num_batches_tracked"]
    fx.BatchNorm2d(6).load_state_dict(state)


class TestUnitized:
    def test_starts_as_exact_batch_norm(self) -> None:
        x = torch.randn(IMAGE)
        ours, batch = fx.UnitizedBatchNorm2d(6), fx.BatchNorm2d(6)
        torch.testing.assert_close(ours(x), batch(x), rtol=1e-6, atol=1e-6)
        # whether a product and a sum are rounded once or twice depends on the processor
        torch.testing.assert_close(ours.eval()(x), batch.eval()(x), rtol=1e-6, atol=1e-6)

    def test_output_norm_is_bounded_by_weight_at_alpha_one(self) -> None:
        layer = fx.UnitizedBatchNorm2d(6, unit_norm="rms")
        nn.init.ones_(layer.alpha)
        y = layer(torch.randn(8, 6, 5, 5).exp() * torch.rand(8, 1, 1, 1) * 100)
        assert (y.flatten(1).norm(dim=1) <= (6 * 25) ** 0.5 * (1 + 1e-5)).all()

    def test_alpha_gradient_is_that_of_the_released_formula(self) -> None:
        x = torch.randn(IMAGE, dtype=torch.float64)
        layer = fx.UnitizedBatchNorm2d(6, dtype=torch.float64)
        g = torch.randn(IMAGE, dtype=torch.float64)
        (layer(x) * g).sum().backward()
        xhat = reference.batch(x)
        n = torch.sqrt(xhat.square().sum((1, 2, 3), keepdim=True) / 15**2 + layer.eps)
        torch.testing.assert_close(layer.alpha.grad, (g * xhat * (1 / n - 1)).sum((0, 2, 3)))

    def test_constraint(self) -> None:
        x = torch.randn(IMAGE)
        free, bound = fx.UnitizedBatchNorm2d(6), fx.UnitizedBatchNorm2d(6, constrain_alpha=True)
        with torch.no_grad():
            bound.alpha.fill_(3.0)
            free.alpha.fill_(1.0)
        assert torch.equal(free(x), bound(x))
        assert "constrain_alpha=True" in repr(bound)

    def test_inference_uses_running_statistics_and_own_norm(self) -> None:
        layer = fx.UnitizedBatchNorm2d(6, momentum=1.0)
        nn.init.constant_(layer.alpha, 0.7)
        layer(torch.randn(IMAGE))
        x = torch.randn(IMAGE)
        expected = reference.unitized(
            x, layer.weight, layer.bias, layer.alpha, layer.running_mean, layer.running_var, eps=layer.eps
        )
        torch.testing.assert_close(layer.eval()(x), expected)


class TestPopulation:
    def test_values_of_the_population_and_derivatives_of_the_batch(self) -> None:
        layer = fx.PopulationNorm2d(6, statistics="estimated", max_ratio=None, dtype=torch.float64)
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
        x = torch.randn(IMAGE, dtype=torch.float64, requires_grad=True)
        y = layer(x)
        expected = reference.population(x, layer.running_mean, layer.running_var)
        torch.testing.assert_close(y, expected)
        g = torch.randn(IMAGE, dtype=torch.float64)
        # d/dx of (x - mu_B) / sigma_B times sigma_B / sigma: what the chain rule gives when sigma follows the batch.
        mu, sd = x.mean((0, 2, 3), keepdim=True), (x.var((0, 2, 3), correction=0, keepdim=True) + layer.eps).sqrt()
        ratio = sd.detach() / (layer.running_var + layer.eps).sqrt().view(1, -1, 1, 1)
        (want,) = torch.autograd.grad((x - mu) / sd * ratio, x, g)
        torch.testing.assert_close(torch.autograd.grad(y, x, g)[0], want)

    def test_the_gradient_is_invariant_to_the_scale_of_the_weights_before(self) -> None:
        """As BatchNorm's: the weights get no radial gradient once the statistics have caught up with them."""
        conv, layer = nn.Conv2d(3, 6, 3, bias=False), fx.PopulationNorm2d(6, momentum=1.0)
        x = torch.randn(8, 3, 9, 9)
        layer(conv(x)).pow(3).sum().backward()
        radial = (conv.weight * conv.weight.grad).sum((1, 2, 3)) / conv.weight.grad.flatten(1).norm(dim=1)
        assert radial.abs().max() < 1e-4
        constant = fx.PopulationNorm2d(6, momentum=1.0, gradient="none")
        conv.weight.grad = None
        constant(conv(x)).pow(3).sum().backward()
        radial = (conv.weight * conv.weight.grad).sum((1, 2, 3)) / conv.weight.grad.flatten(1).norm(dim=1)
        assert radial.abs().max() > 0.05

    def test_no_gradient_through_statistics(self) -> None:
        layer = fx.PopulationNorm2d(6, gradient="none")
        x = torch.randn(IMAGE, requires_grad=True)
        layer(x).sum().backward()
        scale = (layer.running_var + layer.eps).rsqrt()
        torch.testing.assert_close(x.grad, scale.view(1, -1, 1, 1).expand(IMAGE))

    def test_running_statistics_include_the_variance_between_batches(self) -> None:
        """At batch size 1 with one position all of the variance is between batches."""
        layer = fx.PopulationNorm1d(2, momentum=None, max_ratio=None)
        samples = torch.randn(500, 2) * torch.tensor([1.0, 3.0]) + 2
        for s in samples:
            layer(s[None])
        torch.testing.assert_close(layer.running_mean, samples.mean(0))
        torch.testing.assert_close(layer.running_var, samples.var(0, correction=0), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("momentum", [0.1, 0.5])
    def test_moving_average_is_bias_corrected_and_exactly_weighted(self, momentum: float) -> None:
        layer = fx.PopulationNorm2d(1, momentum=momentum, max_ratio=None)
        batches = [torch.randn(2, 1, 3, 3) * (i + 1) + i for i in range(5)]
        for b in batches:
            layer(b)
        weights = torch.tensor([(1 - momentum) ** (len(batches) - 1 - i) for i in range(len(batches))])
        weights = weights / weights.sum()
        means = torch.stack([b.mean() for b in batches])
        variances = torch.stack([b.var(correction=0) for b in batches])
        mean = (weights * means).sum()
        var = (weights * (variances + (means - mean) ** 2)).sum()
        torch.testing.assert_close(layer.running_mean[0], mean)
        torch.testing.assert_close(layer.running_var[0], var)

    @pytest.mark.parametrize("momentum", [0.3, 0.0, None])
    @pytest.mark.parametrize("gradient", ["batch", "none"])
    def test_compiled_tables_equal_the_composed_ones(
        self, gradient: str, momentum: float | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if normalization.load() is None:
            pytest.skip("no C compiler on this machine")
        args = {"gradient": gradient, "momentum": momentum, "max_ratio": 1.5, "dtype": torch.float64}
        compiled, composed = (randomized(fx.PopulationNorm2d(8, **args)) for _ in range(2))
        composed.load_state_dict(compiled.state_dict())
        for step in range(4):
            x = (torch.randn(16, 8, 16, 16, dtype=torch.float64) * (step + 1) + 3 * step).requires_grad_()
            g = torch.randn(x.shape, dtype=torch.float64)
            results = []
            for layer in (compiled, composed):
                with monkeypatch.context() as patch:
                    if layer is composed:
                        patch.setattr(normalization, "load", lambda: None)
                    y = layer(x)
                    results.append(
                        [y, *torch.autograd.grad(y, [x, layer.weight, layer.bias], g), layer.clipped.clone()]
                    )
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        for a, b in zip(compiled.state_dict().values(), composed.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b)

    def test_guard_bounds_the_statistics_and_reports(self) -> None:
        layer = fx.PopulationNorm2d(1, momentum=0.01, max_ratio=2.0)
        x = torch.randn(8, 1, 6, 6)
        for _ in range(50):
            layer(x)
        assert layer.clipped == 0
        y = layer(x * 100 + 700)
        assert layer.clipped == 1
        assert y.std() <= 2.1
        assert y.mean().abs() <= 2.1
        free = fx.PopulationNorm2d(1, momentum=0.01, max_ratio=None)
        for _ in range(50):
            free(x)
        assert free(x * 100 + 700).mean() > 3

    @pytest.mark.parametrize("compiled", [True, False])
    def test_guard_bounds_estimates_that_lag_behind(self, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        if not compiled:
            monkeypatch.setattr(normalization, "load", lambda: None)
        x = torch.randn(32, 2, 8, 8) * torch.tensor([1.0, 50.0])[:, None, None]
        y = {}
        for ratio in (2.0, None):
            layer = fx.PopulationNorm2d(2, statistics="estimated", max_ratio=ratio, affine=False)
            y[ratio] = layer(x)
            assert layer.clipped == (0.5 if ratio else 0.0)
            assert layer.running_var.eq(1).all()
            torch.testing.assert_close(layer.eval()(x), x / (1 + layer.eps) ** 0.5)  # never in evaluation
        torch.testing.assert_close(y[2.0][:, 0], y[None][:, 0])
        assert y[2.0][:, 1].std() == pytest.approx(2.0, rel=1e-3)
        assert y[None][:, 1].std() > 40
        constants = fx.PopulationNorm2d(2, statistics="estimated", gradient="none", max_ratio=2.0, affine=False)
        torch.testing.assert_close(constants(x), y[None])

    def test_estimated_statistics_change_only_from_outside(self) -> None:
        layer = fx.PopulationNorm2d(6, statistics="estimated")
        x = torch.randn(IMAGE)
        torch.testing.assert_close(layer(x), x / (1 + layer.eps) ** 0.5)
        assert layer.num_batches_tracked == 0

    def test_non_finite_batch(self) -> None:
        layer = fx.PopulationNorm2d(1)
        layer(torch.randn(2, 1, 3, 3))
        state = layer.running_mean.clone()
        layer(torch.full((2, 1, 3, 3), float("nan")))
        assert torch.equal(state, layer.running_mean)

    def test_batch_size_one_trains(self) -> None:
        layer = fx.PopulationNorm1d(3)
        layer(torch.randn(1, 3))
        assert layer(torch.randn(1, 3)).isfinite().all()


class TestRenorm:
    def test_corrections_against_the_reference(self) -> None:
        layer = fx.BatchRenorm2d(6, warmup=2, ramp=0, momentum=0.5, dtype=torch.float64)
        for step in range(5):
            x = torch.randn(IMAGE, dtype=torch.float64) * (step + 1)
            mean, var = layer.running_mean.clone(), layer.running_var.clone()
            r_max, d_max = (3.0, 5.0) if step > 2 else (1.0, 0.0)
            expected = reference.renorm(x, mean, var, r_max=r_max, d_max=d_max)
            torch.testing.assert_close(layer(x), expected)

    def test_limits_ramp_as_in_the_paper(self) -> None:
        layer = fx.BatchRenorm2d(1)
        for step, r, d in (
            (0, 1, 0),
            (5000, 1, 0),
            (40000, 3, 5),
            (25000, None, 5),
            (22500, 2, None),
            (15000, None, 2.5),
        ):
            layer.num_batches_tracked.fill_(step)
            r_max, d_max = layer.limits()
            assert r is None or r_max == pytest.approx(r)
            assert d is None or d_max == pytest.approx(d)

    def test_within_the_limits_training_equals_evaluation(self) -> None:
        layer = fx.BatchRenorm2d(6, warmup=0, ramp=0)
        layer(torch.randn(64, 6, 5, 5))
        x = torch.randn(64, 6, 5, 5) * 1.5 + 0.5
        evaluated = copy.deepcopy(layer).eval()(x)
        torch.testing.assert_close(layer(x), evaluated, rtol=1e-4, atol=1e-5)


def test_filter_response_options() -> None:
    layer = fx.FilterResponseNorm2d(6, threshold=False, learn_eps=True)
    assert layer.tau is None
    layer(torch.randn(IMAGE)).square().sum().backward()
    assert layer.learned_eps.grad is not None
    layer.reset_parameters()
    assert layer.learned_eps.item() == pytest.approx(1e-6)
    assert "learn_eps=True" in repr(layer)
    layer = fx.FilterResponseNorm1d(6)
    layer.tau.data.fill_(2)
    layer.reset_parameters()
    assert not layer.tau.any()
    assert layer(torch.randn(3, 6)).min() >= 0


def test_mixture_gates_are_clipped_and_reset() -> None:
    x = torch.randn(IMAGE)
    layer = fx.BatchInstanceNorm2d(6)
    torch.testing.assert_close(layer(x), reference.batch(x))
    nn.init.constant_(layer.gate, -3.0)
    torch.testing.assert_close(layer(x), reference.instance(x))
    layer.reset_parameters()
    assert (layer.gate == 1).all()
    switch = fx.SwitchableNorm2d(6)
    nn.init.zeros_(switch.mean_weight)
    switch.reset_parameters()
    assert (switch.mean_weight == 1).all()


def test_make_norm_and_is_norm() -> None:
    for name in fx.NORMS:
        for ndim, shape in ((1, SEQUENCE), (2, IMAGE), (3, VOLUME)):
            layer = fx.make_norm(name, 6, ndim)
            assert layer(torch.randn(shape)).shape == shape
            assert fx.is_norm(layer)
            assert fx.needs_batch(layer) == (fx.norm_class(name).statistics_from == "batch")
    for name in ("batch", "unitized", "renorm", "switchable", "batch_instance", "mean_only", "variance_only"):
        assert fx.needs_batch(fx.make_norm(name, 6))
    for name in ("none", "group", "instance", "layer", "population", "rms", "frn"):
        assert not fx.needs_batch(fx.make_norm(name, 6))
    assert fx.make_norm("group", 32).num_groups == 2
    assert fx.make_norm("group", 6).num_groups == 1
    assert fx.make_norm("group", 6, num_groups=3).num_groups == 3
    assert fx.is_norm(nn.LayerNorm(3))
    assert fx.is_norm(nn.SyncBatchNorm(3))
    assert not fx.is_norm(nn.Conv2d(1, 1, 1))
    assert fx.needs_batch(nn.BatchNorm2d(3))
    assert not fx.needs_batch(fx.BatchNorm2d(3).freeze())
    assert "6" in repr(fx.NoNorm(6))


def test_1d_2d_3d_document_their_arguments() -> None:
    for name in ("BatchNorm2d", "UnitizedBatchNorm1d", "PopulationNorm3d", "LayerNorm2d", "InstanceNorm1d"):
        text = inspect.getdoc(getattr(fx, name))
        assert "num_features: Number of channels" in text
        assert text.count("\nArgs:\n") == text.count("\n    num_features: ") == text.count("\n    dtype: ") == 1
    text = inspect.getdoc(fx.RMSNorm2d)
    assert "\n    eps: " in text
    assert "\n    momentum: " not in text


def test_pooled_count_of_one_is_not_corrected() -> None:
    layer = fx.BatchNorm1d(2)
    layer.track(Moments(torch.ones(1, 2), torch.zeros(1, 2), 1))
    assert torch.equal(layer.running_var, torch.full((2,), 0.9))
