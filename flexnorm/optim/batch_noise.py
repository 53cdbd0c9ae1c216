"""The noise of BN's batches, for a network that normalizes by the population (Luo et al. 2019, Sec. 2)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flexnorm._messages import none_of, unknown_name
from flexnorm.probe import Selection, batch_norm_layers, channels_first
from flexnorm.theory.regularization import (
    DISTRIBUTIONS,
    LayerStrength,
    sample_noise,
    statistics_noise,
)


class BatchNoise:
    """Adds the noise of batch statistics behind the normalization layers of a model while it trains (Sec. 2).

    On a network with population normalization it makes BN's randomness without BN's batches: ``BN = PN + noise``.
    Evaluation mode is untouched. It works by forward hooks: call `remove`, or use it as a context manager, to take it
    off again.

    Args:
        model: Model with layers that normalize by population (or, frozen, running) statistics.
        batch_size: M of the BN to imitate.
        layers: Which layers, as in :func:`flexnorm.probe.select`; all batch-normalized ones by default.
        strengths: Measured statistics per layer (`Advice.strengths`), which give the effective batch size of
            convolutions. Without them every image counts as one Gaussian value: right for (N, C), an upper bound on the
            noise for images.
        mean: Whether the batch mean is imitated.
        variance: Whether the batch variance is imitated.
        distribution: See :func:`flexnorm.theory.regularization.sample_noise`.
        compensate: See there; False shows the bias that the compensation removes.
        per: ``"batch"``: one draw per forward for all images, as in BN. ``"image"``: one draw per image, the same mean
            loss with less noise in the gradient.

    Raises:
        ValueError: For an unknown option, a batch that is too small, or a model without such layers.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_size: int,
        *,
        layers: Selection | None = None,
        strengths: Mapping[str, LayerStrength] | None = None,
        mean: bool = True,
        variance: bool = True,
        distribution: str = "chi",
        compensate: bool = True,
        per: str = "batch",
    ) -> None:
        if distribution not in DISTRIBUTIONS:
            raise ValueError(unknown_name("distribution", distribution, DISTRIBUTIONS))
        if per not in ("batch", "image"):
            raise ValueError(unknown_name("per", per, ["batch", "image"]))
        statistics_noise(batch_size)
        found = batch_norm_layers(model, layers)
        if not found:
            from flexnorm.nn import called_norms  # here, not above: the layers bring in the compiler

            others = [(name, f"{type(norm).__name__}, another kind") for name, norm in called_norms(model).items()]
            raise ValueError(
                f"the model has no layer that normalizes by batch or population statistics; {none_of('norms', others)}"
            )
        self.batch_size = batch_size
        self._options: dict[str, Any] = {"distribution": distribution, "compensate": compensate}
        self._mean, self._variance, self._per = mean, variance, per
        self._strengths = dict(strengths or {})
        self._handles = [module.register_forward_hook(partial(self._hook, name)) for name, module in found.items()]

    def _hook(self, name: str, module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return self._noisy(name, module, output) if module.training else output

    def _noisy(self, name: str, module: nn.Module, y: Tensor) -> Tensor:
        given, known = y, self._strengths.get(name)
        y = channels_first(module, given)
        ones = torch.ones(y.shape[1], dtype=torch.promote_types(y.dtype, torch.float32), device=y.device)
        r, s = sample_noise(
            (ones if known is None else known.mean_variance.to(ones)) * float(self._mean),
            2.0 * ones if known is None else known.square_variance.to(ones),
            self.batch_size,
            rows=len(y) if self._per == "image" else 1,
            **self._options,
        )
        if not self._variance:
            s, r = s / r, torch.ones_like(r)

        def table(values: Tensor) -> Tensor:
            return values.view(-1, y.shape[1], *(1,) * (y.dim() - 2))

        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        gamma, beta = 1.0 if weight is None else table(weight), 0.0 if bias is None else table(bias)
        noisy = beta + (y - beta) * table(r.to(y.dtype)) + gamma * table(s.to(y.dtype))
        return noisy if y is given else noisy.movedim(1, -1)

    def remove(self) -> None:
        """Take the noise off again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> BatchNoise:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
