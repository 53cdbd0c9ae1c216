"""Gradients by torch's operations, where a backward written out by hand cannot run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def transformed(*tensors: Tensor | None) -> bool:
    """Whether a torch.func transform is active or gradients come batched: such tensors have no memory of their own."""
    functorch = torch._C._functorch
    batched = any(t is not None and functorch.is_legacy_batchedtensor(t) for t in tensors)
    return batched or functorch.peek_interpreter_stack() is not None


def must_compose(*grads: Tensor | None) -> bool:
    """Whether a backward has to run by torch's operations: it is itself differentiated, batched or transformed."""
    return torch.is_grad_enabled() or transformed(*grads)


def gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of the ``inputs`` of a composition for those of its outputs, differentiable if gradients are on.

    ``needed`` tells whose gradients are wanted (what it says beyond the inputs is ignored); an output without a
    gradient does not count.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Some inputs are functions of others: only aliases have partial derivatives.
        aliases = [None if t is None else t.view_as(t) if again else t.detach().requires_grad_() for t in inputs]
        wanted = [t for t, need in zip(aliases, needed, strict=False) if t is not None and need]
        outputs = function(*aliases)
        pairs = zip((outputs,) if isinstance(outputs, Tensor) else outputs, grads, strict=True)
        known = [(y, g) for y, g in pairs if g is not None and y.requires_grad]
        roots, seeds = [y for y, _ in known], [g for _, g in known]
        found = iter(torch.autograd.grad(roots, wanted, seeds, create_graph=again, allow_unused=True))
    return [next(found) if t is not None and need else None for t, need in zip(inputs, needed, strict=False)]
