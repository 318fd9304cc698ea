"""Starting a stage's processes, following them, and leaving nothing of them behind."""

from infra.launch.base import Handle, Job, Launcher, Outcome
from infra.launch.local import LocalLauncher
from infra.launch.stages import DataResult, StageKilled, grace_seconds, record_data_set, run_data_stage, run_stage

__all__ = [
    "DataResult",
    "Handle",
    "Job",
    "Launcher",
    "LocalLauncher",
    "Outcome",
    "StageKilled",
    "grace_seconds",
    "record_data_set",
    "run_data_stage",
    "run_stage",
]
