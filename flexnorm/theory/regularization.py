r"""BN as population normalization plus gamma decay: how strong, from where, and how to have it explicitly.

Luo et al. 2019, Sec. 2. With ``u = (h - mu_P) / sigma_P`` and the noise ``a = (mu_B - mu_P) / sigma_P``, ``b = sigma_B
/ sigma_P - 1`` of the batch statistics, the normalized pre-activation moves from ``gamma u + beta`` by ``d = -gamma (a
+ u b)`` to first order. The loss gains ``E[l'' d^2] / 2 = zeta gamma^2`` with (Eq. 3)

    zeta = E[l''] Var(a) / 2 + E[l'' u^2] Var(b) / 2 + E[l'' u] Cov(a, b)
    Var(a) = 1 / M,   Var(b) = (rho + 2) / (4 M),   Cov(a, b) = skewness / (2 M)

where ``l''`` is the curvature of the loss at the normalized pre-activation and rho the excess kurtosis of h. The
printed form has ``l'' = sigmoid`` in the first term, ``E[l'' u^2] = I(gamma)`` in the second and no third one (it is
zero for symmetric h). In a network the same a and b act on all positions of an image:

    zeta = [ I(beta) V(m) + I(gamma) V(q) / 4 + I(beta, gamma) C(m, q) ] / (2 M)

I: Fisher information per image of the shift and the scale of the standardized pre-activation (derivatives summed over
the positions of the image). m, q: mean of u and of u^2 over the positions of an image; V, C: variance and covariance
over images, so ``Var(mu_B) = V(m) sigma^2 / M`` exactly and ``Var(sigma_B) = V(q) sigma^2 / (4 M)`` to leading order,
however the positions are correlated. For inputs (N, C), V(m) = 1 and V(q) = rho + 2. Derivation and the limits of the
expansion: docs/theory.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from flexnorm._messages import unknown_name
from flexnorm.probe import ImageTables, Loss, Selection, batch_norm_layers, capture

PreactivationLoss = Callable[[Tensor, Tensor], Tensor]
"""``loss(h_hat, u)``: the loss of every sample, shape (P,), from the normalized pre-activation h_hat and the
standardized pre-activation u, both (P,); u may carry the label."""

CURVATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": torch.ones_like,
    "sigmoid": torch.sigmoid,
    "relu": lambda h: (h > 0).to(h.dtype),
}
"""Curvature of a negative log-likelihood whose mean function is the identity, softplus (the paper's smoothed ReLU), or
ReLU."""


class StatisticsNoise(NamedTuple):
    """Second moments of the noise of batch statistics, in units of the population's standard deviation.

    Attributes:
        mean: ``Var(mu_B) / sigma_P^2``.
        std: ``Var(sigma_B) / sigma_P^2``.
        covariance: ``Cov(mu_B, sigma_B) / sigma_P^2``.
    """

    mean: float
    std: float
    covariance: float = 0.0


class Curvature(NamedTuple):
    """Curvature of the loss with respect to a shared shift and a shared scale of the normalized pre-activation.

    Attributes:
        shift: ``E[l'']``; as a Fisher information that of beta, ``I(beta)``.
        scale: ``E[l'' u^2]``; as a Fisher information that of gamma, ``I(gamma)``.
        cross: ``E[l'' u]``.
    """

    shift: float
    scale: float
    cross: float = 0.0


def statistics_noise(batch_size: float, kurtosis: float = 0.0, skewness: float = 0.0) -> StatisticsNoise:
    """Return the noise of the mean and the standard deviation of ``batch_size`` independent values, to leading order.

    The paper prints ``Var(sigma_B) = (rho + 2)/(4M)``; it holds in units of ``sigma_P^2`` and with rho the EXCESS
    kurtosis.

    Args:
        batch_size: M, at least 2; may be an effective number of values.
        kurtosis: Excess kurtosis rho of h, at least -2; 0 for a Gaussian.
        skewness: Of h; 0 for anything symmetric.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> statistics_noise(32).std == 1 / 64
        True
    """
    if not batch_size >= 2:
        raise ValueError(f"batch_size must be at least 2, got {batch_size}")
    if not kurtosis >= -2:
        raise ValueError(f"excess kurtosis cannot be below -2, got {kurtosis}")
    return StatisticsNoise(1.0 / batch_size, (kurtosis + 2.0) / (4.0 * batch_size), skewness / (2.0 * batch_size))


def zeta(curvature: Curvature, noise: StatisticsNoise, *, mean: bool = True, variance: bool = True) -> float:
    """Return zeta, the strength of the gamma decay that the noise of the batch statistics amounts to.

    Args:
        curvature: Of the loss, see `curvature` for a perceptron and `layer_strength` for a network.
        noise: Of the statistics.
        mean: Whether the batch mean is used (False for variance-only BN).
        variance: Whether the batch variance is used (False for mean-only BN).

    Returns:
        The factor of ``gamma^2`` in the expected loss.

    Examples:
        >>> zeta(Curvature(1.0, 1.0), statistics_noise(32), mean=False)  # linear student, half the square
        0.0078125
    """
    alone = 0.5 * curvature.shift * noise.mean * mean + 0.5 * curvature.scale * noise.std * variance
    return alone + curvature.cross * noise.covariance * (mean and variance)


def zeta_printed(
    preactivation: Tensor,
    batch_size: float,
    *,
    score: Tensor | None = None,
    kurtosis: float = 0.0,
    curvature: str = "sigmoid",
    gamma: float = 1.0,
    beta: float = 0.0,
) -> Tensor:
    """Return zeta(h) as Eq. 3 prints it: ``(rho + 2)/(8M) I(gamma) + mean(sigmoid(h))/(2M)``.

    Args:
        preactivation: ``h_bar = gamma (h - mu_P)/sigma_P + beta`` of P samples, shape (P, *).
        batch_size: M, at least 2.
        score: ``d loss / d gamma`` of every sample, of the shape of `preactivation`; its mean square is I(gamma). By
            default I(gamma) is taken as ``mean(curvature (h_bar - beta)^2 / gamma^2)``, its expected value.
        kurtosis: Excess kurtosis rho of h.
        curvature: ``"sigmoid"`` as printed; ``"relu"``, its unsmoothed limit, and ``"identity"`` for special values.
        gamma: Scale in h_bar; needed without `score`, as is `beta`.
        beta: Shift in h_bar.

    Returns:
        Shape (*): the mean is over the first axis, so trailing axes may hold channels.

    Raises:
        ValueError: If the batch size, the kurtosis or the name of the curvature is not valid.
    """
    noise = statistics_noise(batch_size, kurtosis)
    if curvature not in CURVATURES:
        raise ValueError(unknown_name("curvature", curvature, CURVATURES))
    bend = CURVATURES[curvature](preactivation)
    information = ((preactivation - beta) / gamma).square() * bend if score is None else score.square()
    return 0.5 * noise.std * information.mean(0) + 0.5 * noise.mean * bend.mean(0)


def special_zeta(activation: str, batch_size: float) -> float:
    """Return the zeta of the paper's students: ``1/(2M)`` for a linear one, ``1/(4M)`` for ReLU.

    For Gaussian h, the loss ``(y - y_hat)^2`` without one half, and the batch variance only.

    Args:
        activation: ``"identity"`` or ``"relu"``.
        batch_size: M, at least 2.

    Raises:
        ValueError: For another activation or a batch size below 2.
    """
    known = {"identity": 2.0, "relu": 4.0}
    if activation not in known:
        raise ValueError(unknown_name("activation", activation, known))
    statistics_noise(batch_size)
    return 1.0 / (known[activation] * batch_size)


def curvature(loss: PreactivationLoss, u: Tensor, gamma: float = 1.0, beta: float = 0.0) -> Curvature:
    """Return the curvature of a loss of a single-layer perceptron, averaged over its standardized pre-activation.

    Args:
        loss: ``loss(h_hat, u)``, shape (P,) each, twice differentiable almost everywhere. A kink contributes only where
            the slope jumps, which autograd does not see; ``(y - relu(h))^2`` has none on average if ``E[y | h = 0] =
            0``.
        u: Standardized pre-activations, shape (P,), float64 for an accurate answer.
        gamma: Scale.
        beta: Shift.

    Returns:
        The averages of ``l''``, ``l'' u^2`` and ``l'' u``.
    """
    _, bend = _slope_and_curvature(loss, u, gamma, beta)
    return Curvature(float(bend.mean()), float((bend * u.square()).mean()), float((bend * u).mean()))


def own_batch_term(
    loss: PreactivationLoss,
    u: Tensor,
    batch_size: float,
    gamma: float = 1.0,
    beta: float = 0.0,
    *,
    mean: bool = True,
    variance: bool = True,
) -> float:
    r"""Return the first-order term that Eq. 3 leaves out: a sample pulls its own batch's statistics.

    ``E[d | u] = gamma [u (3 (rho + 2)/8 - u^2/2) + skewness/2] / M`` is not zero, so that the expected loss over real
    batches is

        E[loss(BN)] - loss(PN) = zeta gamma^2 + E[l' E[d | u]] + O(1/M^2)

    For a label that is linear in a Gaussian h it does nothing but rescale gamma by ``E[sigma_B] / sigma_P``; see
    docs/theory.md.

    Args:
        loss: As for `curvature`.
        u: Standardized pre-activations, shape (P,); kurtosis and skewness are taken from them.
        batch_size: M, at least 2.
        gamma: Scale.
        beta: Shift.
        mean: Whether the batch mean is used; if not, ``E[d | u] = gamma u (3 (rho + 2)/8 + 1 - u^2/2) / M``.
        variance: Whether the batch variance is used; if not, ``E[d | u] = -gamma u / M``.

    Returns:
        The term, to be added to ``zeta gamma^2``.
    """
    statistics_noise(batch_size)
    slope, _ = _slope_and_curvature(loss, u, gamma, beta)
    pull = torch.zeros_like(u)
    if variance:
        pull = pull + u * (0.375 * (u.pow(4).mean() - 1.0) + 1.0 - 0.5 * u.square())
    if mean:
        pull = pull - u
    if mean and variance:
        pull = pull + 0.5 * u.pow(3).mean()
    return float((slope * pull).mean()) * gamma / batch_size


def _slope_and_curvature(loss: PreactivationLoss, u: Tensor, gamma: float, beta: float) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        h = (gamma * u.detach() + beta).requires_grad_()
        (slope,) = torch.autograd.grad(loss(h, u).sum(), h, create_graph=True)
        if not slope.requires_grad:
            return slope, torch.zeros_like(u)
        (bend,) = torch.autograd.grad(slope.sum(), h, allow_unused=True)
    return slope.detach(), torch.zeros_like(u) if bend is None else bend


DISTRIBUTIONS: tuple[str, ...] = ("chi", "gaussian")
"""What `sample_noise` draws from."""


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
        compensate: Whether r is divided by its mean (``"gaussian"`` has mean 1 as it is), without which an independent
            sigma_B inflates the output and Eq. 3 does not hold. A batch's own statistics do not inflate.
        rows: Number of independent draws.

    Returns:
        r and s, (rows, C) each, from torch's global random state.

    Raises:
        ValueError: For an unknown distribution or a batch that is too small.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(unknown_name("distribution", distribution, DISTRIBUTIONS))
    tables = mean_variance.expand(rows, -1)
    a = torch.randn_like(tables) * (mean_variance / batch_size).sqrt()
    if distribution == "gaussian":
        return 1.0 - torch.randn_like(tables) * (square_variance / (4.0 * batch_size)).sqrt(), -a
    _shape(batch_size, float(square_variance.max()))
    shape = batch_size / square_variance.clamp_min(1e-6)
    s = torch.distributions.Gamma(shape, shape).sample((rows,))
    r = s.rsqrt()
    if compensate:
        r = r / _mean_inverse(shape)
    return r, -a * r


_TINY = 1e-12  # variances below it belong to dead channels, which are neither noisy nor regularized


@dataclass(frozen=True)
class LayerStrength:
    """What batch statistics do to one layer, apart from the factor 1/M. All tensors have shape (C,).

    Attributes:
        name: Name of the layer.
        images: Images it was estimated from.
        mean_part: M times the part of zeta that comes from the batch mean.
        std_part: M times the part that comes from the batch standard deviation.
        cross_part: M times the part that comes from their covariance.
        mean_variance: V(m); ``batch_size / mean_variance`` is the effective number of values behind the batch mean.
        square_variance: V(q), which for independent Gaussian values is 2.
    """

    name: str
    images: int
    mean_part: Tensor
    std_part: Tensor
    cross_part: Tensor
    mean_variance: Tensor
    square_variance: Tensor

    @property
    def total(self) -> Tensor:
        """M times zeta per channel, (C,), as estimated: noise may put a channel below 0."""
        return self.mean_part + self.std_part + self.cross_part

    def zeta(self, batch_size: float) -> Tensor:
        """Return zeta per channel, (C,), at a batch size; the whole depends on it as 1/M. Not below 0."""
        return self.total.clamp_min(0.0) / batch_size


@dataclass(frozen=True)
class DecayRow:
    """The decay that acts on, or amounts to, one layer.

    Attributes:
        layer: Its name.
        channels: Number of channels.
        zeta: Mean of zeta over the channels.
        zeta_max: Largest zeta of a channel.
        gamma_squared: Mean of gamma^2 over the channels.
        penalty: ``sum(zeta gamma^2)``: what the layer adds to the loss, its channels taken as independent.
    """

    layer: str
    channels: int
    zeta: float
    zeta_max: float
    gamma_squared: float
    penalty: float

    @classmethod
    def of(cls, layer: str, zeta: Tensor, gamma: Tensor, **more: Any) -> Self:
        """Return the row of a ``layer`` with ``zeta`` and ``gamma`` (C,); ``more`` are a subclass's own fields."""
        square, penalty = gamma.square(), float((zeta * gamma.square()).sum())
        return cls(layer, zeta.numel(), float(zeta.mean()), float(zeta.max()), float(square.mean()), penalty, **more)


def merge_tables(batches: Sequence[Sequence[ImageTables]]) -> list[ImageTables]:
    """Join the tables of several side passes, layer by layer.

    Args:
        batches: What `capture` returned for each batch.

    Returns:
        One entry per layer with the images of all batches.

    Raises:
        ValueError: If there is no batch, or the batches do not have the same layers.
    """
    if not batches:
        raise ValueError("no batches: give at least one")
    names = [[table.name for table in batch] for batch in batches]
    if any(other != names[0] for other in names):
        raise ValueError(
            "the layers that ran differ between batches; measure a model whose path does not depend on the data"
        )
    return [
        ImageTables(name, *map(torch.cat, zip(*(batch[index][1:] for batch in batches), strict=True)))
        for index, name in enumerate(names[0])
    ]


def _standardized(tables: ImageTables) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return m, q (mean of u and u^2 per image) and the derivatives by the shift and the scale of u, each (N, C)."""
    if len(tables.mean) < 4:
        raise ValueError(f"need at least 4 images to estimate the noise of batch statistics, got {len(tables.mean)}")
    centre = tables.mean.mean(0)
    offset = tables.mean - centre
    variance = (tables.var + offset.square()).mean(0)
    alive = variance > _TINY
    sigma = variance.clamp_min(_TINY).sqrt()
    m = torch.where(alive, offset / sigma, 0.0)
    q = torch.where(alive, (tables.var + offset.square()) / sigma.square(), 1.0)
    scale = torch.where(alive, (tables.scale + offset * tables.shift) / sigma, 0.0)
    return m, q, tables.shift, scale


def layer_strength(tables: ImageTables) -> LayerStrength:
    """Return the strength of every channel, the channels taken one by one as the paper does.

    Args:
        tables: Of one layer, at least 4 images; the error of the estimate falls as one over the square root of their
            number.

    Raises:
        ValueError: If there are fewer than 4 images.
    """
    m, q, shift, scale = _standardized(tables)
    square = q - 1.0
    v_m, v_q = m.square().mean(0), square.square().mean(0)
    mean_part = 0.5 * shift.square().mean(0) * v_m
    std_part = 0.125 * scale.square().mean(0) * v_q
    cross_part = 0.5 * (shift * scale).mean(0) * (m * square).mean(0)
    return LayerStrength(tables.name, len(m), mean_part, std_part, cross_part, v_m, v_q)


def joint_strength(tables: ImageTables, gamma: Tensor) -> float:
    """Return M times the loss that a whole layer's noise adds, without taking its channels for independent.

    The channels of one batch are noisy together: with g the (2C,) derivatives of an image's loss by shift and scale,
    and t the (2C,) noise that an image brings to mean and standard deviation, it is the mean over pairs of images of
    ``(g . t)^2 / 2``.

    Args:
        tables: Of one layer.
        gamma: Scale of every channel, (C,).

    Returns:
        The total, to be compared with ``M * sum(zeta * gamma^2)``.

    Raises:
        ValueError: If there are fewer than 4 images.
    """
    m, q, shift, scale = _standardized(tables)
    pull = torch.cat([gamma * shift, gamma * scale], dim=1)
    noise = torch.cat([m, 0.5 * (q - 1.0)], dim=1)
    n = len(m)
    return float((pull @ noise.T).square().sum() / (2.0 * n * n))


@dataclass(frozen=True)
class LayerAdvice(DecayRow):
    """The regularization of one layer at the batch size asked for: zeta is the gamma decay that BN amounts to.

    Attributes:
        zeta_per_channel: All of them, as a tuple.
        joint_penalty: `penalty` with the channels of a batch noisy together, which is what happens.
        mean_share: Part of `penalty` that comes from the batch mean, in [0, 1]; the rest is the batch variance's.
        effective_batch_mean: Median over channels of the effective number of independent values behind the batch mean:
            the batch size for (N, C) inputs, more for images; batch size times positions where these are uncorrelated.
        effective_batch_std: The same for the batch standard deviation (in Gaussian values).
    """

    zeta_per_channel: tuple[float, ...]
    joint_penalty: float
    mean_share: float
    effective_batch_mean: float
    effective_batch_std: float


@dataclass(frozen=True)
class Advice:
    """The answer of `advise`.

    Attributes:
        batch_size: The batch size M that it is about.
        images: Number of images that it was estimated from.
        loss: Name of the loss (or of the function) whose curvature was used.
        layers: One entry per layer and call.
        strengths: The estimates behind them, by layer, independent of the batch size; for `BatchNoise`.
    """

    batch_size: int
    images: int
    loss: str
    layers: tuple[LayerAdvice, ...]
    strengths: dict[str, LayerStrength] = field(repr=False)

    @property
    def penalty(self) -> float:
        """Sum of the layers' penalties, in units of the loss."""
        return sum(layer.penalty for layer in self.layers)

    def compensation(self, batch_size: int) -> dict[str, tuple[float, ...]]:
        """Return the decay per channel that keeps the regularization when the batch size changes.

        Added to the loss as ``sum(value gamma^2)`` it keeps the regularization that `self.batch_size` exerts:
        ``zeta(M) - zeta(M')``. Negative where the new batch is smaller: then BN itself regularizes more than before,
        which no decay can undo (lower other regularization instead).

        Args:
            batch_size: The new batch size M', at least 2.

        Raises:
            ValueError: If it is below 2.
        """
        statistics_noise(batch_size)
        factor = 1.0 - self.batch_size / batch_size
        return {layer.layer: tuple(factor * value for value in layer.zeta_per_channel) for layer in self.layers}

    def asdict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts, ready for JSON."""
        rows = [{**vars(layer), "zeta_per_channel": list(layer.zeta_per_channel)} for layer in self.layers]
        values = {name: value for name, value in vars(self).items() if name != "strengths"}
        return {**values, "penalty": self.penalty, "layers": rows}

    def table(self, batch_size: int | None = None) -> str:
        """Return the advice as lines of text, with the decay that another batch size needs if one is given."""
        change = None if batch_size is None else self.compensation(batch_size)
        lines = [f"{'layer':<28} {'zeta':>9} {'gamma^2':>9} {'penalty':>9} {'joint':>9} {'mean part':>9} {'values':>8}"]
        for r in self.layers:
            line = f"{r.layer:<28} {r.zeta:9.2e} {r.gamma_squared:9.3g} {r.penalty:9.2e} {r.joint_penalty:9.2e}"
            lines.append(f"{line} {r.mean_share:9.0%} {r.effective_batch_mean:8.0f}")
            if change:
                lines[-1] += f" {sum(change[r.layer]) / r.channels:12.2e}"
        lines[0] += f" {f'add at {batch_size}':>12}" if change else ""
        total = f"total penalty at batch size {self.batch_size}: {self.penalty:.3g} of the loss ({self.images} images)"
        return "\n".join([*lines, total])


def advise(
    model: nn.Module,
    batches: Iterable[Tensor | Sequence[Any]],
    batch_size: int,
    *,
    loss: Loss = "cross_entropy",
    layers: Selection | None = None,
    max_images: int = 2048,
    seed: int = 0,
) -> Advice:
    """Measure how strongly the batch noise of every BN layer regularizes a model (Luo et al. 2019, Eq. 3, generalized).

    One forward and one backward pass per batch in evaluation mode; the model, its gradients and the random state stay
    as they were. Each layer is taken alone, with population statistics in all others.

    Args:
        model: A model whose BN layers have meaningful running statistics (trained, or recalibrated). Population and
            unitized layers are reported too: for population normalization, what BN in their place would exert.
        batches: Inputs (N, *), or ``(inputs, targets, ...)``; their size has nothing to do with `batch_size`.
        batch_size: The training batch size M to report for, at least 2.
        loss: Loss whose curvature counts; see `CURVED_LOSSES`, or a function ``loss(outputs, targets)``.
        layers: Which layers, as in :func:`flexnorm.probe.select`; all batch-normalized ones by default.
        max_images: Where to stop reading batches.
        seed: Of the draws of the curvature.

    Returns:
        The advice, layer by layer.

    Raises:
        ValueError: If there are no batches, fewer than 4 images, no such layers, or an argument is out of range.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        >>> advice = advise(model, [torch.randn(256, 4)], batch_size=32)
        >>> round(advice.layers[0].effective_batch_mean)
        32
    """
    statistics_noise(batch_size)
    found = batch_norm_layers(model, layers)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator(device).manual_seed(seed)
    seen, collected = 0, []
    for batch in batches:
        inputs, *rest = (batch,) if isinstance(batch, Tensor) else batch
        inputs, targets = inputs.to(device), rest[0].to(device) if rest and isinstance(rest[0], Tensor) else None
        collected.append(capture(model, inputs, loss, targets, layers=layers, generator=generator))
        seen += len(inputs)
        if seen >= max_images:
            break
    rows, strengths = [], {}
    for table in merge_tables(collected):
        strength = layer_strength(table)
        strengths[table.name] = strength
        weight = getattr(found[table.name.split("#")[0]], "weight", None)
        gamma = torch.ones_like(strength.mean_part) if weight is None else weight.detach().to(strength.mean_part)
        zeta = strength.zeta(batch_size)
        parts = strength.mean_part, strength.std_part
        from_mean, from_std = (float((part * gamma.square()).sum()) / batch_size for part in parts)
        variances = strength.mean_variance, strength.square_variance / 2
        values = [round(batch_size * float(v.clamp_min(1e-12).reciprocal().median()), 6) for v in variances]
        row = LayerAdvice.of(
            table.name,
            zeta,
            gamma,
            zeta_per_channel=tuple(zeta.tolist()),
            joint_penalty=joint_strength(table, gamma) / batch_size,
            mean_share=from_mean / (from_mean + from_std) if from_mean + from_std > 0 else 0.0,
            effective_batch_mean=values[0],
            effective_batch_std=values[1],
        )
        rows.append(row)
    name = loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
    return Advice(batch_size, seen, name, tuple(rows), strengths)
