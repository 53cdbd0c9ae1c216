"""Initial gamma and bias of a NormProp layer.

``"paper"``: bias 0 and gamma = 1 / sqrt(Jacobian gain at gamma = 1), 1 / 1.21 for ReLU. The Jacobian's singular
values are then near 1, but with the paper's constants the forward variance shrinks layer by layer.

``"stable"``: gamma = 1 and the bias of smallest magnitude, on a grid of half units, at which the gain chi of
:func:`~flexnorm.nn.normprop.constants.activation_gains` is at most 0.9, so that the mean square of every single
sample contracts towards 1 with depth. ReLU, GELU and PReLU get 1/2, SiLU 1, hard-swish 3/2; tanh, sigmoid, ELU and
SELU contract by themselves and keep 0. Where no value of the grid reaches 0.9 (softplus), the one with the smallest
chi is taken.
"""

from __future__ import annotations

import functools

import torch

from flexnorm.nn.normprop.activations import Activation
from flexnorm.nn.normprop.constants import activation_gains

TARGET_CHI = 0.9
"""The chi that ``init="stable"`` asks for: 1 is marginal, a tenth of margin survives the fluctuations of layers."""


def _stable(activation: Activation) -> tuple[float, float]:
    # Ordered by magnitude, positive first, so that the first hit is the smallest shift.
    grid = sorted((0.5 * k for k in range(-4, 5)), key=lambda b: (abs(b), -b))
    with torch.no_grad():
        chi = activation_gains(activation, torch.ones(len(grid), dtype=torch.float64), torch.tensor(grid).double()).chi
    for bias, value in zip(grid, chi.tolist(), strict=True):
        if value <= TARGET_CHI:
            return 1.0, bias
    return 1.0, grid[int(chi.nan_to_num(torch.inf).argmin())]


@functools.lru_cache(maxsize=64)
def initial_affine(activation: Activation | None, init: str) -> tuple[float, float]:
    """Return the initial (gamma, bias) of a layer.

    Args:
        activation: The layer's activation; None (a last layer) and the identity start at (1, 0).
        init: ``"stable"`` or ``"paper"``.
    """
    if activation is None or activation.negative_slope == 1.0:
        return 1.0, 0.0
    # Plain CPU numbers, also when the layer is being built on another default device or under a transform.
    with torch.device("cpu"):
        if init == "stable":
            return _stable(activation)
        with torch.no_grad():
            return float(activation_gains(activation).jacobian) ** -0.5, 0.0
