r"""What a layer's own parameters say about its shift, before any data is seen (Huang & Yu, arXiv 2001.02814).

Let $\beta$ be the layer's bias and $R = E\|Y - \beta\|$ its *radius*. Going from Y to $\beta$, on to $\beta'$ and out
to Y' gives

    $W_1(P, P') \le R + R' + \|\beta - \beta'\|$,

so whatever bounds the radius bounds the shift. The paper's theorem was not available in print; the radii below are
derived from its definitions and checked by tests against measured distances. They are for points per position; one
point per image multiplies every term by sqrt(positions).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from flexnorm.probe import Samples

Noise = float | Tensor


def second_moment_excess(mean: Tensor, var: Tensor, used_mean: Tensor, used_var: Tensor, eps: float = 1e-5) -> Tensor:
    r"""The noise $n_c = E \hat x_c^2 - 1$ of standardizing data with statistics that are not its own.

    $1 + n_c = (v_c + (m_c - \mu_c)^2) / (\sigma_c^2 + \epsilon)$ for data of mean m and variance v that is standardized
    with $\mu, \sigma^2$. With the data's own moments it is 0 up to eps.

    Args:
        mean: (C,) means of the data.
        var: (C,) biased variances of the data.
        used_mean: (C,) means that the layer uses.
        used_var: (C,) variances that the layer uses.
        eps: What the layer adds to the variance.

    Returns:
        (C,), at least -1.
    """
    return (var + (mean - used_mean).square()) / (used_var + eps) - 1


def batch_norm_radius(weight: Tensor, noise: Noise = 0.0) -> Tensor:
    r"""Upper bound $\sqrt{\sum_c \gamma_c^2 (1 + n_c)}$ of $E\|Y - \beta\|$ for batch or population normalization.

    It grows with the dimension and the noise, and does not vanish when the noise does: bounded, not reduced.

    Args:
        weight: (C,) the scale gamma.
        noise: n, one number or (C,); see :func:`second_moment_excess`.

    Returns:
        A scalar tensor.
    """
    excess = torch.as_tensor(noise, dtype=weight.dtype, device=weight.device)
    if bool((excess < -1).any()):
        raise ValueError(f"the noise E xhat^2 - 1 is at least -1, got {float(excess.min()):.3g}")
    # A channel of weight 0 is constant, however large the noise.
    terms = weight.square() * (1 + excess)
    return torch.where(weight == 0, 0.0, terms).sum().sqrt()


def unitized_radius(
    weight: Tensor, alpha: Tensor, noise: Noise = 0.0, *, positions: int = 1, unit_norm: str = "paper"
) -> Tensor:
    r"""Upper bound of $E\|Y - \beta\|$ for the unitized layer.

    $\max_c |\gamma_c \alpha_c| K + \sqrt{\sum_c \gamma_c^2 (1 - \alpha_c)^2 (1 + n_c)}$ per position, with
    $K = \sqrt{P}$ (``unit_norm="paper"``) or $\sqrt{C}$ (``"rms"``): the noise enters with the share 1 - alpha only.

    Args:
        weight: (C,) the scale gamma.
        alpha: (C,) how far each channel is unitized.
        noise: n, one number or (C,).
        positions: P, number of spatial positions of the layer's input (1 for (N, C) input).
        unit_norm: Which length the layer divides by, see :class:`flexnorm.nn.UnitizedBatchNorm2d`.

    Returns:
        A scalar tensor.
    """
    constant = math.sqrt(positions if unit_norm == "paper" else len(weight))
    return (weight * alpha).abs().max() * constant + batch_norm_radius(weight * (1 - alpha), noise)


def layer_bound(
    before: nn.Module,
    after: nn.Module | None = None,
    *,
    noise: Noise | None = None,
    noise_after: Noise | None = None,
    positions: int = 1,
    samples: Samples = "position",
) -> float:
    r"""Upper bound of W_1 between the outputs of a layer before and after an update, from its parameters alone.

    Args:
        before: A layer as it was: BatchNorm, population normalization or unitized BatchNorm, of this package or
            torch's.
        after: The same layer later; ``None`` for unchanged parameters (the input may still have moved).
        noise: Noise of the statistics before, one number or (C,); see :func:`second_moment_excess`. By default 0 for a
            layer in training that standardizes a batch with its own moments, and infinite for one that uses running or
            population statistics (evaluation, frozen, population normalization): nothing is known of its input.
        noise_after: Noise after; ``None`` for the same.
        positions: Number of spatial positions (1 for (N, C) input); only for unitized layers and ``samples="image"``.
        samples: Whether a point is a ``"position"`` in R^C or an ``"image"`` in R^(C P).

    Returns:
        The bound, in the units of the output.

    Raises:
        TypeError: A layer of another kind, for which no such bound is known.

    Examples:
        >>> layer_bound(nn.BatchNorm2d(64))
        16.0
    """
    after = before if after is None else after
    radii = _radius(before, noise, positions) + _radius(after, noise if noise_after is None else noise_after, positions)
    first, second = (getattr(layer, "bias", None) for layer in (before, after))
    gap = 0.0 if first is None or second is None else float((first.detach() - second.detach()).double().norm())
    return (radii + gap) * (math.sqrt(positions) if samples == "image" else 1.0)


# Those of layers that add an activation, as timm's do, may stretch what the parameters bound.
_STANDARD_FORWARDS = (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward)


def _radius(layer: Any, noise: Noise | None, positions: int) -> float:
    from flexnorm.engine import NORMS, Norm  # here, not above: the layers bring in the compiler
    from flexnorm.nn import norm_of

    norm = norm_of(layer)
    # A subclass with a rule of its own has the name of a norm, and not its bound.
    own = isinstance(layer, Norm) and type(layer) not in NORMS.get(layer.norm_name, {}).values()
    if norm is None or own or norm.norm_name not in ("batch", "population", "unitized"):
        raise TypeError(
            f"no bound is known for {type(layer).__name__} from its parameters alone; BatchNorm, population "
            "normalization and unitized BatchNorm have one"
        )
    if isinstance(layer, nn.modules.batchnorm._BatchNorm) and type(layer).forward not in _STANDARD_FORWARDS:
        raise TypeError(
            f"no bound is known for {type(layer).__name__}, a BatchNorm with a forward of its own: what that makes of "
            "the standardized activation is not in its parameters"
        )
    if noise is None:
        # Nothing is known of data that is standardized with statistics other than its own.
        foreign = not layer.training or getattr(layer, "frozen", False) or norm.statistics_from == "population"
        noise = math.inf if foreign and layer.running_mean is not None else 0.0
    weight = torch.ones(layer.num_features) if layer.weight is None else layer.weight.detach()
    if norm.norm_name == "unitized":
        alpha = layer.alpha.detach().clamp(0, 1) if layer.constrain_alpha else layer.alpha.detach()
        shape = {"positions": positions, "unit_norm": layer.unit_norm}
        return float(unitized_radius(weight.double(), alpha.double(), noise, **shape))
    return float(batch_norm_radius(weight.double(), noise))
