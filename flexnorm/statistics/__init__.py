"""What estimates, holds or merges the statistics of normalization layers, in any model."""

from flexnorm.statistics.accumulate import Accumulation, accumulate
from flexnorm.statistics.estimate import PopulationEstimator, estimate_population
from flexnorm.statistics.frozen import freeze, is_frozen, unfreeze
from flexnorm.statistics.recalibrate import recalibrate

__all__ = [
    "Accumulation",
    "PopulationEstimator",
    "accumulate",
    "estimate_population",
    "freeze",
    "is_frozen",
    "recalibrate",
    "unfreeze",
]
