"""Small layers that do what the norms of other libraries do, each written the way its kind is written there."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PlainRMS(nn.Module):
    """Root mean square of the last axis, in float32, one weight: as in language models."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(hidden.dtype)


class GainNorm(nn.Module):
    """The same with a scale of 1 + weight, weight 0 at first."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.float())).type_as(x)


class LastAxisNorm(nn.Module):
    """Layer normalization with a bias or without."""

    def __init__(self, size: int, *, bias: bool, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class ChannelsFirst(nn.LayerNorm):
    """Layer normalization over the channels at each position of (N, C, H, W)."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__(size, eps)
        self.fast = False

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise ValueError("images only")
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class FrozenStatistics(nn.Module):
    """Batch normalization by buffers alone."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((size,), value))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (
            t.reshape(1, -1, 1, 1) for t in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


class HandBatchNorm(nn.Module):
    """Batch normalization of (N, C, L) written out."""

    moving_mean: Tensor
    moving_var: Tensor

    def __init__(self, size: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.register_buffer("moving_mean", torch.zeros(size))
        self.register_buffer("moving_var", torch.ones(size))
        self.momentum = momentum

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.moving_mean[:, None], self.moving_var[:, None]
        if self.training:
            mean, var = x.mean((0, 2)).unsqueeze(1), x.var((0, 2), correction=0).unsqueeze(1)
            with torch.no_grad():
                self.moving_mean.lerp_(mean[:, 0].to(self.moving_mean), self.momentum)
                self.moving_var.lerp_(x.var((0, 2)).to(self.moving_var), self.momentum)
        return self.gamma[:, None] * (x - mean) / (var + 1e-3).sqrt() + self.beta[:, None]


class GraphMeanNorm(nn.Module):
    """Standardizes over all nodes, subtracting a learned part of the mean."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.mean_scale = nn.Parameter(torch.full((size,), 0.7))

    def forward(self, x: Tensor, batch: Tensor | None = None) -> Tensor:
        if x.ndim != 2 or batch is not None:
            raise ValueError("nodes of one graph only")
        out = x - x.mean(0, keepdim=True) * self.mean_scale
        return self.weight * out / (out.pow(2).mean(0, keepdim=True) + 1e-5).sqrt() + self.bias


class WholeGraphNorm(nn.Module):
    """Standardizes all values of a graph together; eps is added to the deviation."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean()
        return x / (x.std(unbiased=False) + 1e-5) * self.weight + self.bias


class MeanOnly(nn.Module):
    """Subtracts the mean of the batch."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean((0, 2, 3), keepdim=True) + self.bias.view(1, -1, 1, 1)


class NormThenAct(ChannelsFirst):
    """A normalization with its activation, both in one module."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.drop(super().forward(x)))
        return y


class Pinned(nn.LayerNorm):
    """Layer normalization in float32 whatever the input is, by parameters that stay in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias, self.eps).to(x.dtype)


class GatedRMS(PlainRMS):
    """With a gate, if one is given."""

    def forward(self, hidden: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(hidden if gate is None else hidden * F.silu(gate))


class Wrapped(nn.Module):
    """A scale of its own behind a norm without one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm, self.gamma = nn.LayerNorm(size, elementwise_affine=False), nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x) * (1 + self.gamma)
        return y


class ColumnNorm(nn.Module):
    """Root mean square without any parameter."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-8).rsqrt()


class CentredByStd(nn.Module):
    """Standardizes by the unbiased deviation, as annotated transformers do."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.a_2, self.b_2 = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.a_2 * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) + self.b_2
