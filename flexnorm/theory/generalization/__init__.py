"""Generalization of a student of a noisy linear teacher (Luo et al. 2019, Sec. 4): formulas and simulated students."""

from flexnorm.theory.generalization.formulas import (
    gamma_decay_linear,
    optimum,
    resolvent,
    ridge_strength,
    sgd_linear,
    sgd_relu,
)
from flexnorm.theory.generalization.students import STUDENTS, Simulated, generalization_error, simulate, training_set

__all__ = [
    "STUDENTS",
    "Simulated",
    "gamma_decay_linear",
    "generalization_error",
    "optimum",
    "resolvent",
    "ridge_strength",
    "sgd_linear",
    "sgd_relu",
    "simulate",
    "training_set",
]
