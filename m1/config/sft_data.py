"""Worked answers for the supervised cold start."""

from __future__ import annotations

from pydantic import Field

from m1.config.base import Section
from m1.config.tasks import TaskRange


class SftData(Section):
    """Worked answers from the task generators."""

    samples_per_task: int = Field(ge=1)
    direct_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of the samples whose think block is empty: the answer without reasoning"
    )
    tasks: dict[str, TaskRange]
