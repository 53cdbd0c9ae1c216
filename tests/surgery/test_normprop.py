"""convert_to_normprop: the same function out of NormProp layers, and nothing silently wrong."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from model_zoo import ZOO, Residual, randomized, zoo
from torch import nn
from torch.nn import functional as F

from flexnorm.lab.data.sources import load_digits
from flexnorm.lab.models import build
from flexnorm.nn.normprop import NormPropActivation, NormPropConv2d, NormPropLayer, NormPropUnits, propagate
from flexnorm.surgery import convert_to_normprop, fold, normprop_plan

MODELS = ("convnet", "nin", "resnet8", "vgg_small")


def first(outputs: object) -> torch.Tensor:
    return outputs["out"] if isinstance(outputs, dict) else outputs


def network(name: str) -> nn.Module:
    torch.manual_seed(1)
    return randomized(build(name, width=24) if name == "nin" else build(name)) if name in MODELS else zoo()[name]


@pytest.mark.filterwarnings("ignore:.*stay as they are")
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("name", [*ZOO, *MODELS])
def test_the_function_is_the_same_in_both_modes(name: str, calibrated: bool) -> None:
    model, x = network(name).double().eval(), torch.randn(6, 3, 16, 16, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    new = convert_to_normprop(model, x, batches=[x[:4], (x[4:], None)] if calibrated else None)
    wanted = first(model(x))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert any(isinstance(m, NormPropUnits) for m in new.modules())
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in new.modules())
    for training in (False, True):
        torch.testing.assert_close(first(new.train(training)(x)), wanted, rtol=1e-8, atol=1e-9)
    # Single samples, copies and pickles.
    torch.testing.assert_close(first(copy.deepcopy(new)(x[:1])), wanted[:1], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(first(pickle.loads(pickle.dumps(new))(x)), wanted, rtol=1e-8, atol=1e-9)


def test_calibration_standardizes_the_values_in_between() -> None:
    model, x = network("resnet8").eval(), torch.randn(32, 3, 16, 16)
    new = convert_to_normprop(model, x[:2], batches=[x[:16], x[16:]])
    report = propagate(new, x)
    assert {row.kind for row in report} == {"NormPropConv2d", "NormPropActivation"}
    for row in report:
        assert row.input_var == pytest.approx(1.0, abs=0.02)
        assert row.input_mean < 0.02


@pytest.mark.parametrize("act", [nn.PReLU(8), nn.GELU(), nn.SiLU(), nn.Tanh(), nn.ELU(0.7), nn.LeakyReLU(0.2)])
def test_activations(act: nn.Module) -> None:
    model = randomized(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), act, nn.Conv2d(8, 4, 1))).eval()
    x = torch.randn(4, 3, 8, 8)
    new = convert_to_normprop(model, x)
    assert type(new) is nn.Sequential
    assert isinstance(new[0], NormPropConv2d)
    assert new[0].activation.name == type(act).__name__.lower().replace("leakyrelu", "leaky_relu")
    torch.testing.assert_close(new(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"stride": 2}, {"groups": 4}, {"padding": "same"}, {"padding_mode": "reflect"}])
def test_kinds_of_convolutions(options: dict) -> None:
    conv = nn.Conv2d(8, 8, 3, **{"padding": 1, **options})
    head = [nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()]
    model = randomized(nn.Sequential(*head, conv, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))).double().eval()
    x = torch.randn(4, 3, 9, 9, dtype=torch.float64)
    new = convert_to_normprop(model, x)
    assert isinstance(new[3], NormPropConv2d)
    torch.testing.assert_close(new(x), model(x), rtol=1e-9, atol=1e-9)
    folded = fold(new, example_input=x)
    assert not any(isinstance(m, NormPropUnits) for m in folded.modules())
    zeros = convert_to_normprop(model, x, padding="zeros")
    assert zeros[3].padding_value is None
    if options.get("stride") != 2:
        # The border is one pixel wide.
        torch.testing.assert_close(zeros(x)[..., 2:-2, 2:-2], model(x)[..., 2:-2, 2:-2], rtol=1e-9, atol=1e-9)


def test_zero_scales_and_negative_scales() -> None:
    model = randomized(Residual(6)).eval()
    with torch.no_grad():
        model.bn1.weight[0], model.bn1.weight[1] = 0.0, -1.0
        model.bn2.weight.zero_()
        model.downsample[1].weight.neg_()
    x = torch.randn(4, 6, 8, 8)
    new = convert_to_normprop(model, x)
    torch.testing.assert_close(new(x), model(x), rtol=1e-4, atol=1e-5)
    new(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in new.parameters() if p.grad is not None)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.again = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.group = nn.GroupNorm(2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(F.relu(self.bn(self.conv(x))), 0.5, self.training)
        x = self.again(torch.sort(x, 1).values)
        return self.group(self.again(x)) * x


def test_what_is_not_understood_stays_and_is_named() -> None:
    model, x = randomized(Odd()).eval(), torch.randn(4, 3, 8, 8)
    plan = normprop_plan(model, x)
    assert plan["conv"].target == "NormPropConv2d"
    assert plan["bn"].target == "(part of conv)"
    assert plan["again"].reason == "used more than once"
    assert "own statistics" in plan["group"].reason
    assert plan.evaluation.preserved
    with pytest.warns(UserWarning, match=r"again \(Conv2d\): used more than once"):
        new = convert_to_normprop(model, x)
    torch.testing.assert_close(new(x), model(x), rtol=1e-4, atol=1e-5)
    # Dropout still follows the flag.
    assert not torch.equal(new.train()(x), new(x))


class Reads(nn.Module):
    def __init__(self, overwrite: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.overwrite = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), overwrite

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn(self.conv(x))
        if self.overwrite:
            return F.relu(y, inplace=True) + y
        return y * 2 if self.training else y


@pytest.mark.parametrize(("overwrite", "text"), [(True, "overwrites a value"), (False, "something else in training")])
def test_forwards_that_cannot_be_rewritten(overwrite: bool, text: str) -> None:
    model, x = Reads(overwrite).eval(), torch.randn(2, 3, 4, 4)
    with pytest.warns(UserWarning, match=text):
        new = convert_to_normprop(model, x)
    assert type(new) is Reads
    assert torch.equal(new(x), model(x))


def test_flags_types_hooks_and_choice() -> None:
    model, x = network("convnet").to(torch.float64), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    model.layer1.conv.weight.requires_grad_(False)
    model.layer2.eval()
    seen: list[int] = []
    model.layer3.conv.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"layer3.conv \(Conv2d\): it has hooks"):
        assert type(convert_to_normprop(model, x).layer3.conv) is nn.Conv2d
    # Here the forward has to change, and a hook of the model would be lost: nothing is converted.
    model.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="the hooks of the model would not run"):
        assert type(convert_to_normprop(model, x)) is type(model)
    model.layer3.conv._forward_hooks.clear()
    new = convert_to_normprop(model, x)
    assert type(new) is type(model)
    assert (new.layer1.training, new.layer2.training, new.layer2.conv.training) == (True, False, False)
    assert not new.layer1.conv.weight.requires_grad
    assert new.layer1.conv.gamma.requires_grad
    assert new.layer1.conv.gamma.dtype == torch.float64
    seen.clear()
    new(x)
    assert seen == [1]


def test_arguments_are_checked() -> None:
    model, x = network("convnet"), torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match="needs example_input"):
        convert_to_normprop(model, None)
    with pytest.raises(TypeError, match="inplace"):
        convert_to_normprop(model, x, inplace=True)
    with pytest.raises(TypeError, match="paddin"):
        convert_to_normprop(model, x, paddin="keep")
    with pytest.raises(ValueError, match="keep"):
        convert_to_normprop(model, x, padding="kep")
    with pytest.raises(ValueError, match="batches is empty"):
        convert_to_normprop(model, x, batches=[])


@pytest.mark.slow
def test_a_trained_network_keeps_its_accuracy_and_trains_on() -> None:
    data = load_digits()
    torch.manual_seed(0)
    model = build("resnet8", in_channels=1, width=8)
    train, labels, test = data.x_train, data.y_train, data.x_test

    def accuracy(net: nn.Module) -> float:
        with torch.no_grad():
            return float((net.eval()(test).argmax(1) == data.y_test).float().mean())

    def epoch(net: nn.Module, lr: float) -> None:
        optimizer = torch.optim.SGD(net.train().parameters(), lr, momentum=0.9)
        for batch in torch.randperm(len(train)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(net(train[batch]), labels[batch]).backward()
            optimizer.step()

    for _ in range(2):
        epoch(model, 0.05)
    before = accuracy(model)
    new = convert_to_normprop(model.eval(), test[:2], batches=[train[:256]])
    assert before > 0.8
    assert accuracy(new) == pytest.approx(before, abs=0.003)
    epoch(new, 0.01)
    assert accuracy(new) > before - 0.03
    assert any(isinstance(m, NormPropLayer) for m in new.modules())
    assert any(isinstance(m, NormPropActivation) for m in new.modules())
