"""BN as population normalization plus gamma decay: how strong, from where, and how to have it explicitly.

Luo et al. 2019, Sec. 2.
"""

from evenkeel.theory.regularization.advice import Advice, LayerAdvice, advise
from evenkeel.theory.regularization.capture import CURVED_LOSSES, ImageTables, batch_norm_layers, capture
from evenkeel.theory.regularization.decay import DecayRow, GammaDecay
from evenkeel.theory.regularization.emulation import BatchNoise, inverse_std_bias, sample_noise
from evenkeel.theory.regularization.montecarlo import Estimate, bn_gap
from evenkeel.theory.regularization.strength import LayerStrength, joint_strength, layer_strength, merge_tables
from evenkeel.theory.regularization.zeta import (
    CURVATURES,
    Curvature,
    PreactivationLoss,
    StatisticsNoise,
    curvature,
    own_batch_term,
    special_zeta,
    statistics_noise,
    zeta,
    zeta_printed,
)

__all__ = [
    "CURVATURES",
    "CURVED_LOSSES",
    "Advice",
    "BatchNoise",
    "Curvature",
    "DecayRow",
    "Estimate",
    "GammaDecay",
    "ImageTables",
    "LayerAdvice",
    "LayerStrength",
    "PreactivationLoss",
    "StatisticsNoise",
    "advise",
    "batch_norm_layers",
    "bn_gap",
    "capture",
    "curvature",
    "inverse_std_bias",
    "joint_strength",
    "layer_strength",
    "merge_tables",
    "own_batch_term",
    "sample_noise",
    "special_zeta",
    "statistics_noise",
    "zeta",
    "zeta_printed",
]
