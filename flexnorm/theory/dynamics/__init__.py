"""Learning dynamics of a teacher-student perceptron under BN, WN and SGD (Luo et al. 2019, Sec. 3)."""

from flexnorm.theory.dynamics.averages import ACTIVATIONS, Averages, averages
from flexnorm.theory.dynamics.learn import Trajectory, solve
from flexnorm.theory.dynamics.student import METHODS, FixedPoint, Student

__all__ = ["ACTIVATIONS", "METHODS", "Averages", "FixedPoint", "Student", "Trajectory", "averages", "solve"]
