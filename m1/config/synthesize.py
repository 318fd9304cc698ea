"""Prompts with verifiable answers."""

from __future__ import annotations

from pydantic import Field

from m1.config.base import Section
from m1.config.families import PLAIN, FamilyTasks, SweTasks, named
from m1.config.tasks import TaskRange


class Synthesize(Section):
    """Prompts for reinforcement learning and held-out prompts, disjoint by content from each other and from SFT."""

    train_prompts_per_task: int = Field(ge=1)
    heldout_prompts_per_task: int = Field(ge=1)
    tasks: dict[str, TaskRange]
    swe: SweTasks | None = None

    def families(self) -> tuple[str, ...]:
        """Names of the families whose tasks are made."""
        return PLAIN, *named(self, FamilyTasks)
