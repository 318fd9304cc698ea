"""How difficult generated problems are."""

from __future__ import annotations

from pydantic import Field, model_validator

from m1.config.base import Section


class TaskRange(Section):
    """Inclusive range of difficulty levels, 1 the easiest."""

    min_difficulty: int = Field(1, ge=1, le=10)
    max_difficulty: int = Field(ge=1, le=10)

    @model_validator(mode="after")
    def _ordered(self) -> TaskRange:
        if self.min_difficulty > self.max_difficulty:
            raise ValueError(f"min_difficulty={self.min_difficulty} exceeds max_difficulty={self.max_difficulty}")
        return self
