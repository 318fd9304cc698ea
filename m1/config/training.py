"""Settings of every stage that trains by gradients."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from m1.config.base import Section


class Optimizer(Section):
    """AdamW. The defaults are the reinforcement-learning values of the MiniMax-M1 report §3.2."""

    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-15, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    clip_grad: float = Field(1.0, gt=0)
    #: Rate of the last norm's gain over that of all other weights. The gain scales the logits: it is the policy's
    #: inverse temperature. A matrix's entry is of order 1/sqrt(width), a gain of order 1 (see muP, arXiv 2203.03466).
    final_norm_lr_mult: float = Field(1.0, gt=0)


class LearningRate(Section):
    """Warm-up, constant phase, decay. Fractions are of the stage's steps."""

    max: float = Field(gt=0)
    min: float = Field(0.0, ge=0)
    warmup_fraction: float = Field(0.0, ge=0, le=1)
    constant_fraction: float = Field(0.0, ge=0, le=1)
    decay: Literal["linear", "cosine", "exponential", "none"] = "cosine"

    @model_validator(mode="after")
    def _ordered(self) -> LearningRate:
        if self.min > self.max:
            raise ValueError(f"min={self.min} exceeds max={self.max}")
        if self.warmup_fraction + self.constant_fraction > 1:
            raise ValueError("warmup_fraction + constant_fraction exceeds 1")
        if self.decay == "exponential" and self.min == 0:
            raise ValueError("an exponential decay needs min above 0")
        return self

    def at(self, step: int, total_steps: int) -> float:
        """Learning rate of 0-based `step` out of `total_steps`."""
        warmup = self.warmup_fraction * total_steps
        if step < warmup:
            return self.max * (step + 1) / max(1.0, math.ceil(warmup))
        decay_start = warmup + self.constant_fraction * total_steps
        if self.decay == "none" or step < decay_start:
            return self.max
        progress = (step - decay_start + 1) / max(1.0, total_steps - decay_start)
        progress = min(1.0, progress)
        if self.decay == "linear":
            return self.max + (self.min - self.max) * progress
        if self.decay == "exponential":
            return self.max * (self.min / self.max) ** progress
        return self.min + (self.max - self.min) * 0.5 * (1 + math.cos(math.pi * progress))


class Training(Section):
    """What every gradient-based stage has. Tokens and steps count the whole data-parallel world."""

    sequence_length: int = Field(ge=16)
    global_batch_size: int = Field(ge=1)
    micro_batch_size: int = Field(ge=1)
    learning_rate: LearningRate
    optimizer: Optimizer = Optimizer()
    moe_aux_loss_coeff: float = Field(0.0, ge=0)
    checkpoint_every: int = Field(ge=1, description="steps between checkpoints")
    log_every: int = Field(10, ge=1)
