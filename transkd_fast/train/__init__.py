"""The reference trainer: configuration, loop, checkpoints, scores, and the check of fused against eager."""

from transkd_fast.backends import BackendError
from transkd_fast.data import DataError
from transkd_fast.models import WeightsError
from transkd_fast.models.export import ExportError
from transkd_fast.train.checkpoint import CheckpointError
from transkd_fast.train.config import ConfigError, load_config
from transkd_fast.train.loop import TrainingError
from transkd_fast.train.run import RunResult, evaluate_run, train, verify_config, verify_run
from transkd_fast.train.settings import Config

# What the command line reports as a message rather than a traceback.
ERRORS = (BackendError, CheckpointError, ConfigError, DataError, ExportError, TrainingError, WeightsError)

__all__ = [
    "ERRORS",
    "CheckpointError",
    "Config",
    "ConfigError",
    "RunResult",
    "TrainingError",
    "evaluate_run",
    "load_config",
    "train",
    "verify_config",
    "verify_run",
]
