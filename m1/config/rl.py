"""Reinforcement learning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from m1.config.base import Section
from m1.config.families import PLAIN, FamilyPrompts, RlSwe, Share, named
from m1.config.training import LearningRate, Optimizer


class Rewards(Section):
    """Rule rewards: correctness needs format; the weights are this project's choice (the paper's are not published)."""

    correct: float = 1.0
    format: float = Field(0.1, ge=0, description="added when think and answer tags are well formed")
    overlong_cache: int = Field(ge=1, description="tokens before the window's end where the soft penalty begins")
    overlong_penalty: float = Field(1.0, ge=0)


class Cispo(Section):
    """CISPO (MiniMax-M1 report §3.1, Eq. 4-5). Bounds are absolute values of the importance ratio, not 1 + eps."""

    is_weight_max: float = Field(gt=0)
    is_weight_min: float | None = Field(None, ge=0)


class Repetition(Section):
    """Early stop: this many consecutive tokens, each above the probability (report §3.2: 3000 and 0.99)."""

    consecutive_tokens: int = Field(ge=1)
    probability: float = Field(0.99, gt=0, lt=1)


class WindowCriteria(Section):
    """When to move to the next output window (report §5; the thresholds are not published and chosen here)."""

    perplexity_change: float = Field(
        gt=0, description="relative change of the perplexity over `patience` steps below this"
    )
    length_fraction: float = Field(gt=0, le=1, description="99th percentile of length at least this part of the window")
    patience: int = Field(ge=1)
    max_steps: int = Field(ge=1, description="move on after this many steps in any case, and say so")


class Rl(Section):
    """One reinforcement-learning stage. Windows are output lengths in tokens."""

    windows: list[int] = Field(min_length=1)
    train_steps: int = Field(ge=1, description="batches of rollouts")
    prompts_per_step: int = Field(ge=1)
    group_size: int = Field(ge=2)
    updates_per_step: int = Field(ge=1, description="optimizer steps per batch of rollouts; above 1 is off-policy")
    max_generation_rounds: int = Field(ge=1, description="dynamic sampling: rounds before a smaller batch is taken")
    micro_batch_size: int = Field(ge=1, description="responses of a micro-batch, at most")
    max_prompt_length: int = Field(ge=8)
    swe: RlSwe | None = None
    temperature: float = Field(1.0, gt=0)
    objective: Literal["cispo"] = "cispo"
    cispo: Cispo
    rewards: Rewards
    repetition: Repetition
    advance: WindowCriteria | None = None
    max_solve_rate: float | None = Field(
        None, gt=0, le=1, description="drop prompts the parent solves more often than this"
    )
    learning_rate: LearningRate
    optimizer: Optimizer = Optimizer()
    moe_aux_loss_coeff: float = Field(0.0, ge=0)
    checkpoint_every: int = Field(ge=1)
    evaluate_every: int = Field(ge=1)
    evaluate_prompts_per_task: int = Field(ge=1)

    def asked(self) -> dict[str, Share]:
        """How every family is asked, by its name; the plain one takes the share that the others leave."""
        others = {name: Share(part, part.share) for name, part in named(self, RlSwe).items()}
        rest = max(0.0, 1 - sum(part.share for part in others.values()))
        return {PLAIN: Share(FamilyPrompts(max_prompt_length=self.max_prompt_length), rest), **others}

    @property
    def longest_prompt(self) -> int:
        """Largest number of tokens of any prompt."""
        return max(part.prompts.max_prompt_length or 0 for part in self.asked().values())

    @property
    def mean_prompt_limit(self) -> float:
        """The limits of all families' prompts, weighted by their shares."""
        return sum(part.share * (part.prompts.max_prompt_length or 0) for part in self.asked().values())

    @model_validator(mode="after")
    def _windows(self) -> Rl:
        if sorted(set(self.windows)) != self.windows:
            raise ValueError(f"windows={self.windows} must rise")
        if len(self.windows) > 1 and self.advance is None:
            raise ValueError("several windows need the `advance` criteria")
        batch = self.prompts_per_step * self.group_size
        if batch % self.updates_per_step:
            raise ValueError(
                f"prompts_per_step x group_size = {batch} is not a multiple of updates_per_step={self.updates_per_step}"
            )
        return self
