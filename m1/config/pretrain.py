"""Continual pretraining."""

from __future__ import annotations

from pydantic import Field

from m1.config.training import Training


class Pretrain(Training):
    init_from: str | None = Field(
        None,
        min_length=1,
        description="folder of a base model in safetensors; without it training starts from the seed",
    )
    train_steps: int = Field(ge=1)
    evaluate_every: int = Field(ge=1)
