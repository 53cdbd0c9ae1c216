"""Learning dynamics of a teacher-student perceptron under BN, WN and SGD (Luo et al. 2019, Sec. 3)."""

from flexnorm.theory.dynamics.averages import ACTIVATIONS, Averages, averages
from flexnorm.theory.dynamics.ode import METHODS, Trajectory, rates, solve
from flexnorm.theory.dynamics.online import simulate
from flexnorm.theory.dynamics.stability import (
    FixedPoint,
    effective_learning_rate,
    eigenvalues,
    fixed_point,
    jacobian,
    max_learning_rate,
    printed_eigenvalue,
)

__all__ = [
    "ACTIVATIONS",
    "METHODS",
    "Averages",
    "FixedPoint",
    "Trajectory",
    "averages",
    "effective_learning_rate",
    "eigenvalues",
    "fixed_point",
    "jacobian",
    "max_learning_rate",
    "printed_eigenvalue",
    "rates",
    "simulate",
    "solve",
]
