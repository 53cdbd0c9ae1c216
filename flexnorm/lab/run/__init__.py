"""From a config to results: a training loop whose runs can be killed and resumed, and comparisons of many runs."""

from flexnorm.lab.files import BusyError, WriteError
from flexnorm.lab.run.compare import Progress, compare
from flexnorm.lab.run.config import Config, assign, load_config, load_variants
from flexnorm.lab.run.environment import Interrupted
from flexnorm.lab.run.loop import train_run
from flexnorm.lab.run.settings import ESTIMATE, GAMMA_DECAY, OPTIMS, SCHEDULES

__all__ = [
    "ESTIMATE",
    "GAMMA_DECAY",
    "OPTIMS",
    "SCHEDULES",
    "BusyError",
    "Config",
    "Interrupted",
    "Progress",
    "WriteError",
    "assign",
    "compare",
    "load_config",
    "load_variants",
    "train_run",
]
