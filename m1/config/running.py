"""How a run keeps its checkpoints and what the flow does about failures."""

from __future__ import annotations

from pydantic import Field

from m1.config.base import Section


class Checkpoints(Section):
    """How the training stages keep their checkpoints; `checkpoint_every` of a stage says when it makes one."""

    keep: int = Field(
        2, ge=1, description="newest complete checkpoints kept while a stage trains; at its end, the last"
    )
    keep_every: int | None = Field(
        None, ge=1, description="those of steps that are multiples of this are kept for good"
    )
    asynchronous: bool = Field(True, description="written beside the training, where the platform can (Linux)")
    stop_seconds: float = Field(
        15.0, ge=1, description="from SIGTERM to the end of the stage: long enough for one step and one checkpoint"
    )


class FlowSettings(Section):
    """How the flow treats a stage that fails."""

    retries: int = Field(0, ge=0, description="retries of a stage that was killed or lost its machine")
    retry_delay_seconds: int = Field(5, ge=0)
