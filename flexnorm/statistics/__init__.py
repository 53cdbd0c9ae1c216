"""What estimates, holds or merges the statistics of normalization layers, in any model."""

from flexnorm.engine import Pool, pool_processes
from flexnorm.statistics.accumulate import Accumulation, accumulate
from flexnorm.statistics.frozen import Frozen, freeze, freeze_layer, has_statistics, is_frozen, unfreeze
from flexnorm.statistics.recalibrate import PopulationEstimator, estimate_population, recalibrate

__all__ = [
    "Accumulation",
    "Frozen",
    "Pool",
    "PopulationEstimator",
    "accumulate",
    "estimate_population",
    "freeze",
    "freeze_layer",
    "has_statistics",
    "is_frozen",
    "pool_processes",
    "recalibrate",
    "unfreeze",
]
