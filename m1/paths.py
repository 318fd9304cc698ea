"""Where things are kept. Everything a run writes is below the checkout, in three git-ignored folders."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROFILES = ROOT / "profiles"
DATA_SPECS = ROOT / "data_specs"
#: Local services: pid files, logs, databases, MLflow artifacts.
STATE = ROOT / ".m1"


def data_dir(profile: str, stage: str) -> Path:
    """Output of one data stage; DVC owns what is inside. `data/<profile>/<stage>`."""
    return ROOT / "data" / profile / stage


def runs_dir(profile: str, stage: str) -> Path:
    """Parent of the run folders of one training stage. `runs/<profile>/<stage>`."""
    return ROOT / "runs" / profile / stage


def shown(path: Path) -> str:
    """A path for people: relative to the checkout where it is inside it."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
