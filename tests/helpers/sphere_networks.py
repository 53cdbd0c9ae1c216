"""A network with a layer of every kind, for the tests of which weights are scale invariant."""

import torch
from torch import nn


class Residual(nn.Module):
    """Pre-activation block: the second convolution feeds the sum, not a normalization."""

    def __init__(self, channels):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x):
        return x + self.conv2(self.norm2(self.conv1(self.norm1(x).relu())).relu())


def zoo():
    model = nn.Sequential()
    for name, module in [
        ("stem", nn.Conv2d(3, 8, 3, bias=True)),
        ("stem_norm", nn.BatchNorm2d(8)),
        ("relu", nn.ReLU()),
        ("block", Residual(8)),
        ("up", nn.ConvTranspose2d(8, 12, 3, groups=2)),
        ("up_norm", nn.BatchNorm2d(12)),
        ("depthwise", nn.Conv2d(12, 12, 3, groups=12)),
        ("depthwise_norm", nn.BatchNorm2d(12, affine=False)),
        ("relu2", nn.ReLU()),
        ("grouped", nn.Conv2d(12, 8, 3, groups=4, bias=False)),
        ("instance", nn.InstanceNorm2d(8)),
        ("elu", nn.ELU()),
        ("before_group", nn.Conv2d(8, 12, 1)),
        ("group", nn.GroupNorm(3, 12)),
        ("pool", nn.AdaptiveAvgPool2d(2)),
        ("flat", nn.Flatten()),
        ("linear", nn.Linear(48, 16)),
        ("linear_norm", nn.BatchNorm1d(16)),
        ("before_layer", nn.Linear(16, 6)),
        ("layer", nn.LayerNorm(6)),
        ("dropout", nn.Dropout(0.2)),
        ("head", nn.Linear(6, 5)),
    ]:
        model.add_module(name, module)
    return model


IMAGES = torch.zeros(4, 3, 10, 10)
