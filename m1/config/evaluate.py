"""Held-out evaluation."""

from __future__ import annotations

from pydantic import Field

from m1.config.base import Section
from m1.config.families import PLAIN, EvaluateSwe, FamilyPrompts, Questions, named


class Evaluate(Section):
    """pass@1 as the mean of k samples (report §6: temperature 1.0, top-p 0.95)."""

    samples_per_prompt: int = Field(ge=1)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(0.95, gt=0, le=1)
    max_new_tokens: int = Field(ge=1)
    prompts_per_task: int = Field(ge=1)
    #: Prompts per task for the checkpoint before SFT; all where absent. It cannot end an answer yet, so every response
    #: fills the window: the most expensive checkpoint to evaluate, and the least interesting one.
    prompts_per_task_before_sft: int | None = Field(None, ge=1)
    swe: EvaluateSwe | None = None

    def asked(self) -> dict[str, Questions]:
        """What every family is asked, by its name."""
        few = self.prompts_per_task_before_sft or self.prompts_per_task
        plain = Questions(FamilyPrompts(), self.prompts_per_task, few, self.samples_per_prompt, self.max_new_tokens)
        others = {
            name: Questions(
                part,
                part.tasks_per_kind,
                min(part.tasks_per_kind, self.prompts_per_task_before_sft or part.tasks_per_kind),
                part.samples_per_task,
                part.max_new_tokens or self.max_new_tokens,
            )
            for name, part in named(self, EvaluateSwe).items()
        }
        return {PLAIN: plain, **others}
