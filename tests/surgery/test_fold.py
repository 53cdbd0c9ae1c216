"""fold(): the same function in evaluation with fewer layers, and only where that is certain."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from model_zoo import ZOO, BatchNormAct2d, FrozenBatchNorm2d, FrozenBatchNormAct2d, randomized, same_state, zoo
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import flexnorm.nn as fx
from flexnorm import NothingDone
from flexnorm.engine import FlexNorm
from flexnorm.statistics import freeze
from flexnorm.surgery import convert, fold, fold_plan

CONVOLUTIONS = {
    "conv1d": (lambda b: nn.Conv1d(4, 6, 3, bias=b), (3, 4, 8), 1),
    "conv2d": (lambda b: nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=b), (3, 4, 7, 6), 2),
    "conv3d": (lambda b: nn.Conv3d(4, 6, 2, bias=b), (2, 4, 3, 4, 4), 3),
    "grouped": (lambda b: nn.Conv2d(4, 6, 3, groups=2, bias=b), (3, 4, 7, 6), 2),
    "depthwise": (lambda b: nn.Conv2d(6, 6, 3, groups=6, bias=b), (3, 6, 7, 6), 2),
    "circular": (lambda b: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", bias=b), (3, 4, 7, 6), 2),
    "transposed1d": (lambda b: nn.ConvTranspose1d(4, 6, 3, bias=b), (3, 4, 8), 1),
    "transposed2d": (lambda b: nn.ConvTranspose2d(4, 6, 3, stride=2, bias=b), (3, 4, 5, 4), 2),
    "transposed grouped": (lambda b: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=b), (3, 4, 5, 4), 2),
    "transposed3d": (lambda b: nn.ConvTranspose3d(4, 6, 2, groups=2, bias=b), (2, 4, 3, 3, 3), 3),
    "linear": (lambda b: nn.Linear(4, 6, bias=b), (5, 4), 1),
}
NORMS = ["torch", "batch", "unitized", "population", "renorm", "mean_only", "variance_only", "batch_instance"]


def normalization(name: str, ndim: int, **kwargs) -> nn.Module:
    if name == "torch":
        return [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][ndim - 1](6, **kwargs)
    return fx.make_norm(name, 6, ndim, **kwargs)


@pytest.mark.quick(30)
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_every_linear_map_absorbs_every_population_norm(name: str, norm: str) -> None:
    build, shape, ndim = CONVOLUTIONS[name]
    for bias, affine in ((True, True), (False, False)):
        model = randomized(nn.Sequential(build(bias), normalization(norm, ndim, affine=affine), nn.ReLU()))
        x = torch.randn(shape)
        if name == "linear" and norm == "batch_instance":
            continue  # has no (N, C) form
        exact = copy.deepcopy(model).double().eval()(x.double())
        folded = fold(model, strict=True)
        assert [type(m) for m in folded][1] in (nn.Identity, *([type(folded[1])] if name == "linear" else []))
        assert not any(isinstance(m, (FlexNorm, nn.modules.batchnorm._NormBase)) for m in folded.modules())
        torch.testing.assert_close(folded(x), exact.float(), rtol=2e-5, atol=2e-5)
        assert model.training
        assert not folded.training
        double = fold(model.double())
        torch.testing.assert_close(double(x.double()), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("to", [None, "unitized", "population"])
def test_networks(name: str, to: str | None) -> None:
    model, x = zoo()[name], torch.randn(4, 3, 6, 6)
    model = model if to is None else convert(model, to)
    state = copy.deepcopy(model.state_dict())
    plan = fold_plan(model, example_input=x)
    assert plan.difference.preserved
    with _maybe_warning(any(row.fixed and not row.folded for row in plan)):
        folded = fold(model, example_input=x)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert model.training
    left = {row.name for row in plan if not row.folded}
    assert left == ({"1.norm1", "2.norm1"} if name == "densenet" else set())
    for row in plan.folded:
        assert not isinstance(folded.get_submodule(row.name), (FlexNorm, nn.BatchNorm2d))
    assert [n for n, _ in folded.named_parameters() if n.endswith(".weight")]


class _maybe_warning:
    def __init__(self, expected: bool) -> None:
        self.context = (
            pytest.warns(UserWarning, match="were not folded|fold.model. changed nothing") if expected else None
        )

    def __enter__(self) -> None:
        if self.context is not None:
            self.context.__enter__()

    def __exit__(self, *args: object) -> None:
        if self.context is not None:
            self.context.__exit__(*args)


def test_frozen_layers_activations_and_instance_norm_with_statistics() -> None:
    model = randomized(
        nn.Sequential(
            nn.Conv2d(3, 6, 1), FrozenBatchNorm2d(6),
            nn.Conv2d(6, 6, 1), FrozenBatchNormAct2d(6),
            nn.Conv2d(6, 6, 1), BatchNormAct2d(6, nn.Hardswish()),
            nn.Conv2d(6, 6, 1), freeze(nn.BatchNorm2d(6)),
            nn.Conv2d(6, 6, 1), nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
            nn.Conv2d(6, 6, 1), nn.SyncBatchNorm(6),
            nn.Conv2d(6, 6, 1), freeze(fx.BatchNorm2d(6)),
        )
    )  # fmt: skip
    x = torch.randn(2, 3, 4, 4)
    folded = fold(model, strict=True, example_input=x)
    kinds = [type(m) for m in folded[1::2]]
    assert kinds == [nn.Identity, nn.ReLU, nn.Hardswish, nn.Identity, nn.Identity, nn.Identity, nn.Identity]
    with_drop = BatchNormAct2d(6)
    with_drop.drop = nn.Dropout(0.5)
    folded = fold(nn.Sequential(nn.Conv2d(3, 6, 1), with_drop), example_input=x)
    assert [type(m) for m in folded[1]] == [nn.Dropout, nn.ReLU]


def unitized(alpha: float) -> nn.Module:
    layer = fx.UnitizedBatchNorm2d(6)
    nn.init.constant_(layer.alpha, alpha)
    return layer


class Own(FlexNorm):
    def rule(self, moments):
        return self.weight * 3, self.bias


class OwnForward(fx.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (unitized(0.1), "each sample"),
        (nn.GroupNorm(2, 6), "each sample"),
        (fx.GroupNorm(2, 6), "each sample"),
        (nn.InstanceNorm2d(6), "each sample"),
        (fx.InstanceNorm2d(6), "each sample"),
        (fx.RMSNorm2d(6), "each sample"),
        (fx.FilterResponseNorm2d(6), "each sample"),
        (fx.SwitchableNorm2d(6), "each sample"),
        (nn.BatchNorm2d(6, track_running_stats=False), "statistics of the batch"),
        (fx.BatchNorm2d(6, track_running_stats=False), "statistics of the batch"),
        (fx.MeanOnlyBatchNorm2d(6, track_running_stats=False), "statistics of the batch"),
        (fx.NoNorm(6), "no normalization"),
        (OwnForward(6), "own forward"),
        (nn.LocalResponseNorm(2), "window"),
    ],
)
def test_layers_that_depend_on_their_input_stay(layer: nn.Module, reason: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), layer)
    plan = fold_plan(model)
    assert reason in plan[0].reason
    assert not plan[0].fixed
    with pytest.warns(NothingDone, match=rf"0 of 1 norms \(1: {type(layer).__name__}, .*{reason}"):
        assert same_state(fold(model, strict=True), model)


def test_a_users_rule_that_ignores_the_moments_folds() -> None:
    model = randomized(nn.Sequential(nn.Conv2d(3, 6, 1), Own(6)))
    assert isinstance(fold(model, strict=True, example_input=torch.randn(2, 3, 4, 4))[1], nn.Identity)


# -- certainty


class Skip(nn.Module):
    """The convolution's output is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y


