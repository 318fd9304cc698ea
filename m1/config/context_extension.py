"""Staged context extension."""

from __future__ import annotations

import itertools

from pydantic import Field, model_validator

from m1.config.base import Section
from m1.config.training import LearningRate, Optimizer


class ExtensionStage(Section):
    """One step of the context extension."""

    sequence_length: int = Field(ge=16)
    rotary_base: float = Field(gt=1)
    train_steps: int = Field(ge=1)
    global_batch_size: int = Field(ge=1)
    micro_batch_size: int = Field(ge=1)


class ContextExtension(Section):
    """Four stages, each at least doubling the length (MiniMax-M1 report §2.1)."""

    stages: list[ExtensionStage] = Field(min_length=1)
    questions_per_sequence: int = Field(ge=1, description="how often a sequence asks for its pass key")
    answer_weight: float = Field(
        1.0, ge=1, description="loss weight of an answer's token, retrieved or replayed, against 1 for plain text"
    )
    probes: int = Field(ge=1, description="sequences with one question each, asked after every stage")
    replay_samples: int = Field(0, ge=0, description="worked answers added to every step when SFT came before")
    learning_rate: LearningRate
    optimizer: Optimizer = Optimizer()
    moe_aux_loss_coeff: float = Field(0.0, ge=0)
    log_every: int = Field(5, ge=1)
    checkpoint_every: int | None = Field(
        None, ge=1, description="steps between checkpoints within a stage; after each stage there is one in any case"
    )
    max_gradient_norm: float = Field(gt=0, description="a norm above this stops the stage: the recipe's known failure")

    @model_validator(mode="after")
    def _doubling(self) -> ContextExtension:
        lengths = [stage.sequence_length for stage in self.stages]
        for short, long in itertools.pairwise(lengths):
            if long < 2 * short:
                raise ValueError(f"stages: sequence_length {long} is less than twice the {short} before it")
        return self
