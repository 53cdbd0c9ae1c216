"""Every reference network with every normalization: shapes, sizes, training, and the details that papers fix."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from flexnorm import nn as fx
from flexnorm.lab import models
from flexnorm.optim import GammaDecay

SMALL = ("conv4fc2", "convnet", "resnet8", "resnet20", "vgg_small", "nin", "wrn10")
NARROW = {"conv4fc2": {"width": 4}, "nin": {"width": 12}, "wrn10": {"widen": 1, "dropout": 0.1}}


def _inputs(name: str, channels: int) -> torch.Tensor:
    size = 16 if name == "nin" else 8
    return torch.randn(3, channels, size, size)


@pytest.mark.quick(30)
@pytest.mark.parametrize(
    ("name", "norm"),
    # A dense layer has one position: nothing to normalize by instance.
    [(n, m) for n in SMALL for m in models.norm_names() if (n, m) != ("conv4fc2", "instance")],
)
def test_shapes_gradients_and_copies(name: str, norm: str) -> None:
    net = models.build(name, norm=norm, in_channels=1, num_classes=7, **NARROW.get(name, {}))
    x = _inputs(name, 1)
    y = net(x)
    assert y.shape == (3, 7)
    y.square().sum().backward()
    for key, p in net.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key
    twin = pickle.loads(pickle.dumps(copy.deepcopy(net.eval())))
    assert torch.equal(twin(x), net(x))


@pytest.mark.quick(5)
@pytest.mark.parametrize("norm", models.norm_names())
def test_a_step_of_training_lowers_the_loss(norm: str) -> None:
    net = models.build("convnet", norm=norm, in_channels=1)
    x, y = torch.randn(32, 1, 8, 8), torch.randint(10, (32,))
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.quick(6)
@pytest.mark.parametrize("name", models.MODELS)
def test_every_network_builds_without_memory(name: str) -> None:
    with torch.device("meta"):
        net = models.build(name, in_channels=3, num_classes=100)
        assert net(torch.empty(2, 3, 32, 32)).shape == (2, 100)


@pytest.mark.parametrize(
    ("name", "norms"), [("convnet", 3), ("resnet8", 7), ("resnet20", 19), ("vgg_small", 6), ("nin", 8)]
)
def test_number_of_normalizations(name: str, norms: int) -> None:
    for norm in ("batch", "none"):
        net = models.build(name, norm=norm)
        assert sum(fx.is_norm(m) for m in net.modules()) == norms
        # Normalizations make the biases of convolutions before them redundant; without them they are needed.
        biases = [m.bias is not None for m in net.modules() if isinstance(m, nn.Conv2d) and m.out_channels != 10]
        assert set(biases) == {norm == "none"}


def test_resnet20_has_the_published_size() -> None:
    """0.27 million parameters (He et al. 2016, table 6)."""
    count = sum(p.numel() for p in models.build("resnet20").parameters())
    assert 0.26e6 < count < 0.28e6


def test_wide_resnets_have_the_published_size() -> None:
    """Zagoruyko & Komodakis (2016), table 4: 36.5 M for WRN-28-10, 8.9 M for WRN-40-4, 2.7 M for WRN-16-4."""
    with torch.device("meta"):
        for name, widen, millions in (("wrn28", 10, 36.5), ("wrn40", 4, 8.9), ("wrn16", 4, 2.7)):
            count = sum(p.numel() for p in models.build(name, widen=widen).parameters())
            assert count == pytest.approx(1e6 * millions, rel=0.02)


def test_resnet18_has_the_published_size() -> None:
    """11.2 million parameters, as everywhere on CIFAR-10; 17 convolutions and 3 on shortcuts."""
    with torch.device("meta"):
        net = models.build("resnet18")
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(11.17e6, rel=0.005)
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == 20


@pytest.mark.parametrize(("name", "count"), [("resnet8", 3), ("resnet18", 8), ("conv4fc2", 3)])
def test_dropout_of_blocks_and_layers(name: str, count: int) -> None:
    net = models.build(name, width=4, dropout=0.2)
    assert [m.p for m in net.modules() if isinstance(m, nn.Dropout)] == [0.2] * count
    assert not any(isinstance(m, nn.Dropout) for m in models.build(name, width=4).modules())


def test_conv4fc2_normalizes_one_layer_alone() -> None:
    for only in (1, 5):
        net = models.build("conv4fc2", width=4, only=only)
        layers = [net.get_submodule(f"layer{number}") for number in range(1, 6)]
        assert [isinstance(layer.norm, fx.BatchNorm2d) for layer in layers] == [n == only for n in range(1, 6)]
        assert [layer.conv.bias is None for layer in layers] == [n == only for n in range(1, 6)]


@pytest.mark.parametrize("norm", ["none", "mean_only", "variance_only"])
def test_weight_normalization_of_conv4fc2(norm: str) -> None:
    """The direction of a weight vector is learned in v, its length in the scale behind it, and nowhere else."""
    net = models.build("conv4fc2", norm=norm, width=4, weight_norm=True)
    plain = models.build("conv4fc2", norm=norm, width=4)
    plain.load_state_dict(
        {
            name: net.get_parameter(name) if "conv.weight" not in name else net.get_submodule(name[:-7]).weight.detach()
            for name in plain.state_dict()
            if name in dict(net.named_parameters()) or "conv.weight" in name
        },
        strict=False,
    )
    x = torch.randn(6, 3, 8, 8)
    torch.testing.assert_close(net(x), plain(x))
    conv, scale = net.layer2.conv, net.layer2.norm.weight
    with torch.no_grad():
        before = net(x)
        conv.parametrizations.weight.original1.mul_(3.0)
        torch.testing.assert_close(net(x), before)
        scale.mul_(2.0)
        assert not torch.allclose(net(x), before)
    net(x).sum().backward()
    assert conv.parametrizations.weight.original0.grad is None
    assert scale.grad.abs().sum() > 0
    scales = [m.weight for m in net.modules() if fx.is_norm(m)]
    assert [len(weight) for weight in scales] == [4, 4, 8, 8, 16]
    if norm == "none":
        assert net.layer2.norm.training
        assert torch.equal(net.layer2.norm.running_mean, torch.zeros(4))  # statistics never follow
        assert GammaDecay(net, 128, 0.5).penalty().item() == pytest.approx(0.5 * (4 + 4 * 4 + 8 + 8 + 16))


def test_weight_normalization_learns_its_length_where_nothing_else_scales() -> None:
    net = models.build("conv4fc2", norm="mean_only", width=4, weight_norm=True, affine=False)
    assert isinstance(net.layer2.norm, fx.MeanOnlyBatchNorm2d)
    assert net.layer2.conv.parametrizations.weight.original0.requires_grad


def test_dropout_stands_between_the_convolutions_of_a_wide_block() -> None:
    for norm in ("batch", "normprop"):
        net = models.build("wrn10", norm=norm, widen=1, dropout=0.3)
        assert [m.p for m in net.modules() if isinstance(m, nn.Dropout)] == [0.3] * 3
        x = torch.randn(4, 3, 8, 8)
        assert not torch.equal(net(x), net(x))
        assert torch.equal(net.eval()(x), net(x))


def test_vgg_scales_with_its_width() -> None:
    net = models.build("vgg13", width=8)
    assert [m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)] == [8, 8, 16, 16, 32, 32] + [64] * 4


def test_nin_has_nine_convolutions_of_the_paper() -> None:
    convs = [m for m in models.build("nin").modules() if isinstance(m, nn.Conv2d)]
    assert [(c.out_channels, c.kernel_size[0]) for c in convs] == [
        (192, 5),
        (160, 1),
        (96, 1),
        (192, 5),
        (192, 1),
        (192, 1),
        (192, 5),
        (192, 1),
        (10, 1),
    ]


@pytest.mark.parametrize(("name", "spread"), [("convnet", 1.6), ("resnet20", 1.6), ("nin", 2.5)])
def test_normprop_keeps_its_variance_at_initialization(name: str, spread: float) -> None:
    """The paper leaves max-pooling uncorrected, which widens what follows it in NIN."""
    net = models.build(name, norm="normprop")
    seen: list[torch.Tensor] = []
    for module in net.modules():
        if isinstance(module, (fx.NormPropConv2d, fx.NormPropResidual)):
            module.register_forward_hook(lambda m, i, o: seen.append(o.detach()))
    net(torch.randn(16, 3, 16, 16))
    for out in seen:
        assert 0.4 < out.std() < spread
        assert out.mean().abs() < spread / 3


def test_custom_normalization_and_norm_args() -> None:
    net = models.build("convnet", norm=lambda c: nn.GroupNorm(2, c))
    assert sum(isinstance(m, nn.GroupNorm) for m in net.modules()) == 3
    net = models.build("convnet", norm="unitized", eps=1e-3)
    assert {m.eps for m in net.modules() if isinstance(m, fx.UnitizedBatchNorm2d)} == {1e-3}
    net = models.build("resnet8", norm="normprop", constants="paper")
    assert {m.constants for m in net.modules() if isinstance(m, fx.NormPropConv2d)} == {"paper"}


def test_options_of_a_norm_may_be_called_like_those_of_the_network() -> None:
    for args in ({"num_features": 4}, {"widths": 3}, {"name": "x"}, {"in_channels": 1}):
        with pytest.raises(TypeError, match=next(iter(args))):
            models.build("convnet", norm="unitized", widths=(4, 8), norm_args=args)
    net = models.build("convnet", norm="unitized", widths=(4, 8), norm_args={"eps": 0.1}, momentum=0.2)
    assert {(m.eps, m.momentum) for m in net.modules() if isinstance(m, fx.UnitizedBatchNorm2d)} == {(0.1, 0.2)}


@pytest.mark.parametrize("option", ["unit_norm", "norm"])
def test_the_norm_of_a_unitized_network_is_one_of_its_options(option: str) -> None:
    net = models.build("resnet8", norm="unitized", norm_args={option: "rms"})
    assert {m.unit_norm for m in net.modules() if isinstance(m, fx.UnitizedBatchNorm2d)} == {"rms"}
    net = models.build("convnet", norm="unitized", unit_norm="rms")
    assert net.layer1.norm.unit_norm == "rms"


def test_equal_seeds_give_equal_weights_under_every_normalization() -> None:
    nets = {}
    for norm in ("none", "batch", "group", "unitized"):
        torch.manual_seed(5)
        net = models.build("resnet8", norm=norm)
        nets[norm] = [m.weight for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for weights in nets.values():
        for a, b in zip(weights, nets["batch"], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", SMALL)
def test_watched_layers_are_alike_under_every_normalization(name: str) -> None:
    """Equally many, of equal shapes, and none negative where the activation comes last in all of them."""
    shapes = {}
    for norm in ("none", "batch", "normprop"):
        net = models.build(name, norm=norm, in_channels=1, **NARROW.get(name, {}))
        names = models.watched_layers(net)
        assert len(set(names)) == len(names)
        seen: dict[str, torch.Tensor] = {}
        for layer in names:
            net.get_submodule(layer).register_forward_hook(
                lambda m, i, o, k=layer, seen=seen: seen.update({k: o.detach()})
            )
        net(_inputs(name, 1))
        shapes[norm] = [seen[layer].shape for layer in names]
        if norm != "normprop":
            assert all(out.min() >= 0 for out in seen.values())
    assert shapes["none"] == shapes["batch"] == shapes["normprop"]
    assert models.watched_layers(nn.Linear(1, 1)) == ()


def test_shortcut_input_survives_the_in_place_activation() -> None:
    """Without normalization, norm1 is the identity: an in-place ReLU on its output would change the shortcut."""
    net = models.build("resnet8", norm="none").eval()
    block = net[1]
    x = torch.randn(2, 16, 8, 8)
    kept = x.clone()
    block(x)
    assert torch.equal(x, kept)


def test_networks_need_no_dependency_of_the_lab() -> None:
    lacking = ("scipy", "ot", "lightning_fabric", "safetensors", "sklearn", "yaml", "rich", "typer", "PIL")
    code = f"import sys; sys.modules |= dict.fromkeys({lacking}); from flexnorm.lab import models; models.build('nin')"
    code += "; import flexnorm.lab.run, flexnorm.lab.data as d, flexnorm.lab.profile; d.load('digits')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: data 'digits' needs sklearn.datasets: pip install 'flexnorm[lab]'" in done.stderr


def test_errors() -> None:
    for call, match in (
        (lambda: models.build("resnet2"), "did you mean 'resnet20'"),
        (lambda: models.build("convnet", norm="unitised"), "did you mean 'unitized'"),
        (lambda: models.build("resnet8", depth=21), "got 21"),
        (lambda: models.build("conv4fc2", only=6), "1 to 5, got 6"),
        (lambda: models.build("conv4fc2", norm="normprop", weight_norm=True), "unit norm as they are"),
        (lambda: models.build("wrn10", depth=20), "got 20"),
        (lambda: models.build("vgg13", width=0), "width must be at least 1 channel, got 0"),
        (lambda: models.build("convnet", widths=()), "at least one"),
        (lambda: models.build("convnet", norm=nn.BatchNorm2d, eps=1.0), r"\['eps'\]"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
