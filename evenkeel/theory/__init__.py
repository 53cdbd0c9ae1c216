"""What BatchNorm does: population normalization plus gamma decay, learning dynamics, generalization.

Luo, Wang, Shao and Peng, "Towards Understanding Regularization in Batch Normalization", ICLR 2019. Formulas, the
simulations that check them, and tools that use them on a network. Derivations and findings: docs/theory.md.
"""

from evenkeel.theory import dynamics, figures, generalization, regularization
from evenkeel.theory.population import PopulationEstimator, estimate_population
from evenkeel.theory.regularization import Advice, BatchNoise, GammaDecay, advise

__all__ = [
    "Advice",
    "BatchNoise",
    "GammaDecay",
    "PopulationEstimator",
    "advise",
    "dynamics",
    "estimate_population",
    "figures",
    "generalization",
    "regularization",
]
