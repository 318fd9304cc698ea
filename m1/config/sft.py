"""Supervised cold start."""

from __future__ import annotations

from pydantic import Field

from m1.config.base import Section
from m1.config.training import Training


class TextReplay(Section):
    """Pretraining text among the answers, so that the language model is not forgotten over them.

    Every sequence carries a pass key that is asked for several times: the skill that context extension lengthens.
    """

    every: int = Field(ge=1, description="steps from one replay to the next")
    sequences: int = Field(ge=1)
    sequence_length: int = Field(ge=16)
    questions: int = Field(ge=1, description="how often a sequence asks for its pass key")
    weight: float = Field(1.0, gt=0, description="loss weight of a token against 1 for an answer's")
    question_weight: float = Field(1.0, gt=0, description="loss weight of a pass key, in the same measure")


class Sft(Training):
    epochs: float = Field(gt=0)
    packed: bool = Field(False, description="samples of a micro-batch end to end in one row, instead of padded")
    text: TextReplay | None = Field(None, description="pretraining text replayed among the answers")
    evaluate_every: int = Field(ge=1)
