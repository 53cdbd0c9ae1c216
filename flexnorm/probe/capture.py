"""What a side pass through a network collects at every batch-normalized layer: per image, not per position."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flexnorm._messages import unknown_name
from flexnorm.probe.axes import channels_first
from flexnorm.probe.forward import isolated, watched
from flexnorm.probe.select import Selection, select, unwrap

Loss = str | Callable[[Tensor, Tensor], Tensor]
"""A name of `CURVED_LOSSES` (Gauss-Newton curvature, no labels needed), or ``loss(outputs, targets)`` returning the
mean over the images (empirical Fisher information: squared gradients at the true labels, as the paper writes it)."""


def _cross_entropy(outputs: Tensor, generator: torch.Generator) -> Tensor:
    classes = outputs.movedim(1, -1)
    probabilities = classes.softmax(-1)
    label = torch.multinomial(probabilities.reshape(-1, classes.shape[-1]), 1, generator=generator)
    chosen = torch.zeros_like(probabilities).reshape(-1, classes.shape[-1]).scatter_(1, label, 1.0)
    root = (probabilities - chosen.reshape(probabilities.shape)).movedim(-1, 1)
    return root.mul((outputs.shape[1] / outputs[0].numel()) ** 0.5)


def _binary_cross_entropy(outputs: Tensor, generator: torch.Generator) -> Tensor:
    p = outputs.sigmoid()
    return (p - torch.bernoulli(p, generator=generator)).mul(outputs[0].numel() ** -0.5)


def _noise(outputs: Tensor, generator: torch.Generator, curvature: float) -> Tensor:
    noise = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype, device=outputs.device)
    return noise.mul(curvature**0.5)


CURVED_LOSSES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "cross_entropy": _cross_entropy,
    "binary_cross_entropy": _binary_cross_entropy,
    "mse": lambda outputs, generator: _noise(outputs, generator, 2.0 / outputs[0].numel()),
    "squared": lambda outputs, generator: _noise(outputs, generator, 2.0),
    "half_squared": lambda outputs, generator: _noise(outputs, generator, 1.0),
}
"""For every loss a draw of vectors v per image with ``E[v v^T]`` = Hessian of the image's loss with respect to the
outputs: ``cross_entropy`` of logits (N, K) or (N, K, *), averaged over ``*``; ``binary_cross_entropy`` of logits and
``mse``, averaged over all outputs of an image; ``squared`` and ``half_squared`` errors, summed over them."""


class ImageTables(NamedTuple):
    """One call of one layer. All tensors have shape (N, C), detached.

    They are all that zeta needs; positions enter only through them, so their correlations are accounted for.

    Attributes:
        name: Name of the layer in the model; a layer called more than once has ``#2``, ``#3`` ... appended.
        mean: Mean of the layer's input over the positions of the image.
        var: Its biased variance over the positions (zero for (N, C) inputs).
        shift: Derivative of the image's loss by a shift of the output.
        scale: Derivative of the image's loss by the output's scale, with the input centred on `mean`: sum of gradient
            times (x - mean) over the positions, in the input's units.
    """

    name: str
    mean: Tensor
    var: Tensor
    shift: Tensor
    scale: Tensor


def batch_norm_layers(model: nn.Module, layers: Selection | None = None) -> dict[str, nn.Module]:
    """Return the layers that standardize every channel by statistics of a batch or of the population, by name.

    These are torch's BatchNorm (SyncBatchNorm included) and this package's norms whose ``statistics_from`` is
    ``"batch"`` or ``"population"``. Each module is listed once.

    Args:
        model: Any model.
        layers: Which of them, in the language of :func:`flexnorm.probe.select`; all by default.

    Raises:
        ValueError: If a name or pattern fits no such layer.
    """
    from flexnorm.nn import norm_of  # here, not above: the layers bring in the compiler

    found = {
        name: module
        for name, module in model.named_modules()
        if (norm := norm_of(module)) is not None and norm.statistics_from in ("batch", "population")
    }
    return found if layers is None else select(found, layers, kind="batch normalization layer")


def capture(
    model: nn.Module,
    inputs: Tensor,
    loss: Loss = "cross_entropy",
    targets: Tensor | None = None,
    *,
    layers: Selection | None = None,
    generator: torch.Generator | None = None,
) -> list[ImageTables]:
    """Run one side pass in evaluation mode and return the tables of every layer.

    Evaluation mode, because the theory compares with population statistics and because each image's loss must depend on
    that image alone. Gradients, buffers, modes and the global random state of the caller are left as they were.

    Args:
        model: The model; its batch-normalized layers must have meaningful running statistics.
        inputs: (N, *), one batch.
        loss: See `Loss`.
        targets: Labels, for a callable loss.
        layers: Which layers to look at, as for :func:`batch_norm_layers`; all batch-normalized ones by default.
        generator: Source of the draws for a named loss; a fresh one seeded with 0 by default.

    Returns:
        One entry per layer and call, in the order of the calls.

    Raises:
        ValueError: For an unknown loss or layer, if the model has no such layer, or if targets are missing.
    """
    chosen = batch_norm_layers(model, layers)
    if not chosen:
        raise ValueError("the model has no layer that normalizes by batch or population statistics")
    if isinstance(loss, str) and loss not in CURVED_LOSSES:
        raise ValueError(unknown_name("loss", loss, CURVED_LOSSES))
    if not isinstance(loss, str) and targets is None:
        raise ValueError("a callable loss needs targets; give them, or name the loss to use its curvature instead")
    seen: list[tuple[str, nn.Module, Tensor, Tensor]] = []

    def tap(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not output.requires_grad:  # all parameters before and in this layer are frozen
            output = output.detach().requires_grad_()
        seen.append((name, module, args[0], output))
        return output.clone()  # what follows may work in place; the gradient asked for is that of `output` itself

    inner = unwrap(model)
    with isolated(inner, 0), torch.enable_grad():
        inner.eval()
        with watched(chosen, tap):
            outputs = inner(inputs)
        if isinstance(loss, str):
            generator = generator or torch.Generator(outputs.device).manual_seed(0)
            total = (outputs * CURVED_LOSSES[loss](outputs.detach(), generator)).sum()
        else:
            total = loss(outputs, targets) * len(outputs)  # type: ignore[arg-type]
        gradients = torch.autograd.grad(total, [y for *_, y in seen], allow_unused=True)
    tables = []
    for (name, module, values, y), gradient in zip(seen, gradients, strict=True):
        dtype = torch.promote_types(values.dtype, torch.float32)
        x, g = (
            channels_first(module, t.detach().to(dtype)).flatten(2) if t.ndim > 2 else t.detach().to(dtype)[..., None]
            for t in (values, torch.zeros_like(y) if gradient is None else gradient)
        )
        var, mean = torch.var_mean(x, dim=2, correction=0)
        tables.append(ImageTables(name, mean, var, g.sum(2), (g * (x - mean[..., None])).sum(2)))
    return tables