class Returned(Skip):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return self.bn(y), y


class Between(Skip):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x).relu())


class Twice(Skip):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.bn(x[:, :1].expand(-1, 6, -1, -1))


class ConvTwice(Skip):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.conv(2 * x)


class Functional(Skip):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + F.conv2d(x, self.conv.weight)


class Shared(Skip):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(3, 6, 1)
        self.other.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.other(x)


class Unreached(Skip):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) if self.training else self.conv(x)


class View(Skip):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y.transpose(2, 3).transpose(2, 3)


class Scaled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


class Subclass(Skip):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Scaled(3, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Parametrized(Subclass):
    def __init__(self) -> None:
        super().__init__()
        self.conv = parametrizations.weight_norm(nn.Conv2d(3, 6, 1))


class Hooked(Subclass):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1)
        self.conv.register_forward_hook(lambda module, args, output: output + 1)


UNCERTAIN = {
    Skip: "used elsewhere",
    Returned: "used elsewhere",
    View: "used elsewhere",
    Between: "directly before",
    Twice: "used more than once",
    ConvTwice: "used more than once",
    Functional: "weight of the linear map before it is used elsewhere",
    Shared: "weight of the linear map before it is used elsewhere",
    Unreached: "not reached",
    Subclass: "subclass with its own forward",
    Parametrized: "parametrization",
    Hooked: "hooks",
}


