"""Small networks with batch normalization whose statistics are known, and images to look at them with."""

import torch
from torch import nn
from torch.nn import functional as F

D = torch.float64


class ConvNet(nn.Module):
    def __init__(self, activation=True, inplace=False):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1, dtype=D)
        self.bn = nn.BatchNorm2d(6, dtype=D)
        self.act = nn.ReLU(inplace=inplace) if activation else nn.Identity()
        self.head = nn.Linear(24, 5, dtype=D)
        nn.init.normal_(self.head.weight, std=0.5)
        nn.init.uniform_(self.bn.weight, 0.5, 1.5)
        nn.init.normal_(self.bn.bias, std=0.3)

    def tail(self, y):
        return self.head(F.adaptive_avg_pool2d(self.act(y), 2).flatten(1))

    def forward(self, x):
        return self.tail(self.bn(self.conv(x)))


def images(n, seed=1):
    """Images whose positions are correlated and whose values have heavy tails."""
    g = torch.Generator().manual_seed(seed)
    coarse = F.interpolate(torch.randn(n, 2, 3, 3, generator=g, dtype=D), size=6, mode="bilinear")
    return coarse + 0.3 * torch.randn(n, 2, 6, 6, generator=g, dtype=D) ** 3


def calibrated(activation=True, inplace=False):
    torch.manual_seed(0)
    net = ConvNet(activation, inplace)
    with torch.no_grad():
        h = net.conv(images(2048))
        net.bn.running_mean.copy_(h.mean((0, 2, 3)))
        net.bn.running_var.copy_(h.var((0, 2, 3), correction=0))
    return net.eval()


def small_model(norm=nn.BatchNorm1d):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), norm(8), nn.ReLU(), nn.Linear(8, 3))
