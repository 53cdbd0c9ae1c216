"""The experiments that the formulas of :mod:`flexnorm.theory` are checked against (Luo et al. 2019)."""

from flexnorm.lab.simulations.online import online_sgd
from flexnorm.lab.simulations.perceptron import Estimate, bn_gap
from flexnorm.lab.simulations.students import STUDENTS, Simulated, generalization_error, train_students, training_set

__all__ = [
    "STUDENTS",
    "Estimate",
    "Simulated",
    "bn_gap",
    "generalization_error",
    "online_sgd",
    "train_students",
    "training_set",
]