def untraceable(kind: type[nn.Module]) -> type[nn.Module]:
    """The same model with control flow that depends on the data."""

    class Dynamic(kind):
        def forward(self, x: Tensor) -> object:
            if x.sum() > 1e9:
                return x
            return super().forward(x)

    return Dynamic


@pytest.mark.parametrize("kind", UNCERTAIN)
@pytest.mark.parametrize("dynamic", [False, True])
def test_left_alone_where_it_would_be_wrong(kind: type[nn.Module], dynamic: bool) -> None:
    if dynamic and kind is Functional:
        pytest.skip("a borrowed weight shows only in a trace; the comparison on the example catches it, see below")
    model = randomized((untraceable(kind) if dynamic else kind)())
    x = torch.randn(2, 3, 4, 4)
    plan = fold_plan(model, example_input=x if dynamic else None)
    assert UNCERTAIN[kind] in plan[0].reason
    assert plan[0].fixed
    with pytest.warns(NothingDone, match="0 of 1 norms") as caught:
        folded = fold(model, example_input=x)
    assert plan[0].reason in str(caught[0].message)
    assert torch.equal(folded.eval()(x)[0], model.eval()(x)[0])
    with pytest.raises(RuntimeError, match="were not folded"):
        fold(model, strict=True, example_input=x)


def test_the_comparison_catches_what_watching_cannot_see() -> None:
    with pytest.raises(RuntimeError, match="computes another function"):
        fold(randomized(untraceable(Functional)()), example_input=torch.randn(2, 3, 4, 4))


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(5 * x)


