"""A normalization in evaluation as one scale and one shift per channel, and a linear map that absorbs them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from flexnorm.engine import FlexNorm, Moments
from flexnorm.nn import NoNorm
from flexnorm.nn.rules import standardize
from flexnorm.surgery._act import ThenAct
from flexnorm.surgery._reading import RefusedError, name_of, read
from flexnorm.surgery._targets import of_batches


class _NeedsMomentsError(Exception):
    """The rule has looked at the moments of its input."""


def _unknown(_: bool) -> tuple[Tensor, Tensor]:
    raise _NeedsMomentsError


@torch.no_grad()
def as_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,), in float64, by which a layer acts in evaluation; RefusedError if its input matters."""
    if isinstance(norm, NoNorm):
        raise RefusedError("is no normalization, only the place of one")
    declared = norm if isinstance(norm, FlexNorm) else read(norm).norm
    plain = norm.plain if isinstance(norm, ThenAct) else type(norm)
    held = {**norm._buffers, **norm._parameters}
    tensors = {name: None if tensor is None else tensor.double() for name, tensor in held.items()}
    mean, var = tensors.get("running_mean"), tensors.get("running_var")
    why = "normalizes each sample by its own statistics"
    if of_batches(declared) and mean is None:
        why = "normalizes with the statistics of the batch in evaluation too"
    if (declared is not norm or name_of(plain)) and declared.same_as(training=False) == "batch":
        if mean is None or var is None:
            raise RefusedError(why)
        return standardize(mean, var, tensors.get("weight"), tensors.get("bias"), float(norm.eps))  # type: ignore[arg-type]
    if not isinstance(norm, FlexNorm):
        raise RefusedError(why)
    exact = copy.deepcopy(norm).double().eval()
    try:
        scale, shift = exact.rule(Moments(count=1, _compute=_unknown))
    except _NeedsMomentsError:
        raise RefusedError(why) from None
    forward = next(base for base in type(norm).__mro__ if base is not ThenAct and "forward" in base.__dict__)
    if forward is not FlexNorm:
        raise RefusedError(f"{forward.__name__} has its own forward")
    channels = (1, norm.num_features)
    return scale.expand(channels)[0].clone(), shift.expand(channels)[0].clone()


@torch.no_grad()
def absorb(linear: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """Change a linear map of C channels in place so that it yields ``scale * y + shift``, (C,), where it yielded y."""
    weight = linear.get_parameter("weight")
    bias = linear._parameters.get("bias")
    if isinstance(linear, nn.modules.conv._ConvTransposeNd):
        # (C_in, C_out / groups, *kernel), the input channels of one group after those of the other.
        groups = linear.groups
        split = weight.double().reshape(groups, -1, *weight.shape[1:])
        new = (split * scale.view(groups, 1, -1, *(1,) * (weight.dim() - 2))).flatten(0, 1)
    else:
        new = weight.double() * scale.view(-1, *(1,) * (weight.dim() - 1))
    moved = shift if bias is None else shift + scale * bias.double()
    # In the memory format of the old weight.
    linear.weight = nn.Parameter(torch.empty_like(weight).copy_(new), requires_grad=weight.requires_grad)
    linear.bias = nn.Parameter(moved.to(weight), requires_grad=weight.requires_grad)


class MatrixOnly(nn.Module):
    """An identity in the place of a layer that was folded for (N, C) input; refuses any other.

    The axis that normalization treats as channels is the one that a linear map writes only if there are two.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` of shape (N, C)."""
        if x.dim() != 2:
            raise ValueError(f"the normalization was folded into a linear map for (N, C) input, got {tuple(x.shape)}")
        return x
