"""Small look-alikes of the networks and layers that conversions meet in the wild."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm's: normalization, dropout and activation in one module, with a forward of its own."""

    def __init__(self, num_features: int, act: nn.Module | None = None, **kwargs) -> None:
        super().__init__(num_features, **kwargs)
        self.drop = nn.Identity()
        self.act = act or nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return self.act(self.drop(x))


class GroupNormAct(nn.GroupNorm):
    """As timm's: the order of the arguments differs from torch's, and there is a private flag."""

    def __init__(self, num_channels: int, num_groups: int = 2, **kwargs) -> None:
        super().__init__(num_groups, num_channels, **kwargs)
        self.drop = nn.Identity()
        self.act = nn.SiLU()
        self._fast_norm = False

    def forward(self, x: Tensor) -> Tensor:
        assert self._fast_norm is False
        return self.act(self.drop(F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)))


class FrozenBatchNorm2d(nn.Module):
    """As torchvision's: everything in buffers."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.rand(num_features) + 0.5)
        self.register_buffer("bias", torch.randn(num_features))
        self.register_buffer("running_mean", torch.randn(num_features))
        self.register_buffer("running_var", torch.rand(num_features) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """As timm's."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps)
        self.drop = nn.Identity()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class Residual(nn.Module):
    """A block as in ResNet: names, a shortcut with its own normalization, an activation module used twice."""

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False, groups=groups)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.downsample(x))


class Dense(nn.Module):
    """Pre-activation and concatenation, as in DenseNet."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv1(F.relu(self.norm1(x)))], 1)


class Squeeze(nn.Module):
    """Depthwise convolution with squeeze and excitation and normalization with activation, as in MobileNetV3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dw = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn = BatchNormAct2d(channels, nn.Hardswish())
        self.gate = nn.Conv2d(channels, channels, 1)
        self.pw = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.dw(x))
        return self.bn2(self.pw(y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid())) + x


class Branches(nn.Module):
    """Parallel branches in a ModuleDict, as in Inception, and a dictionary output, as in segmentation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleDict(
            {
                name: nn.ModuleList([nn.Conv2d(channels, 4, kernel, padding=kernel // 2), nn.BatchNorm2d(4)])
                for name, kernel in (("one", 1), ("three", 3))
            }
        )
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        both = torch.cat([F.relu(bn(conv(x))) for conv, bn in self.branches.values()], 1)
        return {"out": self.bn(self.up(both))}


def randomized(model: nn.Module) -> nn.Module:
    """Nothing is trivially 0 or 1."""
    with torch.no_grad():
        for name, table in (*model.named_parameters(), *model.named_buffers()):
            last = name.rpartition(".")[2]
            if last == "running_var" or (last == "weight" and table.dim() == 1):
                table.uniform_(0.5, 1.5)
            elif last in ("bias", "running_mean"):
                table.uniform_(-0.3, 0.3)
            elif last == "num_batches_tracked":
                table.fill_(7)
    return model


def zoo() -> dict[str, nn.Module]:
    """One network per family, 3 channels in."""
    torch.manual_seed(3)
    stem = lambda: nn.Conv2d(3, 8, 3, padding=1)  # noqa: E731
    head = lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5), nn.BatchNorm1d(5))  # noqa: E731
    nets = {
        "resnet": nn.Sequential(stem(), nn.BatchNorm2d(8), Residual(8), head()),
        "resnext": nn.Sequential(stem(), Residual(8, groups=4), head()),
        "densenet": nn.Sequential(stem(), Dense(8, 4), Dense(12, 4), nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8), head()),
        "mobilenet": nn.Sequential(stem(), BatchNormAct2d(8), Squeeze(8), head()),
        "vgg": nn.Sequential(stem(), nn.BatchNorm2d(8), nn.ReLU(True), nn.MaxPool2d(2), head()),
        "inception": nn.Sequential(stem(), nn.ReLU(), Branches(8)),
    }
    return {name: randomized(net) for name, net in nets.items()}


ZOO = tuple(zoo())


def same_state(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(
        first[k].dtype == second[k].dtype and torch.equal(first[k], second[k]) for k in first
    )
