"""BN as population normalization plus gamma decay: how strong, from where, and how to have it explicitly.

Luo et al. 2019, Sec. 2.
"""

from flexnorm.probe.capture import CURVED_LOSSES, ImageTables, batch_norm_layers, capture
from flexnorm.theory.regularization.advice import Advice, LayerAdvice, advise
from flexnorm.theory.regularization.montecarlo import Estimate, bn_gap
from flexnorm.theory.regularization.strength import LayerStrength, joint_strength, layer_strength, merge_tables
from flexnorm.theory.regularization.zeta import (
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
    "Curvature",
    "Estimate",
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
    "joint_strength",
    "layer_strength",
    "merge_tables",
    "own_batch_term",
    "special_zeta",
    "statistics_noise",
    "zeta",
    "zeta_printed",
]
