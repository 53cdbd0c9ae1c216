"""Whole networks whose normalization is exchanged: each function gives a model and how its loss is computed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.compositions import Place
from flexnorm.lab.data import load
from flexnorm.lab.models import build

Norm = Callable[[Place], nn.Module]
Network = tuple[nn.Module, Callable[[nn.Module], Tensor]]


def mlp(norm: Norm, device: str) -> Network:
    """A perceptron of two hidden layers of 512 on 256 digits."""
    data = load("digits")
    x, y = data.x_train[:256].flatten(1).to(device), data.y_train[:256].to(device)

    def hidden(inputs: int) -> list[nn.Module]:
        return [nn.Linear(inputs, 512, bias=False), norm(Place((256, 512))), nn.ReLU()]

    model = nn.Sequential(*hidden(x.shape[1]), *hidden(512), nn.Linear(512, data.num_classes))
    return model.to(device), lambda m: F.cross_entropy(m(x), y)


class GraphNetwork(nn.Module):
    """Four rounds of messages: each node adds up its neighbours, then a linear map, a normalization, ReLU."""

    def __init__(self, norm: Norm, nodes: int, width: int = 128, classes: int = 10) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(16 if k == 0 else width, width, bias=False) for k in range(4))
        self.norms = nn.ModuleList(norm(Place((nodes, width))) for _ in range(4))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor, source: Tensor, target: Tensor, graph: Tensor, graphs: int) -> Tensor:
        for linear, norm in zip(self.linears, self.norms, strict=True):
            h = linear(x)
            x = torch.relu(norm(h + torch.zeros_like(h).index_add(0, target, h[source])))
        return self.head(x.new_zeros(graphs, x.shape[1]).index_add(0, graph, x))


def gnn(norm: Norm, device: str) -> Network:
    """A graph network on 128 graphs of 32 nodes, four edges a node."""
    generator = torch.Generator().manual_seed(0)
    graphs, nodes = 128, 32
    rows = graphs * nodes
    x = torch.randn(rows, 16, generator=generator)
    target = torch.arange(rows).repeat(4)
    source = target // nodes * nodes + torch.randint(nodes, target.shape, generator=generator)
    y = torch.randint(10, (graphs,), generator=generator)
    x, source, target, graph, y = (t.to(device) for t in (x, source, target, torch.arange(rows) // nodes, y))
    model = GraphNetwork(norm, rows).to(device)
    return model, lambda m: F.cross_entropy(m(x, source, target, graph, graphs), y)


class Block(nn.Module):
    """Attention and perceptron, each behind a normalization."""

    def __init__(self, norm: Norm, place: Place, heads: int, causal: bool) -> None:
        super().__init__()
        width = place.channels
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = norm(place), norm(place)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def blocks(norm: Norm, place: Place, heads: int, layers: int, causal: bool = False) -> nn.Sequential:
    return nn.Sequential(*(Block(norm, place, heads, causal) for _ in range(layers)), norm(place))


def vit(norm: Norm, device: str) -> Network:
    """A vision transformer of 6 layers of 192 on 32 images of 64 patches."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 64, 48, generator=generator).to(device), torch.arange(32).remainder(10).to(device)
    model = nn.Sequential(nn.Linear(48, 192), blocks(norm, Place((32, 64, 192), -1), 6, 6), nn.Linear(192, 10))
    return model.to(device), lambda m: F.cross_entropy(m(x).mean(1), y)


def resnet20(norm: Norm, device: str, memory_format: torch.memory_format = torch.contiguous_format) -> Network:
    """ResNet-20 on 128 images of 32x32."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(128, 3, 32, 32, generator=generator), torch.randint(10, (128,), generator=generator)
    x, y = x.to(device, memory_format=memory_format), y.to(device)
    model = build("resnet20", norm=lambda channels: norm(Place((128, channels, 32, 32))))
    return model.to(device, memory_format=memory_format), lambda m: F.cross_entropy(m(x), y)


class Bottleneck(nn.Module):
    """Residual block of ResNet-50: 1x1, 3x3, 1x1."""

    def __init__(self, norm: Callable[[int], nn.Module], inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            norm(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            norm(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, 4 * width, 1, bias=False),
            norm(4 * width),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != 4 * width:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), norm(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))


def resnet50(norm: Norm, device: str, batch: int = 128, size: int = 224) -> Network:
    """ResNet-50 on images of 224x224, bfloat16 by autocast, channels last."""

    def of(channels: int) -> nn.Module:
        return norm(Place((batch, channels, size, size)))

    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), of(64), nn.ReLU(inplace=True)]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inputs = 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        for k in range(depth):
            layers.append(Bottleneck(of, inputs, 64 * 2**stage, 2 if stage and not k else 1))
            inputs = 256 * 2**stage
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)]
    model = nn.Sequential(*layers).to(device, memory_format=torch.channels_last)
    x = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    y = torch.randint(1000, (batch,), device=device)

    def loss(m: nn.Module) -> Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            return F.cross_entropy(m(x), y)

    return model, loss


def transformer(norm: Norm, device: str, batch: int = 16, length: int = 1024, width: int = 768) -> Network:
    """A language model of 8 causal layers in bfloat16, 8,192 words."""
    place = Place((batch, length, width), -1)
    layers = nn.Embedding(8192, width), blocks(norm, place, width // 64, 8, causal=True), nn.Linear(width, 8192)
    model = nn.Sequential(*layers).to(device, torch.bfloat16)
    words = torch.randint(8192, (batch, length + 1), device=device)
    x, y = words[:, :-1].contiguous(), words[:, 1:].flatten()
    return model, lambda m: F.cross_entropy(m(x).flatten(0, 1).float(), y)
