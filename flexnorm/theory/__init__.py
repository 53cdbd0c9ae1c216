"""What BatchNorm does: population normalization plus gamma decay, learning dynamics, generalization.

Luo, Wang, Shao and Peng, "Towards Understanding Regularization in Batch Normalization", ICLR 2019. Formulas; the
simulations that check them are :mod:`flexnorm.lab.simulations`. Derivations and findings: docs/theory.md.
"""

from flexnorm.theory import dynamics, generalization, regularization
from flexnorm.theory.regularization import Advice, advise

__all__ = ["Advice", "advise", "dynamics", "generalization", "regularization"]
