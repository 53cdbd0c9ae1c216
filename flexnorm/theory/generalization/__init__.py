"""Generalization of a student of a noisy linear teacher (Luo et al. 2019, Sec. 4)."""

from flexnorm.theory.generalization.formulas import (
    gamma_decay_linear,
    optimum,
    resolvent,
    ridge_strength,
    sgd_linear,
    sgd_relu,
)

__all__ = [
    "gamma_decay_linear",
    "optimum",
    "resolvent",
    "ridge_strength",
    "sgd_linear",
    "sgd_relu",
]
