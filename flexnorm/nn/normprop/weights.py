"""Unit-norm filters: the division inside the layer, and the projection after a step.

A NormProp layer divides every filter by its norm in the forward pass, and the paper also rescales the stored filters
to unit norm after every update. The projection does not change the function; it keeps the effective learning rate
(the step over the norm) from decaying. Weight decay on such filters is radial: after the projection all that is left
of it is a step that is longer by 1 / (1 - rate * decay). What decay regularizes in a NormProp network is gamma and
the bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def safe_norm(rows: Tensor) -> Tensor:
    """Euclidean norm of each row, with 1 in place of a norm that is zero (or too small to be squared).

    A zero row then maps to zero, and its gradient is that of an unnormalized row: finite, so the row can leave zero.
    Dividing by ``norm + eps`` instead would multiply that gradient by 1 / eps, and dividing by the norm itself yields
    NaN forward and backward.

    Args:
        rows: ``(C, K)``; half precision is accumulated in float32.

    Returns:
        ``(C,)``, at least float32.
    """
    dtype = torch.float32 if rows.dtype in (torch.float16, torch.bfloat16) else rows.dtype
    norm = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
    return torch.where(norm > torch.finfo(dtype).tiny ** 0.5, norm, 1.0)


def normalize_weights_(model: nn.Module) -> nn.Module:
    """Scale every filter of every NormProp layer in ``model`` to unit Euclidean norm, in place, and return the model.

    Call it after ``optimizer.step()``, or let :func:`register_unit_norm` do so. The network computes the same
    function before and after. Zero filters stay zero.

    Examples:
        >>> from flexnorm.nn.normprop import NormPropLinear
        >>> layer = NormPropLinear(3, 2)
        >>> _ = layer.weight.data.mul_(7.0)
        >>> normalize_weights_(layer).weight.norm(dim=1).allclose(torch.ones(2))
        True
    """
    from flexnorm.nn.normprop.base import NormPropLayer

    for module in model.modules():
        if isinstance(module, NormPropLayer):
            module.unit_norm_()
    return model


def register_unit_norm(optimizer: torch.optim.Optimizer, model: nn.Module) -> RemovableHandle:
    """Make ``optimizer`` end every step with :func:`normalize_weights_` on ``model``.

    Args:
        optimizer: Any torch optimizer. One that already keeps filters on the sphere (SGD-G, Adam-G) does not need it.
        model: The model whose NormProp layers are meant.

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        TypeError: If ``optimizer`` is no ``torch.optim.Optimizer``.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}; unwrap it first")

    def after_step(_optimizer: torch.optim.Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        normalize_weights_(model)

    return optimizer.register_step_post_hook(after_step)
