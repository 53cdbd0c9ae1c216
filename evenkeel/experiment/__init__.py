"""From a config to results: a training loop whose runs can be killed and resumed, and comparisons of many runs."""

from evenkeel.experiment.compare import Progress, compare
from evenkeel.experiment.config import ESTIMATE, GAMMA_DECAY, NORMS, OPTIMS, Config, load_config, load_variants
from evenkeel.experiment.files import BusyError, WriteError
from evenkeel.experiment.loop import Epoch, train_run
from evenkeel.experiment.schedule import SCHEDULES
from evenkeel.experiment.stop import Interrupted

__all__ = [
    "ESTIMATE",
    "GAMMA_DECAY",
    "NORMS",
    "OPTIMS",
    "SCHEDULES",
    "BusyError",
    "Config",
    "Epoch",
    "Interrupted",
    "Progress",
    "WriteError",
    "compare",
    "load_config",
    "load_variants",
    "train_run",
]