def test_amplified_rounding_is_told_from_another_function() -> None:
    """Every layer enlarges a small difference about fivefold: too much for float32, not for float64."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Sine()]
    model = randomized(nn.Sequential(*layers))
    with torch.no_grad():
        for layer in model[::3]:
            layer.weight.copy_(torch.nn.init.orthogonal_(torch.empty(3, 3)).view(3, 3, 1, 1) * 1.5)
    x = torch.randn(2, 3, 4, 4)
    plan = fold_plan(model, example_input=x)
    measured = plan.difference
    assert measured.maximum > 1e-4 * measured.scale, "the case is not hard enough to test anything"
    assert measured.preserved
    assert measured.exact < 1e-9 * measured.scale
    assert "in float64" in str(plan)
    fold(model, example_input=x, strict=True)


def test_untraceable_models_need_an_example() -> None:
    class Plain(Skip):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(nn.Identity()(self.conv(x)))

    model = randomized(untraceable(Plain)())
    plan = fold_plan(model)
    assert "cannot be traced" in plan[0].reason
    assert "pass example_input" in plan[0].reason
    x = torch.randn(2, 3, 4, 4)
    folded = fold(model, example_input=x, strict=True)
    assert isinstance(folded.bn, nn.Identity)
    handles = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not handles


def test_identities_between_do_not_matter() -> None:
    model = randomized(nn.Sequential(nn.Conv2d(3, 6, 1), nn.Identity(), nn.Identity(), nn.BatchNorm2d(6)))
    assert fold_plan(model, example_input=torch.randn(2, 3, 4, 4)).difference.preserved
    assert len(fold_plan(model).folded) == 1


def test_linear_maps_only_for_matrices() -> None:
    """BatchNorm1d takes the second axis for channels; a linear map writes the last one."""
    model = randomized(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)))
    folded = fold(model)
    assert folded(torch.randn(3, 4)).shape == (3, 6)
    with pytest.raises(ValueError, match=r"folded into a linear map for \(N, C\)"):
        folded(torch.randn(3, 6, 4))

    class Sequence(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() < 1e9 else x

    plan = fold_plan(Sequence(*model), example_input=torch.randn(3, 6, 4))
    assert "channels are not the outputs" in plan[0].reason
    wrong = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(5))
    assert "channels are not the outputs" in fold_plan(wrong)[0].reason


def test_options_of_the_parameters_are_kept() -> None:
    model = randomized(nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)))
    model = model.to(torch.bfloat16, memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    folded = fold(model)
    assert folded[0].weight.dtype == folded[0].bias.dtype == torch.bfloat16
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not folded[0].weight.requires_grad
    inplace = fold(model, inplace=True)
    assert inplace is model
    assert isinstance(model[1], nn.Identity)
    volume = nn.Sequential(nn.Conv3d(4, 6, 2), nn.BatchNorm3d(6)).to(memory_format=torch.channels_last_3d)
    assert fold(volume)[0].weight.is_contiguous(memory_format=torch.channels_last_3d)


def test_selection_and_in_place_comparison() -> None:
    model, x = zoo()["resnet"], torch.randn(4, 3, 6, 6)
    assert [row.name for row in fold_plan(model, include="2", exclude="2.bn1")] == ["2.bn2", "2.downsample.1"]
    same = fold(model, inplace=True, example_input=x, include="2.bn2")
    assert same is model
    assert isinstance(model[2].bn1, nn.BatchNorm2d)
    assert "1 folded, 0 left" in str(fold_plan(zoo()["resnet"], include="1"))
    assert "function in evaluation: preserved" in str(fold_plan(zoo()["resnet"], example_input=x))


# -- NormProp, export


def test_normprop_layers_become_plain_modules() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        fx.NormPropConv2d(3, 6, 3, padding=1), fx.NormPropConv2d(6, 6, 3, activation="gelu"), nn.Flatten(),
        fx.NormPropLinear(6 * 16, 5, activation=None),
    )  # fmt: skip
    x = torch.randn(4, 3, 6, 6)
    plan = fold_plan(model, example_input=x)
    assert [row.into for row in plan] == ["Conv2d + ChannelFloor", "Conv2d + GELU + ChannelAffine", "Linear"]
    assert plan.difference.preserved
    folded = fold(model, strict=True, example_input=x)
    assert not [m for m in folded.modules() if isinstance(m, fx.NormPropLayer)]
    exact = nn.Sequential(fx.NormPropConv2d(3, 6, 3, padding=1, border="exact"))
    assert "border" in fold_plan(exact)[0].reason
    with pytest.warns(NothingDone, match="border"):
        fold(exact)
    alone = fx.NormPropConv2d(3, 6, 3)
    torch.testing.assert_close(fold(alone)(x), alone(x))
    hooked = fx.NormPropConv2d(3, 6, 3)
    hooked.register_forward_hook(lambda *_: None)
    assert "hooks" in fold_plan(nn.Sequential(hooked))[0].reason


def exportable() -> dict[str, nn.Module]:
    models = {name: zoo()[name] for name in ("resnet", "mobilenet")}
    models["unitized"] = convert(zoo()["vgg"], "unitized")
    models["normprop"] = nn.Sequential(
        fx.NormPropConv2d(3, 6, 3, padding=1), nn.Flatten(), fx.NormPropLinear(6 * 36, 5, activation=None)
    )
    models["not foldable"] = nn.Sequential(nn.Conv2d(3, 6, 1), unitized(0.3), nn.ReLU(), fx.PopulationNorm2d(6))
    return models


@pytest.mark.parametrize("name", exportable())
def test_torch_export(name: str) -> None:
    model, x = exportable()[name], torch.randn(4, 3, 6, 6)
    with _maybe_warning(name == "not foldable"):
        folded = fold(model)
    program = torch.export.export(folded, (x,))
    torch.testing.assert_close(program.module()(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    operators = {str(node.target) for node in program.graph.nodes}
    if name != "not foldable":
        assert not [op for op in operators if "batch_norm" in op or "rsqrt" in op or "var_mean" in op]


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["resnet", "unitized", "normprop", "not foldable"])
def test_onnx(name: str) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    import warnings

    from onnx.reference import ReferenceEvaluator

    model, x = exportable()[name], torch.randn(2, 3, 6, 6)
    with _maybe_warning(name == "not foldable"):
        folded = fold(model)
    with warnings.catch_warnings():
        # The exporter warns about itself.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(folded, (x,), dynamo=True, verbose=False)
    buffer = io.BytesIO()
    program.save(buffer)
    graph = onnx.load_from_string(buffer.getvalue())
    onnx.checker.check_model(graph)
    if name != "not foldable":
        assert "BatchNormalization" not in {node.op_type for node in graph.graph.node}
    (got,) = ReferenceEvaluator(graph).run(None, {graph.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_norms_of_the_last_axis_fold_into_linear_maps_of_tokens() -> None:
    model = nn.Sequential(nn.Linear(4, 6), fx.BatchNorm1d(6, channel_axis=-1)).eval()
    with torch.no_grad():
        for tensor in (*model[1].parameters(), model[1].running_mean, model[1].running_var):
            tensor.uniform_(0.5, 2)
    x = torch.randn(2, 5, 4)
    folded = fold(model, example_input=x)
    assert type(folded[1]) is nn.Identity
    torch.testing.assert_close(folded(x), model(x))
    images = nn.Sequential(nn.Conv2d(4, 6, 1), fx.BatchNorm1d(6, channel_axis=-1)).eval()
    assert "its channels are not" in fold_plan(images)[0].reason
