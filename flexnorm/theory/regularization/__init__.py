"""BN as population normalization plus gamma decay: how strong, from where, and how to have it explicitly.

Luo et al. 2019, Sec. 2.
"""

from flexnorm.theory.regularization.advice import Advice, LayerAdvice, advise
from flexnorm.theory.regularization.noise import (
    DISTRIBUTIONS,
    inverse_std_bias,
    sample_noise,
)
from flexnorm.theory.regularization.strength import (
    DecayRow,
    LayerStrength,
    joint_strength,
    layer_strength,
    merge_tables,
)
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
    "DISTRIBUTIONS",
    "Advice",
    "Curvature",
    "DecayRow",
    "LayerAdvice",
    "LayerStrength",
    "PreactivationLoss",
    "StatisticsNoise",
    "advise",
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
