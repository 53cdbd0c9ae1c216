"""BN emulated as population normalization plus the noise of batch statistics.

After Luo et al. 2019, Sec. 2. Noise that is independent of the sample must be compensated: ``E[1/sigma_B] >
1/sigma_P``, so that dividing by an independent sigma_B inflates the output; at M = 32 and Gaussian values
``E[1/sigma_B^2] - 1 = 3/(M - 3) = 0.10``, six times the ``1/(2M)`` that is to be imitated. A batch's own statistics do
not inflate: their samples are in them. Here the factor is divided by its mean, so that the noise leaves the expected
output as it is and Eq. 3 holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from flexnorm._messages import unknown_name
from flexnorm.probe import Selection
from flexnorm.probe.capture import batch_norm_layers
from flexnorm.theory.regularization.strength import LayerStrength
from flexnorm.theory.regularization.zeta import statistics_noise

__all__ = ["BatchNoise", "inverse_std_bias", "sample_noise"]

DISTRIBUTIONS: tuple[str, ...] = ("chi", "gaussian")


def inverse_std_bias(batch_size: float, kurtosis: float = 0.0) -> float:
    """Return ``E[1/sigma_B] sigma_P - 1``, the first-order inflation that uncompensated independent noise causes.

    For the gamma distribution of ``sigma_B^2`` with the mean and the variance ``(rho + 2)/M`` that the batch variance
    has to leading order; about ``3 (rho + 2)/(8 M)``.

    Args:
        batch_size: M, large enough for the variance ``(rho + 2)/M`` of ``sigma_B^2`` to be below 1.
        kurtosis: Excess kurtosis.

    Raises:
        ValueError: If the batch is too small for the moments to exist.

    Examples:
        >>> round(inverse_std_bias(32), 4)
        0.0242
    """
    return float(_mean_inverse(torch.tensor(_shape(batch_size, kurtosis + 2.0), dtype=torch.float64))) - 1.0


def _shape(batch_size: float, square_variance: float) -> float:
    statistics_noise(batch_size)
    shape = batch_size / max(square_variance, 1e-6)
    if shape <= 1.0:
        raise ValueError(
            f"batch_size {batch_size} is too small: the relative variance of the batch variance is {1 / shape:.3g}, "
            "not below 1"
        )
    return shape


def _mean_inverse(shape: Tensor) -> Tensor:
    """E[s^(-1/2)] for s ~ Gamma(shape) / shape."""
    return (torch.lgamma(shape - 0.5) - torch.lgamma(shape)).exp() * shape.sqrt()


def sample_noise(
    mean_variance: Tensor,
    square_variance: Tensor,
    batch_size: float,
    *,
    distribution: str = "chi",
    compensate: bool = True,
    rows: int = 1,
) -> tuple[Tensor, Tensor]:
    """Draw the factor r and the shift s of ``u -> r u + s``: what the statistics of an independent batch do to u.

    Args:
        mean_variance: V(m) of every channel, (C,): 1 for inputs (N, C).
        square_variance: V(q), (C,): ``rho + 2`` for inputs (N, C).
        batch_size: M.
        distribution: ``"chi"``: ``r = sigma_P / sigma_B`` with ``sigma_B^2`` gamma distributed (exactly that of
            Gaussian values up to the degrees of freedom M for M - 1) and ``s = -a r``. ``"gaussian"``: the expansion
            itself, ``r = 1 - b``, ``s = -a``.
        compensate: Whether r is divided by its mean (``"gaussian"`` has mean 1 as it is).
        rows: Number of independent draws.

    Returns:
        r and s, (rows, C) each, from torch's global random state.

    Raises:
        ValueError: For an unknown distribution or a batch that is too small.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(unknown_name("distribution", distribution, DISTRIBUTIONS))
    size = (rows, mean_variance.numel())
    a = torch.randn(size, dtype=mean_variance.dtype, device=mean_variance.device) * (mean_variance / batch_size).sqrt()
    if distribution == "gaussian":
        b = torch.randn(size, dtype=a.dtype, device=a.device) * (square_variance / (4.0 * batch_size)).sqrt()
        return 1.0 - b, -a
    _shape(batch_size, float(square_variance.max()))
    shape = batch_size / square_variance.clamp_min(1e-6)
    s = torch.distributions.Gamma(shape, shape).sample((rows,))
    r = s.rsqrt()
    if compensate:
        r = r / _mean_inverse(shape)
    return r, -a * r


class BatchNoise:
    """Adds the noise of batch statistics behind the normalization layers of a model while it trains.

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
        distribution: See `sample_noise`.
        compensate: See `sample_noise`; False shows the bias that the compensation removes.
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
            raise ValueError("the model has no layer that normalizes by batch or population statistics")
        self.batch_size = batch_size
        self._options: dict[str, Any] = {"distribution": distribution, "compensate": compensate}
        self._mean, self._variance, self._per = mean, variance, per
        self._strengths = dict(strengths or {})
        self._handles = [module.register_forward_hook(self._hook(name)) for name, module in found.items()]

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return self._noisy(name, module, output) if module.training else output

        return add

    def _noisy(self, name: str, module: nn.Module, y: Tensor) -> Tensor:
        channels = y.shape[1]
        known = self._strengths.get(name)
        ones = torch.ones(channels, dtype=torch.promote_types(y.dtype, torch.float32), device=y.device)
        mean_variance = ones if known is None else known.mean_variance.to(ones)
        square_variance = 2.0 * ones if known is None else known.square_variance.to(ones)
        r, s = sample_noise(
            mean_variance * float(self._mean),
            square_variance,
            self.batch_size,
            rows=len(y) if self._per == "image" else 1,
            **self._options,
        )
        if not self._variance:
            s, r = s / r, torch.ones_like(r)
        table = (r.shape[0], channels) + (1,) * (y.dim() - 2)
        beta = _vector(module, "bias", y, 0.0)
        gamma = _vector(module, "weight", y, 1.0)
        return beta + (y - beta) * r.to(y.dtype).view(table) + gamma * s.to(y.dtype).view(table)

    def remove(self) -> None:
        """Take the noise off again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> BatchNoise:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.remove()


def _vector(module: nn.Module, name: str, like: Tensor, default: float) -> Tensor:
    value = getattr(module, name, None)
    if value is None:
        return torch.full((1,), default, dtype=like.dtype, device=like.device).view((1,) * like.dim())
    vector: Tensor = value
    return vector.view((1, -1) + (1,) * (like.dim() - 2))
